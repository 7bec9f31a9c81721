"""Which replica gets a request: the one that has its context in memory, else the one with the fewest requests."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

CHOICES = 8  # replicas of which the least loaded is taken; drawn anew for each request


class ContextRouter(RequestRouter):
    """Ray Serve's router of requests to replicas. A request's ``session_id`` is the id of the context that it names.

    Replicas say which contexts they have in memory, seconds late. Until one says so, the replica is drawn by a hash of the
    context's id and its own, so that all requests on a context go the same way, and most of them still do when a
    replica comes or goes.
    """

    def initialize_state(self, *, rows: int = 1) -> None:  # type: ignore[override]
        """``rows``: requests that decode together in a replica; one that has as many is overloaded."""
        self.rows = rows

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, best first; of a group the one with the fewest requests is taken."""
        context = pending_request.metadata.session_id if pending_request is not None else ""
        drawn = random.sample(candidate_replicas, min(CHOICES, len(candidate_replicas)))
        if not context or not candidate_replicas:
            return [drawn]
        first = [one for one in candidate_replicas if context in one.routing_stats.get("contexts", ())]
        first = first or [max(candidate_replicas, key=lambda one: weight(context, one.replica_id.unique_id))]
        busy = {one.replica_id: self._replica_queue_len_cache.get(one.replica_id) or 0 for one in (*first, *drawn)}
        if overloaded([busy[one.replica_id] for one in first], list(busy.values()), self.rows):
            return [drawn]
        return [first, drawn]


def overloaded(preferred: Sequence[int], requests: Sequence[int], rows: int) -> bool:
    """Whether a request would wait in every preferred replica, and begin sooner in another, by requests in each."""
    return min(preferred) >= rows and min(requests) < min(preferred)


def weight(context: str, replica: str) -> int:
    """A number by which each context prefers other replicas (rendezvous hashing)."""
    return int.from_bytes(hashlib.blake2b(f"{context} {replica}".encode(), digest_size=8).digest())
