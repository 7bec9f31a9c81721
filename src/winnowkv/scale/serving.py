"""``winnow serve --ray``: replicas of the server on Ray Serve, behind one process that listens."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnowkv.errors import InputError
from winnowkv.scale.rayrun import INSTALL_COMMAND, join
from winnowkv.scale.replica import Build, Replica
from winnowkv.serve.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

HEALTH_SECONDS = 2.0  # between two looks at a replica; after three that fail it is replaced
HEALTH_TIMEOUT = 30.0  # seconds that a look may take: a busy replica is no dead one
STATS_SECONDS = 1.0  # between two reports of a replica on the contexts in its memory
SPARE_REQUESTS = 64  # of a replica beside its rows and its queue, for requests that it answers with 429 and for the small ones
DRAIN_SPARE = 10.0  # seconds beside the drain until Ray ends a replica
STARTS = 3  # times that a replica's start may fail before the command gives up


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas, and where.

    Parameters
    ----------
    count: replicas, or with autoscaling those to begin with.
    address: of a Ray cluster, ``auto`` for the one that this machine belongs to; None starts a Ray on this machine alone.
    least, most: bounds of autoscaling; none if both are None.
    target: running and waiting requests of a replica that autoscaling aims at; None for as many as decode together.

    Raises InputError for numbers that contradict each other.
    """

    count: int = 2
    address: str | None = None
    least: int | None = None
    most: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"--replicas {self.count} must be at least 1")
        if self.target is not None and self.target <= 0:
            raise InputError(f"--target-ongoing-requests {self.target:g} must be above 0")
        if self.target is not None and not self.scales:
            raise InputError("--target-ongoing-requests is of autoscaling: give --min-replicas or --max-replicas too")
        if not 1 <= self.fewest <= self.count <= self.largest:
            raise InputError(
                f"--min-replicas {self.fewest}, --replicas {self.count} and --max-replicas {self.largest} must be at least 1, "
                "and in this order"
            )

    @property
    def scales(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.least is not None or self.most is not None

    @property
    def fewest(self) -> int:
        """Replicas that are always there."""
        return self.count if self.least is None else self.least

    @property
    def largest(self) -> int:
        """Most replicas."""
        return self.count if self.most is None else self.most


@contextmanager
def replicas(build: Build, settings: ServeSettings, options: ReplicaOptions) -> Iterator[Starlette]:
    """The front of replicas that are ready, for :class:`winnowkv.serve.server.Server`; they end with the block.

    Parameters
    ----------
    build: makes the application of a replica; pickled, so a function of a module, or a ``functools.partial`` of one.

    Raises InputError if Ray Serve is not installed, no cluster answers, it is too small, or replicas do not start.
    """
    name = app_name(settings)
    started = join(options.largest if options.address is None else None, options.address)
    import ray

    try:
        from ray import serve

        from winnowkv.scale.front import make_front
    except ImportError as error:
        raise InputError(f"--ray needs Ray Serve, of which {error.name} is not installed: {INSTALL_COMMAND}") from None
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # Nothing of Ray Serve's listens: the front does, with the limits that the server has without Ray.
        serve.start(proxy_location="Disabled")
        try:
            handle = serve.run(deployment(build, settings, options), name=name, route_prefix=None)
        except RuntimeError as error:
            raise InputError(f"the replicas did not start: {first_error(name) or error}") from None
        try:
            yield make_front(settings, handle)
        finally:
            if not started:
                serve.delete(name)
    finally:
        if started:  # with all that runs in it: the front has drained, and contexts are in the store since they were made
            ray.shutdown()


def app_name(settings: ServeSettings) -> str:
    """Of the application in the cluster: the same when a server is started again in its place, of others another."""
    return f"winnow-{socket.gethostname()}-{settings.port or os.getpid()}"


def deployment(build: Build, settings: ServeSettings, options: ReplicaOptions) -> Any:
    """Ray Serve's application of the replicas. Raises InputError for more of them than the cluster can hold."""
    import ray
    from ray import serve

    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    most, what = (gpus, "GPUs") if gpus else (int(have.get("CPU", 0)), "CPU cores")
    if options.count > most:
        raise InputError(
            f"--replicas {options.count} need one each of {what}, and the cluster has {most}: ask for at most {most}"
        )
    machines = max(1, sum(node["Alive"] for node in ray.nodes()))
    share = -(-options.largest // machines)
    threads = None if gpus else max(1, (os.cpu_count() or 1) // share)
    scaling: dict[str, Any] = {"num_replicas": options.count}
    if options.scales:
        scaling = {
            "autoscaling_config": {
                "min_replicas": options.fewest, "initial_replicas": options.count, "max_replicas": options.largest,
                "target_ongoing_requests": options.target or settings.max_rows,
            }
        }  # fmt: skip
    made: Any = serve.deployment(  # Ray's type is that of a decorator
        Replica, name="Replica", ray_actor_options={"num_cpus": 1, "num_gpus": min(gpus, 1)},
        max_ongoing_requests=settings.max_rows + settings.queue + SPARE_REQUESTS, max_constructor_retry_count=STARTS,
        health_check_period_s=HEALTH_SECONDS, health_check_timeout_s=HEALTH_TIMEOUT, graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain + DRAIN_SPARE,
        request_router_config={
            "request_router_class": "winnowkv.scale.routing.ContextRouter",
            "request_router_kwargs": {"rows": settings.max_rows}, "request_routing_stats_period_s": STATS_SECONDS,
        },
        **scaling,
    )  # fmt: skip
    return made.bind(build, settings, str(Path.cwd()), threads)


def first_error(name: str) -> str | None:
    """The last line of what Ray Serve says of an application that did not start."""
    from ray import serve

    found = serve.status().applications.get(name)
    texts = [found.message, *(one.message for one in found.deployments.values())] if found else []
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None
