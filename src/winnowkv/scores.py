"""Importance of prompt tokens: pure functions on tensors. Axes: see :mod:`winnowkv.types`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from winnowkv.types import HeadScores, Keys, Queries, Scores, WindowScores

PoolKind = Literal["avg", "max"]
GroupKind = Literal["mean", "max"]


def window_attention(queries: Queries, keys: Keys, scale: float) -> HeadScores:
    """Attention that each context token gets from the last ``W`` queries, summed over them.

    Causal softmax in float32 over all ``S`` keys; only the ``C = S - W`` context
    columns are returned, ``[B, Hq, C]``. No map larger than ``[B, Hq, W, S]`` exists,
    and KV heads are not expanded. Source: SnapKV (arXiv 2404.14469).
    """
    batch, heads, window, size = queries.shape
    kv_heads, tokens = keys.shape[1], keys.shape[2]
    grouped = queries.float().reshape(batch, kv_heads, -1, size) * scale
    logits = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, window, tokens)
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., tokens - window :].masked_fill_(future, float("-inf"))
    return logits.softmax(-1)[..., : tokens - window].sum(-2)


def group_reduce(scores: HeadScores, kv_heads: int, how: GroupKind = "mean") -> Scores:
    """Query-head scores to KV-head scores ``[B, Hkv, C]``: mean (or max) over each GQA group."""
    grouped = scores.unflatten(1, (kv_heads, -1))
    return grouped.mean(2) if how == "mean" else grouped.amax(2)


def pool(scores: Scores, kernel: int, kind: PoolKind) -> Scores:
    """Smooth along the tokens so that neighbours of a peak stay too. ``kernel`` is odd; 1 changes nothing.

    As in the published code, the average divides by the whole kernel at the edges
    (zero padding) and the maximum ignores padding.
    """
    if kernel == 1:
        return scores
    smooth = F.avg_pool1d if kind == "avg" else F.max_pool1d
    return smooth(scores, kernel, stride=1, padding=kernel // 2)


def window_reduce(scores: Scores, width: int, top: int) -> WindowScores:
    """Score of each review window of ``width`` tokens: the mean of its ``top`` best tokens, ``[B, H, R]``.

    The last window may be shorter; it is then the mean of what it has.
    Source: WindowKV (arXiv 2503.17922).
    """
    tokens = scores.shape[-1]
    whole = tokens - tokens % width
    means = scores[..., :whole].unflatten(-1, (-1, width)).topk(min(top, width), dim=-1).values.mean(-1)
    if whole == tokens:
        return means
    tail = scores[..., whole:]
    last = tail.topk(min(top, tail.shape[-1]), dim=-1).values.mean(-1, keepdim=True)
    return torch.cat([means, last], dim=-1)
