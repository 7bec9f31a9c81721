"""The decode-time budget: which entries of the tokens behind the prompt stay. Pure functions; axes: see :mod:`winnowkv.types`.

While tokens are generated, a layer lets them pile up to a block above the budget and then evicts the
block at once: the most recent entries stay, and of the older ones, for each KV head, those that one of the
last queries attended to most. So scoring costs one small attention map a block; the steps between keep
their query at most. Here ``n`` counts the entries held of generated tokens, and the last ``W`` of them
belong to the queries.
"""

from __future__ import annotations

from winnowkv.errors import BudgetError
from winnowkv.scoring.attention import causal_attention, group_reduce
from winnowkv.scoring.select import top_tokens, with_recent
from winnowkv.types import Indices, Keys, Queries, Scores, Valid

BLOCK = 64  # entries evicted at once
OBSERVE = 32  # the last queries of a block, whose attention is the score
RECENT = 32  # the newest entries, which always stay: at least OBSERVE, so that every query has seen what is chosen from
LEAST = 64  # smallest budget


def check_decode_budget(budget: int | None) -> None:
    """Raise BudgetError for a decode budget that is no whole number or below :data:`LEAST`."""
    if budget is None:
        return
    way_out = f"give at least {LEAST} entries, or None for no limit"
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"decode budget {budget!r} is not a whole number of entries: {way_out}")
    if budget < LEAST:
        raise BudgetError(f"decode budget {budget} is below {LEAST}, of which {RECENT} are the most recent entries: {way_out}")


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


def staying(scores: Scores, budget: int) -> Indices:
    """Which of ``n`` entries stay, ascending, ``[B, H, budget]``: the most recent and the best of the older ones."""
    entries = scores.shape[-1]
    return with_recent(top_tokens(scores[..., : entries - RECENT], budget - RECENT), entries, RECENT)
