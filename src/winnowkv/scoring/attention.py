"""Importance of prompt tokens: pure functions on tensors. Axes: see :mod:`winnowkv.types`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from winnowkv.models.head_group import ALL_HEADS, HeadGroup
from winnowkv.types import HeadScores, Keys, Queries, Scores

PoolKind = Literal["avg", "max"]
GroupKind = Literal["mean", "max"]
TILE_LOGITS = 1 << 21  # logits of a tile, 8 MB in float32: half of it costs a fifth more, twice gains nothing
TILE_LOGITS_CUDA = 1 << 24  # where starting a kernel costs more than memory
# Keys from which ``half`` holds. How many queries a shorter prompt gives depends on its question, and the framework keeps
# 0.6 MB of kernels for every shape of a product in bfloat16, none in float32, which is about as fast there.
HALF_PRECISION_KEYS = 512


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled: the package comes with torch for CUDA."""
    return importlib.util.find_spec("triton") is not None


def fused(keys: Keys) -> bool:
    """Whether :mod:`winnowkv.scoring.kernels` serves these keys: on CUDA, in 16 bits. In 32 the functions here are as exact.

    Triton wants a card that multiplies bfloat16 (compute capability 8); older ones do without.
    """
    if not keys.is_cuda or keys.dtype not in (torch.bfloat16, torch.float16) or not has_triton():
        return False
    return torch.cuda.get_device_capability(keys.device)[0] >= 8


def causal_attention(queries: Queries, keys: Keys, scale: float) -> Float[Tensor, "B Hq W S"]:
    """Attention probabilities of the newest ``W`` queries over all ``S`` keys, causal, float32; KV heads are not expanded."""
    batch, heads, window, size = queries.shape
    kv_heads, tokens = keys.shape[1], keys.shape[2]
    grouped = queries.float().reshape(batch, kv_heads, -1, size) * scale
    logits = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, window, tokens)
    return hide_future(logits, window, 0).softmax(-1)


def hide_future(logits: Tensor, window: int, begin: int) -> Tensor:
    """Logits ``[..., w, S]`` of the last ``window`` queries from the ``begin``-th on; later keys get the least, in place."""
    future = torch.ones(logits.shape[-2], window, dtype=torch.bool, device=logits.device).triu(begin + 1)
    logits[..., logits.shape[-1] - window :].masked_fill_(future, torch.finfo(logits.dtype).min)
    return logits


def tiles(queries: Queries, keys: Keys, scale: float, *, half: bool = False) -> Iterator[tuple[int, slice, int, Tensor]]:
    """Logits in float32 a tile at a time, as ``(row, query heads, first query, logits [heads, w, S])``.

    A tile is one head's or a few heads' of one KV head, whole or some queries of it: no map of more than :data:`TILE_LOGITS`
    logits (on an accelerator :data:`TILE_LOGITS_CUDA`), or of one query, exists at once. The next tile overwrites it.
    ``half`` multiplies in bfloat16 if the keys are of that kind and at least :data:`HALF_PRECISION_KEYS`; logits then have 8
    bits.
    """
    queries, keys = queries.detach(), keys.detach()  # buffers have no gradient
    batch, heads, window, _ = queries.shape
    kv_heads, tokens = keys.shape[1], keys.shape[2]
    group, fit = heads // kv_heads, max((TILE_LOGITS if keys.device.type == "cpu" else TILE_LOGITS_CUDA) // max(tokens, 1), 1)
    several, some = min(max(fit // window, 1), group), min(fit, window)
    kind = keys.dtype if half and keys.dtype == torch.bfloat16 and tokens >= HALF_PRECISION_KEYS else torch.float32
    # Buffers, because fresh memory costs more than what is done in it.
    buffer = torch.empty(several * some, tokens, device=keys.device)
    product = buffer if kind == torch.float32 else torch.empty_like(buffer, dtype=kind)
    for row in range(batch):
        for kv in range(kv_heads):
            columns, last = keys[row, kv].to(kind).t(), (kv + 1) * group
            for head in range(kv * group, last, several):
                mine = slice(head, min(head + several, last))
                asking = (queries[row, mine].float() * scale).to(kind)
                for begin in range(0, window, some):
                    now = asking[:, begin : begin + some]
                    logits, made = (part[: now.shape[0] * now.shape[1]] for part in (buffer, product))
                    torch.mm(now.flatten(0, 1), columns, out=made)
                    if made.dtype != logits.dtype:
                        logits.copy_(made)
                    yield row, mine, begin, logits.view(*now.shape[:2], tokens)


def window_attention(queries: Queries, keys: Keys, scale: float) -> HeadScores:
    """Attention that each context token gets from the last ``W`` queries, summed over them, ``[B, Hq, C]``.

    The ``C = S - W`` context columns of a causal softmax over all ``S`` keys. Source: SnapKV (arXiv 2404.14469).
    """
    return received(queries, keys, scale)[..., : keys.shape[2] - queries.shape[2]]


def received(queries: Queries, keys: Keys, scale: float) -> HeadScores:
    """Attention that each token gets from the last ``W`` queries, causal, summed over them, ``[B, Hq, S]``."""
    if fused(keys):
        from winnowkv.scoring import kernels

        return kernels.received(queries, keys, scale)
    total = torch.zeros(*queries.shape[:2], keys.shape[2], device=keys.device)
    for row, heads, begin, logits in tiles(queries, keys, scale):
        hide_future(logits, queries.shape[2], begin)
        total[row, heads].add_(torch.softmax(logits, -1, out=logits).sum(-2))
    return total


def accumulated_attention(queries: Queries, keys: Keys, scale: float, block: int = 256) -> HeadScores:
    """Attention that each token gets from every query of the prompt (``W = S``), summed, ``[B, Hq, S]``.

    ``block`` queries at a time over the keys that they can see. Source: H2O (arXiv 2306.14048).
    """
    batch, heads, tokens, _ = queries.shape
    total = torch.zeros(batch, heads, tokens, device=keys.device)
    keys = keys if fused(keys) else keys.float()  # once, not for every block
    for begin in range(0, tokens, block):
        end = min(begin + block, tokens)
        total[..., :end] += received(queries[:, :, begin:end], keys[:, :, :end], scale)
    return total


def group_reduce(scores: HeadScores, kv_heads: int, how: GroupKind = "mean") -> Scores:
    """Query-head scores to KV-head scores ``[B, Hkv, C]``: mean (or max) over each GQA group."""
    grouped: Tensor = scores.unflatten(1, (kv_heads, -1))
    return grouped.mean(2) if how == "mean" else grouped.amax(2)


def some_heads_attention(
    queries: Queries, keys: Keys, scale: float, heads: Sequence[int], group: HeadGroup = ALL_HEADS
) -> HeadScores:
    """:func:`window_attention` of a few query heads only, ``[B, len(heads), C]``.

    ``heads`` are the model's, queries and keys those of this process of the ``group``.
    """
    count = queries.shape[1]
    if len(heads) == count * group.size:
        every = group.whole(window_attention(queries, keys, scale))
        return every if list(heads) == sorted(heads) else every[:, list(heads)]
    here = [(place, head - group.rank * count) for place, head in enumerate(heads) if head // count == group.rank]
    members = count // keys.shape[1]
    mine = [head for _, head in here]
    found = window_attention(queries[:, mine], keys[:, [head // members for head in mine]], scale) if mine else None
    if group.size == 1 and found is not None:
        return found
    every = torch.zeros(len(queries), len(heads), keys.shape[2] - queries.shape[2], device=keys.device)
    if found is not None:
        every[:, [place for place, _ in here]] = found
    return group.total(every)  # each head has one owner: nothing is added to it


def group_members(scores: HeadScores, heads: Sequence[int], query_heads: int, kv_heads: int) -> Scores:
    """Scores of some query heads to KV-head scores ``[B, Hkv, C]``: the mean of a group's own, of all if it has none."""
    owner = torch.tensor(heads, device=scores.device) // (query_heads // kv_heads)
    rows = [scores[:, owner == kv] if bool((owner == kv).any()) else scores for kv in range(kv_heads)]
    return torch.stack([row.mean(1) for row in rows], dim=1)


def moments(
    queries: Queries, keys: Keys, scale: float, context: int, *, causal: bool, half: bool = False, every: int = 1
) -> tuple[HeadScores, HeadScores, Tensor]:
    """Mean and mean square over the queries of the attention on the first ``context`` keys, ``[B, Hq, context]``; its entropy.

    The entropy ``-p log p`` is summed over everything, or taken from ``every``-th query and multiplied up. ``causal``: the
    queries are the last ones, else they stand after all keys. A tile at a time (:func:`tiles`, whose ``half`` this is).
    """
    count = queries.shape[2]
    share = len(range(0, count, every)) / count
    if fused(keys):
        from winnowkv.scoring import kernels

        mean, square, spread = kernels.moments(queries, keys, scale, causal=causal, every=every)
        entropy = spread[..., :context].sum()
        return mean[..., :context] / count, square[..., :context] / count, entropy.clamp(min=0) / share
    mean, square = torch.zeros(2, *queries.shape[:2], keys.shape[2], device=keys.device)
    entropy = torch.zeros((), device=keys.device)
    for row, heads, begin, logits in tiles(queries, keys, scale, half=half):
        if causal:
            hide_future(logits, count, begin)
        some = slice(-begin % every, None, every)
        asked = logits[:, some].clone()  # what follows is done in place: less memory is faster memory
        attention = torch.softmax(logits, -1, out=logits)
        given = attention[:, some]
        # log p is the logit less the query's normalizer: no logarithm of every probability.
        normalizer = asked.amax(-1) - given.amax(-1).log()
        asked, given = asked[..., :context], given[..., :context]
        entropy += (normalizer * given.sum(-1)).sum() - asked.mul_(given).sum()
        ones = attention.new_ones(attention.shape[-2])
        mean[row, heads] += ones @ attention
        square[row, heads] += ones @ attention.square_()
    return mean[..., :context] / count, square[..., :context] / count, entropy.clamp(min=0) / share


def heard_attention(
    queries: Queries, keys: Keys, scale: float, context: int, heads: int, group: HeadGroup = ALL_HEADS
) -> HeadScores:
    """Attention of queries that stand after all ``S`` keys on the first ``context``, root mean square over them.

    ``[B, heads, context]``: ``heads`` are this process's query heads, or its KV heads for the mean over each GQA group; the
    result is of all heads of the ``group``.
    """
    _, square, _ = moments(queries, keys, scale, context, causal=False, half=True, every=queries.shape[2])
    found = square.sqrt()
    return group.whole(found if heads == queries.shape[1] else group_reduce(found, heads))


def expected_attention(
    queries: Queries,
    keys: Keys,
    scale: float,
    context: int,
    group: HeadGroup = ALL_HEADS,
    *,
    heard: Queries | None = None,
    weight: float = 0.0,
) -> tuple[Scores, Tensor]:
    """Attention of queries that stand after all ``S`` keys on the first ``context`` of them, and the layer's preference.

    Per token the root mean square over the queries, mean over each GQA group, ``[B, Hkv, context]``: a token that few
    queries need much counts more than one that all need a little. The preference is entropy times
    variance (CAKE, arXiv 2503.12491), its entropy from every fourth query: it tells layers apart, and those differ by far more
    than a quarter's sampling. Both are of all heads of the ``group``, of which queries and keys are this process's.
    ``heard``: queries of another kind, whose mean square counts by ``weight`` and that of ``queries`` by the rest.
    """
    mean, square, entropy = moments(queries, keys, scale, context, causal=False, half=True, every=4)
    if heard is not None:
        theirs = moments(heard, keys, scale, context, causal=False, half=True, every=4)
        entropy, more = entropy / queries.shape[2], theirs[2] / heard.shape[2]
        mean, square, entropy = (
            mine * (1 - weight) + other * weight
            for mine, other in zip((mean, square, entropy), (*theirs[:2], more), strict=True)
        )
    entropy, variance = group.total(torch.stack([entropy, (square - mean.square()).sum().clamp(min=0)]))
    return group.whole(group_reduce(square.sqrt(), keys.shape[1])), entropy * variance


def worst_case_attention(queries: Queries, keys: Keys, scale: float, context: int, kernel: int) -> Scores:
    """The most attention that a query of the window and of the group pays, but at least its mean over tokens, ``[1, Hkv, C]``.

    Each query's attention is averaged over ``kernel`` neighbours and keeps its sum; one KV head at a time.
    Source: DefensiveKV (arXiv 2510.13334).
    """
    worst = []
    for kv, asking in enumerate(queries.chunk(keys.shape[1], 1)):
        attention = causal_attention(asking, keys[:, kv : kv + 1], scale)[..., :context].flatten(1, 2)
        smooth = pool(attention, kernel, "avg")
        smooth = smooth * (attention.sum(-1, keepdim=True) / smooth.sum(-1, keepdim=True).clamp(min=1e-30))
        most = smooth.amax(1, keepdim=True)
        worst.append(most.clamp(min=most.mean(-1, keepdim=True)))
    return torch.cat(worst, 1)


def totals(scores: Sequence[Scores]) -> list[float]:
    """The sum of each layer's scores."""
    if scores[0].is_cuda and len({layer.shape for layer in scores}) == 1:  # one wait and two kernels for all of them
        return torch.stack(list(scores)).flatten(1).sum(1).tolist()
    return [float(layer.sum()) for layer in scores]


def pool(scores: Scores, kernel: int, kind: PoolKind) -> Scores:
    """Smooth along the tokens so that neighbours of a peak stay too. ``kernel`` is odd; 1 changes nothing.

    As in the published code, the average divides by the whole kernel at the edges
    (zero padding) and the maximum ignores padding.
    """
    if kernel == 1:
        return scores
    smooth = F.avg_pool1d if kind == "avg" else F.max_pool1d
    return smooth(scores, kernel, stride=1, padding=kernel // 2)
