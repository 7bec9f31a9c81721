"""``winnow eval`` on many processes: Ray actors that load the model once and answer rows, on this machine or on a cluster.

The driver reads the rows, and only the driver writes results, as they arrive. A shard is one row, or as many as
decode together, with all the settings that the result folder lacks. A row's settings are not split over workers:
one recorded prefill serves all of them.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from winnowkv.errors import InputError
from winnowkv.evaluate.report.machine import revision, versions
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.evaluate.tasks.run import Advance, Evaluation, Work, Worker, failed_lines, shards

INSTALL_COMMAND = "pip install 'winnowkv[scale]'"
MAX_RETRIES = 2  # of a shard whose worker died; after that its lines are failed and the run continues


class RayWorker:
    """A Ray actor: a worker that loads its model at the first call.

    ``folder`` is the driver's working folder; ``share`` is how many actors share a machine's cores.
    """

    def __init__(self, asked: Evaluation, folder: str, share: int) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # so that relative paths of models and profiles are those of the driver
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))
        transformers.utils.logging.disable_progress_bar()
        self.asked = asked

    @cached_property
    def worker(self) -> Worker:
        """The worker. Errors of a model or profile are raised here, not while the actor is created."""
        return Worker(self.asked)

    def ready(self) -> dict[str, Any]:
        """Load the model; returns what all its result lines have in common."""
        return self.worker.config

    def process(self) -> int:
        """The id of the actor's process."""
        return os.getpid()

    def answer(self, shard: Sequence[Work]) -> list[dict[str, Any]]:
        """Result lines of a shard."""
        return self.worker.answer(shard)


class Pool:
    """Actors that have loaded the model; a dead one is replaced.

    Attributes
    ----------
    config: what all lines of one result folder must have in common.
    deaths: actors that died and were replaced.

    Raises InputError for more workers than the cluster has GPUs (CPU cores if it has none), and what loading raises.
    """

    def __init__(self, asked: Evaluation, workers: int | None) -> None:
        import ray

        self._asked = asked
        have, machines = ray.cluster_resources(), max(1, sum(node["Alive"] for node in ray.nodes()))
        gpus = int(have.get("GPU", 0))
        count = machines if workers is None and not gpus else workers or gpus
        most, what = (gpus, "GPUs") if gpus else (int(have.get("CPU", 0)), "CPU cores")
        if count > most:
            raise InputError(f"{count} workers need one each of {what}, the cluster has {most}: ask for at most {most}")
        self._made = ray.remote(num_cpus=1, num_gpus=min(gpus, 1), scheduling_strategy="SPREAD")(RayWorker)
        self._share = -(-count // machines)
        self._actors = [self._actor() for _ in range(count)]
        self.deaths = 0
        try:
            configs = [_get(answer) for answer in [actor.ready.remote() for actor in self._actors]]
        except ray.exceptions.RayError as error:
            raise InputError(
                f"a worker died while it loaded model {asked.model!r} ({_first_line(error)}): "
                f"if memory is short, ask for fewer than {count} workers"
            ) from None
        self.config: dict[str, Any] = configs[0]
        if other := next((config for config in configs if config != self.config), None):
            raise InputError(f"the cluster's machines load {asked.model!r} differently: {self.config} and {other}")

    def processes(self) -> list[int]:
        """Process ids of the actors on their machines."""
        return [_get(actor.process.remote()) for actor in self._actors]

    def _actor(self) -> Any:
        return self._made.remote(self._asked, str(Path.cwd()), self._share)

    def run(self, store: ResultStore, work: Sequence[Work], advance: Advance, retries: int = MAX_RETRIES) -> None:
        """Answer every shard of ``work`` and store its lines as they arrive; ``advance`` is called after every line.

        A shard whose worker died is given to a new one, ``retries`` times; after that its lines are failed with the reason.
        """
        import ray

        todo, idle = deque((shard, 0) for shard in shards(work, self._asked.batch)), deque(self._actors)
        busy: dict[Any, tuple[Any, list[Work], int]] = {}
        while todo or busy:
            while todo and idle:
                actor, (shard, deaths) = idle.popleft(), todo.popleft()
                busy[actor.answer.remote(shard)] = actor, shard, deaths
            (done, *_), _ = ray.wait(list(busy))
            actor, shard, deaths = busy.pop(done)
            try:
                lines = _get(done)
            except ray.exceptions.RayError as error:
                actor = self._replace(actor)
                lines = []
                if deaths < retries:
                    todo.appendleft((shard, deaths + 1))
                else:
                    lines = self._failed(shard, f"its worker died, {deaths + 1} times in all: {_first_line(error)}")
            idle.append(actor)
            for line in lines:
                store.add(line)
                advance(f"{line['task']} {line['row']}")

    def _replace(self, dead: Any) -> Any:
        """Replace a dead actor by a new one."""
        import ray

        ray.kill(dead)  # it may be alive but unreachable, and must not answer later
        self.deaths += 1
        new = self._actors[self._actors.index(dead)] = self._actor()
        return new

    def _failed(self, shard: Sequence[Work], reason: str) -> list[dict[str, Any]]:
        about = {"versions": versions(), "git": revision(), "seed": self._asked.seed}
        return [line for work in shard for line in failed_lines(work, self._asked.protocol, reason, about)]


@contextmanager
def pool(asked: Evaluation, workers: int | None = None, address: str | None = None) -> Iterator[Pool]:
    """Workers on Ray for the length of a block.

    Parameters
    ----------
    workers: how many; None is one per GPU of the cluster, or one per machine if it has no GPU.
    address: of a Ray cluster, ``auto`` for the one that this machine belongs to. None starts a Ray on
        this machine alone, which no other machine can reach, and ends it with the block. If this
        process is already connected to a Ray, that one is used.

    Inside the block, standard output goes to standard error, because Ray prints messages about dead workers.
    Raises InputError if Ray is not installed or no cluster answers, and what :class:`Pool` raises.
    """
    with redirect_stdout(sys.stderr):
        started = join(workers, address)
        try:
            yield Pool(asked, workers)
        finally:
            if started:
                import ray

                ray.shutdown()


def join(workers: int | None, address: str | None) -> bool:
    """Start a Ray of ``workers`` cores, or connect to the one at ``address``; False if this process is connected already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Ray reads it when it is imported: without support for clusters it listens on loopback only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # By default Ray lowers its workers' priority; here the user waits for them.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError:
        raise InputError(f"more than one process needs the package ray: {INSTALL_COMMAND}") from None
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
        return True
    try:
        ray.init(address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise InputError(
            f"no Ray cluster answers at {address!r} ({_first_line(error)}): start one with 'ray start --head', or leave the "
            "address out"
        ) from None
    return True


def _get(answer: Any) -> Any:
    """An actor's answer; an exception of the actor is raised here as the original exception."""
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
