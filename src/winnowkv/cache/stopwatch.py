"""How long stretches of work take, together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds in all of the stretches so far. On CUDA by the device's own clock, which nothing waits for before it is read."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def fork(self) -> Stopwatch:
        """One that goes on from the same seconds."""
        other = Stopwatch()
        other._seconds = self.seconds
        return other

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """A stretch of work on the device; one that fails counts, too."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(device))
            try:
                yield
            finally:
                end.record(torch.cuda.current_stream(device))
                self._events.append((begin, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Waits for the device to have done the last of them."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds
