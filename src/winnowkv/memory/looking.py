"""What a request holds whose policy looks (lookahead, draft, refit): its whole prompt, and queries, until it has chosen.

``prompt read -> + lookahead's tokens and their queries -> + a compact copy and a draft's queries -> what stays``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnowkv.cache.layer import BUFFER_GROWTH
from winnowkv.policies import BoundPolicy

if TYPE_CHECKING:
    from winnowkv.memory.plan import Shape


@dataclass(frozen=True)
class LookingNeed:
    """Of one request, from its prompt's last layer until it has chosen.

    Attributes
    ----------
    cache: most bytes of its own cache, queries included, those of a draft, too.
    copy: entries of each compressed layer in the compact copy that a draft is decoded from, the draft's own included; none
        without a draft.
    """

    cache: int
    copy: Sequence[int] = ()

    def bytes(self, shape: Shape) -> int:
        """Most bytes of cache and copy."""
        return self.cache + sum(
            layer.kv_bytes(entries, shape.itemsize) for layer, entries in zip(shape.compressed, self.copy, strict=False)
        )


def looking_need(
    shape: Shape, bound: BoundPolicy, entries: int, read: int, kept: Sequence[int], new_tokens: int | None = None
) -> LookingNeed:
    """What a policy that looks needs.

    ``entries``: of each compressed layer once the prompt is read; ``read``: bytes while it is read, without queries; ``kept``:
    entries that each compressed layer is left with; ``new_tokens``: most of the answer, None if that is not known.
    """
    policy = bound.policy
    ahead = policy.lookahead if new_tokens is None else min(policy.lookahead, new_tokens - 1)
    full = grown_to(entries, ahead)
    grown = shape.window_bytes(entries, ahead) + sum(layer.kv_bytes(full, shape.itemsize) for layer in shape.compressed)
    queries = asked_bytes(shape, bound) + (ahead + policy.draft) * query_bytes(shape)
    copy = [each + ahead + policy.draft for each in kept] if policy.draft else []
    return LookingNeed(max(read, grown) + queries, copy)


def asked_bytes(shape: Shape, bound: BoundPolicy) -> int:
    """Bytes of the prompt's own queries that a policy chooses by."""
    return len(bound.query_positions()) * query_bytes(shape)


def query_bytes(shape: Shape) -> int:
    """Bytes of one token's queries in all compressed layers."""
    return sum(shape.model_info.heads * layer.key_size * shape.itemsize for layer in shape.compressed)


def grown_to(entries: int, added: int) -> int:
    """Entries that a layer's buffers have room for once ``added`` tokens were read one by one after a prompt."""
    step = BUFFER_GROWTH + 1
    return entries if not added else entries + step + (added - 1) // step * step
