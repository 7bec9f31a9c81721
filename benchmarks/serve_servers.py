"""Servers in processes of their own, for the measurements of ``winnow serve``: started on a free port, watched, stopped."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serve_client import HOST, ask

from winnowkv.errors import InputError

READY_SECONDS = 300.0  # vLLM's first start takes minutes
WINNOW = (sys.executable, "-c", "from winnowkv.cli import main; main()", "serve")
METRIC = re.compile(r"^([a-zA-Z_:]+)(?:\{[^}]*\})? ([0-9.eE+-]+|NaN)$", re.MULTILINE)


@dataclass
class Served:
    """A server that runs: its process, its port, the file with its output."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    start_s: float = 0.0

    @property
    def rss(self) -> int:
        """Resident bytes of the process and of those it started."""
        return sum(resident(pid) for pid in tree(self.process.pid))

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the process and of those it started that still run."""
        return sum(ticks(pid) for pid in tree(self.process.pid)) / os.sysconf("SC_CLK_TCK")

    def metrics(self) -> dict[str, float]:
        """Metrics by name; those with labels are added up. Raises OSError if the server does not answer."""
        return parsed(asyncio.run(ask(self.port, "GET", "/metrics"))[1])

    def tail(self, lines: int = 5) -> str:
        """The last lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, and the exit code; after so many seconds SIGKILL."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def parsed(page: bytes) -> dict[str, float]:
    """Prometheus' text format as numbers by name."""
    found: dict[str, float] = {}
    for name, value in METRIC.findall(page.decode()):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(one for child in children for one in tree(child))]


def resident(pid: int) -> int:
    """Resident bytes of one process, 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def ticks(pid: int) -> int:
    """Clock ticks of processor time of one process, 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    except OSError:
        return 0


def free_port() -> int:
    """A port that is free now, for servers that do not say which one they took."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@contextmanager
def winnow_server(log: Path, *options: str, threads: int = 1, wrap: Sequence[str] = ()) -> Iterator[Served]:
    """``winnow serve`` with these options on a port of its own; ``wrap``: a command before it, such as ``prlimit``."""
    command = [*wrap, *WINNOW, "--port", "0", *options]
    with running(command, log, {"OMP_NUM_THREADS": str(threads)}, None, "/ready") as served:
        yield served


@contextmanager
def running(command: Sequence[str], log: Path, variables: dict[str, str], port: int | None, ready: str) -> Iterator[Served]:
    """A server until the block is left; ``port``: which it listens on, None if its output says it.

    Raises InputError if it ends before it is ready, or is not ready in time.
    """
    begin = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **variables},
            start_new_session=True,
        )  # fmt: skip
    served = Served(process, port or 0, log)
    try:
        while not is_ready(served, ready):
            if process.poll() is not None:
                raise InputError(f"{command[0]} ended with {process.returncode}: {served.tail(1)} (its output is in {log})")
            if time.perf_counter() - begin > READY_SECONDS:
                raise InputError(f"{command[0]} is not ready after {READY_SECONDS:g} s (its output is in {log})")
            time.sleep(0.2)
        served.start_s = time.perf_counter() - begin
        yield served
    finally:
        if process.poll() is None:
            served.stop()
        for pid in [one for one in tree(process.pid) if one != process.pid]:  # of a server that leaves some behind
            os.kill(pid, signal.SIGKILL)


def is_ready(served: Served, path: str) -> bool:
    """Whether a server answers that it is ready; its port is read from its output if it is not known."""
    if not served.port:
        found = re.search(rf"http://{re.escape(HOST)}:(\d+)", served.log.read_text(errors="replace"))
        if found is None:
            return False
        served.port = int(found[1])
    try:
        return asyncio.run(ask(served.port, "GET", path))[0] == 200
    except OSError:
        return False


@dataclass
class Watch:
    """What was sampled of a server while it worked: at most, and every sample."""

    samples: list[dict[str, float]] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    def most(self, name: str) -> float:
        """The largest value of a metric."""
        return max((sample.get(name, 0.0) for sample in self.samples), default=0.0)

    async def _sample(self, served: Served, every: float, names: Sequence[str]) -> None:
        while True:
            sample = {"at": time.time(), "rss": float(served.rss)}
            try:
                found = parsed((await ask(served.port, "GET", "/metrics"))[1])
                sample |= {name: found[name] for name in names if name in found}
            except OSError:
                pass  # the server is busy starting or stopping: its RSS is still known
            self.samples.append(sample)
            await asyncio.sleep(every)

    def start(self, served: Served, every: float, names: Sequence[str]) -> None:
        """Sample every so many seconds from now on. On an event loop."""
        self._task = asyncio.get_running_loop().create_task(self._sample(served, every, names))

    def stop(self) -> None:
        """No more samples."""
        if self._task is not None:
            self._task.cancel()
