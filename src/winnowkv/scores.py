"""Importance of prompt tokens: pure functions on tensors. Axes: see :mod:`winnowkv.types`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from winnowkv.types import HeadScores, Keys, Probabilities, Queries, Scores, WindowScores

PoolKind = Literal["avg", "max"]
GroupKind = Literal["mean", "max"]


def causal_attention(queries: Queries, keys: Keys, scale: float) -> Float[Tensor, "B Hq W S"]:
    """Attention probabilities of the newest ``W`` queries over all ``S`` keys, causal, float32; KV heads are not expanded."""
    batch, heads, window, size = queries.shape
    kv_heads, tokens = keys.shape[1], keys.shape[2]
    grouped = queries.float().reshape(batch, kv_heads, -1, size) * scale
    logits = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, window, tokens)
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., tokens - window :].masked_fill_(future, float("-inf"))
    return logits.softmax(-1)


def window_probabilities(queries: Queries, keys: Keys, scale: float) -> Probabilities:
    """Attention probabilities of the last ``W`` queries on the context, ``[B, Hq, W, C]``.

    The ``C = S - W`` context columns of a softmax over all ``S`` keys; no map is larger than ``[B, Hq, W, S]``.
    """
    return causal_attention(queries, keys, scale)[..., : keys.shape[2] - queries.shape[2]]


def window_attention(queries: Queries, keys: Keys, scale: float) -> HeadScores:
    """Attention that each context token gets from the last ``W`` queries, summed over them, ``[B, Hq, C]``.

    Source: SnapKV (arXiv 2404.14469).
    """
    return window_probabilities(queries, keys, scale).sum(-2)


def accumulated_attention(queries: Queries, keys: Keys, scale: float, block: int = 256) -> HeadScores:
    """Attention that each token gets from every query of the prompt (``W = S``), summed, ``[B, Hq, S]``.

    Causal softmax in float32, ``block`` queries at a time over the keys that they can see, so
    that no map larger than ``[B, Hq, block, S]`` exists. Source: H2O (arXiv 2306.14048).
    """
    batch, heads, tokens, _ = queries.shape
    total = torch.zeros(batch, heads, tokens, device=keys.device)
    keys = keys.float()  # once, not for every block
    for begin in range(0, tokens, block):
        end = min(begin + block, tokens)
        total[..., :end] += causal_attention(queries[:, :, begin:end], keys[:, :, :end], scale).sum(-2)
    return total


def group_reduce(scores: HeadScores, kv_heads: int, how: GroupKind = "mean") -> Scores:
    """Query-head scores to KV-head scores ``[B, Hkv, C]``: mean (or max) over each GQA group."""
    grouped = scores.unflatten(1, (kv_heads, -1))
    return grouped.mean(2) if how == "mean" else grouped.amax(2)


def some_heads_attention(queries: Queries, keys: Keys, scale: float, heads: Sequence[int]) -> HeadScores:
    """:func:`window_attention` of a few query heads only, ``[B, len(heads), C]``."""
    if len(heads) == queries.shape[1]:
        return window_attention(queries, keys, scale)
    group = queries.shape[1] // keys.shape[1]
    return window_attention(queries[:, list(heads)], keys[:, [head // group for head in heads]], scale)


def group_members(scores: HeadScores, heads: Sequence[int], query_heads: int, kv_heads: int) -> Scores:
    """Scores of some query heads to KV-head scores ``[B, Hkv, C]``: the mean of a group's own, of all if it has none."""
    owner = torch.tensor(heads, device=scores.device) // (query_heads // kv_heads)
    rows = [scores[:, owner == kv] if bool((owner == kv).any()) else scores for kv in range(kv_heads)]
    return torch.stack([row.mean(1) for row in rows], dim=1)


def attention_preference(attention: Probabilities, tau1: float, tau2: float) -> Tensor:
    """How much cache a layer asks for: entropy ``^(1/tau1)`` times variance ``^(1/tau2)``, a scalar.

    The entropy of every query's attention and the variance of every token's over the ``W``
    queries, each summed over heads and tokens. Source: CAKE (arXiv 2503.12491, section 4).
    """
    entropy = (attention * (attention + 1e-10).log()).sum().neg().clamp(min=0)
    variance = attention.var(-2).sum()
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


def expected_attention(queries: Queries, keys: Keys, scale: float, context: int) -> tuple[Scores, Tensor]:
    """Attention of queries that stand behind all ``S`` keys on the first ``context`` of them, and the layer's preference.

    Per token the root mean square over the queries, mean over each GQA group, ``[B, Hkv, context]``: a token that few
    queries need much counts more than one that all need a little. The preference is that of :func:`attention_preference`.
    """
    grouped = queries.float().unflatten(1, (keys.shape[1], -1)) * scale
    group, count = grouped.shape[2:4]
    scores, entropy, variance = [], torch.zeros((), device=keys.device), torch.zeros((), device=keys.device)
    for head in range(keys.shape[1]):  # one KV head at a time: no map is larger than [B, S, G * W]
        logits = keys[:, head].float() @ grouped[:, head].flatten(1, 2).transpose(1, 2)
        attention = logits.softmax(1)
        normalizer = logits.amax(1) - attention.amax(1).log()
        logits, attention = logits[:, :context], attention[:, :context]
        square = attention.unflatten(2, (group, count)).square().mean(-1)
        mean = attention.unflatten(2, (group, count)).mean(-1)
        scores.append(square.sqrt().mean(-1))
        entropy += (normalizer * attention.sum(1)).sum() - torch.dot(attention.flatten(), logits.flatten())
        variance += (square - mean.square()).sum()
    return torch.stack(scores, 1), entropy.clamp(min=0) * variance.clamp(min=0)


def pool(scores: Scores, kernel: int, kind: PoolKind) -> Scores:
    """Smooth along the tokens so that neighbours of a peak stay too. ``kernel`` is odd; 1 changes nothing.

    As in the published code, the average divides by the whole kernel at the edges
    (zero padding) and the maximum ignores padding.
    """
    if kernel == 1:
        return scores
    smooth = F.avg_pool1d if kind == "avg" else F.max_pool1d
    return smooth(scores, kernel, stride=1, padding=kernel // 2)


def span_owner(tokens: int, ends: Sequence[int], longest: int) -> Tensor:
    """The span that each token belongs to, ``[S]``: one from each of ``ends`` to the next, cut behind ``longest`` tokens."""
    cuts = torch.zeros(tokens, dtype=torch.long)
    cuts[[0, *(end for end in ends if end < tokens)]] = 1
    place = torch.arange(tokens)
    begins = torch.where(cuts > 0, place, 0).cummax(0).values
    cuts[(place - begins) % longest == 0] = 1
    return cuts.cumsum(0) - 1


def span_reduce(scores: Scores, owner: Tensor, top: int) -> WindowScores:
    """Score of each span: the mean of its ``top`` best tokens, of all where it is shorter; ``[B, H, R]``.

    WindowKV's rule (arXiv 2503.17922) for spans of different lengths. ``owner`` ``[S]`` is ascending.
    """
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    owners, order = owner[by_score].sort(dim=-1, stable=True)
    lengths = torch.bincount(owner)
    place = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owners]
    best = torch.where(place < top, scores.gather(-1, by_score.gather(-1, order)), 0.0)
    sums = scores.new_zeros(*scores.shape[:-1], len(lengths)).scatter_add_(-1, owners, best)
    return sums / lengths.clamp(max=top)


def concentrated(scores: HeadScores, owner: Tensor, sinks: int, count: int) -> HeadScores:
    """The ``count`` heads whose attention falls most on one span behind the sinks, ``[1, count, C]``, in their order."""
    context = scores[0].index_fill(-1, torch.arange(min(sinks, scores.shape[-1]), device=scores.device), 0.0)
    spans = context.new_zeros(len(context), int(owner[-1]) + 1).index_add_(1, owner, context)
    best = spans.amax(-1).topk(min(count, len(spans))).indices.sort().values
    return scores[:, best]


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
