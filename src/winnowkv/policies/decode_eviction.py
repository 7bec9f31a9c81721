"""Which entries of the generated tokens stay under a decode budget: the newest, and those that one of the last queries needed.

While tokens are generated, a layer lets them pile up to a block above the budget and then evicts the block at once. So scoring
costs one small attention map a block; the steps between keep their query at most. Here ``n`` counts entries of generated
tokens, and the last ``W`` of them belong to the queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from winnowkv.scoring.attention import causal_attention, group_reduce
from winnowkv.scoring.select import top_tokens, with_recent
from winnowkv.types import Indices, Keys, Queries, Scores, Valid, Values


@dataclass(frozen=True)
class DecodeEviction:
    """The most recent entries stay, and of the older ones, for each KV head, those that a query attended to most.

    Parameters
    ----------
    observe: the last queries of a block, whose attention is the score.
    recent: the newest entries, which always stay: at least ``observe``, so that every query has seen what is chosen from.
    """

    observe: int = 32
    recent: int = 32

    def select(self, queries: Queries, keys: Keys, values: Values, scale: float, valid: Valid | None, budget: int) -> Indices:
        """Which of the ``n`` entries stay, ascending, ``[B, Hkv, budget]``.

        ``queries`` are the last ``observe``; ``keys`` and ``values`` ``[B, Hkv, n, D]`` are those of the generated tokens, and
        ``valid`` ``[B, 1 or Hkv, n]`` says which of them count. With tensor parallelism ``Hkv`` are the heads of this process,
        and nothing is known of the others.
        """
        return newest_and_best(received_attention(queries, keys, scale, valid), budget, self.recent)


def received_attention(queries: Queries, keys: Keys, scale: float, valid: Valid | None = None) -> Scores:
    """The most attention that each entry gets from one of the last ``W`` queries, mean over the group, ``[B, Hkv, n]``.

    The maximum, because an entry that one step in many needs must stay for it. Only generated entries share a
    query's attention here: so the prompt's, which may be quantized, need not be read.
    ``keys`` ``[B, Hkv, n, D]`` end with the queries' own; ``valid`` ``[B, 1 or Hkv, n]`` says which entries,
    and so which queries, count. An entry that does not is scored below every one that does.
    """
    kv_heads, window = keys.shape[1], queries.shape[2]
    attention = causal_attention(queries, keys, scale)
    if valid is None:
        return group_reduce(attention.amax(-2), kv_heads)
    counts = valid.repeat_interleave(queries.shape[1] // valid.shape[1], 1)
    attention = attention * counts[:, :, None]
    attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-30) * counts[:, :, -window:, None]
    return group_reduce(attention.amax(-2), kv_heads).masked_fill(~valid, -1)


def newest_and_best(scores: Scores, budget: int, recent: int) -> Indices:
    """Which of ``n`` entries stay, ascending, ``[B, H, budget]``: the ``recent`` newest and the best of the older ones."""
    entries = scores.shape[-1]
    return with_recent(top_tokens(scores[..., : entries - recent], budget - recent), entries, recent)
