"""Spans of consecutive tokens, such as sentences and review windows, and their scores: pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnowkv.types import HeadScores, Scores, WindowScores


def span_owner(tokens: int, ends: Sequence[int], longest: int) -> Tensor:
    """The span that each token belongs to, ``[S]``: one from each of ``ends`` to the next, cut after ``longest`` tokens."""
    cuts = torch.zeros(tokens, dtype=torch.long)
    cuts[[0, *(end for end in ends if end < tokens)]] = 1
    place = torch.arange(tokens)
    begins = torch.where(cuts > 0, place, 0).cummax(0).values
    cuts[(place - begins) % longest == 0] = 1
    return cuts.cumsum(0) - 1


def span_reduce(scores: Scores, owner: Tensor, top: int) -> WindowScores:
    """Score of each span: the mean of its ``top`` best tokens, of all if it is shorter; ``[B, H, R]``.

    WindowKV's rule (arXiv 2503.17922) for spans of different lengths. ``owner`` ``[S]`` is ascending.
    """
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    owners, order = owner[by_score].sort(dim=-1, stable=True)
    lengths = torch.bincount(owner)
    place = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owners]
    best = torch.where(place < top, scores.gather(-1, by_score.gather(-1, order)), 0.0)
    sums = scores.new_zeros(*scores.shape[:-1], len(lengths)).scatter_add_(-1, owners, best)
    return sums / lengths.clamp(max=top)


def concentrated(scores: HeadScores, owner: Tensor, sinks: int, near: int, count: int) -> HeadScores:
    """The ``count`` heads whose attention past the sinks falls most on one span, as shares of it, ``[1, count, C]``.

    In their order. Shares, because retrieval heads rest on the sinks with nearly all of their attention; what falls on the
    last ``near`` tokens chooses no head, because many look right before the question, whatever it asks.
    """
    place = torch.arange(scores.shape[-1], device=scores.device)
    shares = scores[0].masked_fill(place < sinks, 0.0)
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)
    far = shares.masked_fill(place >= len(place) - near, 0.0)
    spans = torch.zeros_like(far).index_add_(
        1, owner, far
    )  # as many spans as tokens at the most: how many, a GPU would have to say
    best = spans.amax(-1).topk(min(count, len(spans))).indices.sort().values
    return shares[None, best]


def window_reduce(scores: Scores, width: int, top: int) -> WindowScores:
    """Score of each review window of ``width`` tokens: the mean of its ``top`` best tokens, ``[B, H, R]``.

    The last window may be shorter; it is then the mean of what it has.
    Source: WindowKV (arXiv 2503.17922).
    """
    tokens = scores.shape[-1]
    whole = tokens - tokens % width
    means: Tensor = scores[..., :whole].unflatten(-1, (-1, width)).topk(min(top, width), dim=-1).values.mean(-1)
    if whole == tokens:
        return means
    tail = scores[..., whole:]
    last = tail.topk(min(top, tail.shape[-1]), dim=-1).values.mean(-1, keepdim=True)
    return torch.cat([means, last], dim=-1)
