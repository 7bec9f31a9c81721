"""``winnow eval`` on many processes: Ray actors that hold the model once and answer rows, on this machine or on a cluster.

The driver reads the rows and alone writes results, as they arrive. A shard is one row, or as many as
decode together, with all the settings that the result folder lacks of it. A departure from a grid of row-shards x
policies: splitting a row's settings over workers would read its prompt once for each, where one
recorded prefill serves them all.
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

INSTALL = "pip install 'winnowkv[scale]'"
RETRIES = 2  # of a shard whose worker died; then its lines say so and the run goes on


class Answerer:
    """What an actor is: a worker that loads its model with the first thing that it is asked.

    ``folder`` is the driver's; ``share`` is how many actors share a machine's cores.
    """

    def __init__(self, asked: Evaluation, folder: str, share: int) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # relative paths of models and profiles mean what they mean to the driver
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))
        transformers.utils.logging.disable_progress_bar()
        self.asked = asked

    @cached_property
    def worker(self) -> Worker:
        """The worker; raises here, and not while the actor is made, what is wrong with the model or a profile."""
        return Worker(self.asked)

    def ready(self) -> dict[str, Any]:
        """What lines of its model have in common, once it is loaded."""
        return self.worker.config

    def process(self) -> int:
        """The process that it runs in."""
        return os.getpid()

    def answer(self, shard: Sequence[Work]) -> list[dict[str, Any]]:
        """Result lines of a shard."""
        return self.worker.answer(shard)


class Pool:
    """Actors that have loaded the model; a dead one is replaced.

    Attributes
    ----------
    config: what lines must have in common to stand in one result folder.
    deaths: actors that died, and were replaced.

    Raises InputError for more workers than the cluster has GPUs, or CPU cores where it has none, and what loading raises.
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
        self._made = ray.remote(num_cpus=1, num_gpus=min(gpus, 1), scheduling_strategy="SPREAD")(Answerer)
        self._share = -(-count // machines)
        self._actors = [self._actor() for _ in range(count)]
        self.deaths = 0
        try:
            configs = [_get(answer) for answer in [actor.ready.remote() for actor in self._actors]]
        except ray.exceptions.RayError as error:
            raise InputError(
                f"a worker died while it loaded model {asked.model!r} ({_first_line(error)}): "
                f"where memory is short, ask for fewer than {count} workers"
            ) from None
        self.config: dict[str, Any] = configs[0]
        if other := next((config for config in configs if config != self.config), None):
            raise InputError(f"the cluster's machines load {asked.model!r} differently: {self.config} and {other}")

    def processes(self) -> list[int]:
        """Process ids of the actors, on the machines that they run on."""
        return [_get(actor.process.remote()) for actor in self._actors]

    def _actor(self) -> Any:
        return self._made.remote(self._asked, str(Path.cwd()), self._share)

    def run(self, store: ResultStore, work: Sequence[Work], advance: Advance, retries: int = RETRIES) -> None:
        """Answer every shard of ``work`` and store its lines as they arrive; ``advance`` is told of every line.

        A shard whose worker died goes to a new one, ``retries`` times; then its lines are failed with the reason.
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
        """A new actor in a dead one's place."""
        import ray

        ray.kill(dead)  # it may only be out of reach, and must not answer any more
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
    workers: how many; None is one a GPU of the cluster, or one a machine where it has none.
    address: of a Ray cluster, ``auto`` for the one that this machine belongs to. None starts a Ray of
        this machine alone, which nobody else can reach, and ends it with the block; a Ray that this
        process is in already is used as it is.

    Inside the block standard output goes to standard error: Ray tells there of workers that died.
    Raises InputError where Ray is not installed or no cluster answers, and as :class:`Pool`.
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
    """Start a Ray of ``workers`` cores, or join the one at ``address``; False where this process is in one already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Ray reads it when it is imported: without the means for clusters it listens on loopback only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray's workers step back behind every other process of the machine; here they are what the user waits for.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError:
        raise InputError(f"more than one process needs the package ray: {INSTALL}") from None
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
            f"no Ray cluster answers at {address!r} ({_first_line(error)}): start one with 'ray start --head', or use --workers"
        ) from None
    return True


def _get(answer: Any) -> Any:
    """An actor's answer; what it raised is raised here as it was raised there."""
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
