"""Time work in turns, describe the spread of values, and read memory use."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from winnowkv.evaluate.settings import peak_memory

Work = Callable[[], Any]
PROC_SELF = Path("/proc/self")  # only Linux reports what a process holds now, and can reset its peak


class Clock:
    """Measures the seconds that work takes, work on the accelerator included."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now

    def seconds(self, work: Work) -> float:
        """Seconds of doing the work once."""
        self._wait()
        begin = self._now()
        work()
        self._wait()
        return self._now() - begin

    def turns(self, works: Mapping[str, Work], rounds: int, warm: int = 0) -> dict[str, list[float]]:
        """Seconds of each work in each round. In a round the works run one after the other; each round starts with the next.

        A machine's speed drifts, so only works of one round are compared. The first ``warm`` rounds are not counted.
        """
        names, took = list(works), {name: list[float]() for name in works}
        for round_ in range(warm + rounds):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                seconds = self.seconds(works[name])
                if round_ >= warm:
                    took[name].append(seconds)
        return took

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, smallest, largest and number of the values."""
    low, _, high = quantiles([*values, *values[: len(values) == 1]], n=4, method="inclusive")  # one value is its own quartiles
    return {
        "median": median(values), "low": low, "high": high, "least": min(values), "most": max(values), "count": len(values),
    }  # fmt: skip


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The spread of ``ours / theirs``, pair by pair."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def peak_of(work: Work) -> int | None:
    """The most memory that the process held during the work, in bytes; on CUDA, what torch allocated there.

    If the system cannot reset the peak, it is the most that the process has held so far.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    try:
        (PROC_SELF / "clear_refs").write_text("5")
    except OSError:
        work()
        return peak_memory()
    work()
    return status_bytes("VmHWM")


def held_memory() -> int | None:
    """Bytes of memory that the process holds now; None if the system does not report it."""
    gc.collect()
    try:
        return status_bytes("VmRSS")
    except OSError:
        return None


def status_bytes(name: str) -> int:
    """A size from the process's status file, in bytes. Raises OSError if it is not there."""
    for line in (PROC_SELF / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{PROC_SELF / 'status'} does not say {name}")


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None
    return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:"))
