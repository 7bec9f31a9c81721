"""Several caches as one batch, so that requests, or settings of one request, decode together.

Rows keep their own logical lengths: whoever goes on with a stacked cache passes
``position_ids`` (:func:`winnowkv.engine.extend` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnowkv.cache import CompactCache
from winnowkv.errors import CacheError
from winnowkv.layer import CompactLayer


def stack(caches: Sequence[CompactCache]) -> CompactCache:
    """One cache whose rows are the rows of ``caches``, in order; the caches themselves stay as they are.

    Rows that hold fewer entries than the longest are right-aligned. Quantized entries are stacked
    as they read, in full precision: what a request holds is in its own cache's report.
    Raises CacheError for no cache, caches of several models, or a model with sliding-window
    layers whose rows have seen different numbers of tokens.
    """
    if not caches:
        raise CacheError("no cache was given to stack: give at least one")
    model = caches[0].model
    if any(cache.model is not model for cache in caches):
        raise CacheError("the caches belong to several models: stack those of one model")
    stacked = CompactCache(model, "full", 1)
    stacked.resume(stacked.report)
    for index, layer in enumerate(stacked.layers):
        parts: list[Any] = [cache.layers[index] for cache in caches]
        if isinstance(layer, CompactLayer):
            fill(layer, parts)
        else:
            slide(layer, parts)
    return stacked


def slide(layer: Any, parts: Sequence[Any]) -> None:
    """Fill a sliding-window layer, which the framework made, with the windows of others."""
    if len({part.keys.shape[1:] for part in parts}) > 1:
        raise CacheError("a layer slides over its window: stack only rows that have seen the same number of tokens")
    layer.update(torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts]))
    layer.cumulative_length = parts[0].cumulative_length


def fill(layer: CompactLayer, parts: Sequence[CompactLayer]) -> None:
    """Fill an empty layer with the entries of others, row behind row."""
    width = max(part.length for part in parts)
    keys, values = zip(*(part.entries_in_use() for part in parts), strict=True)
    layer.lazy_initialization(aligned(keys, width), aligned(values, width))
    layer.length, layer.seen, layer.prompt = width, max(p.seen for p in parts), max(p.prompt for p in parts)
    layer.pads = [layer.prompt - part.prompt + pad for part in parts for pad in part.pads]
    layer.positions = [positions for part in parts for positions in part.positions]
    if any(part.valid is not None or part.length < width for part in parts):
        layer.valid = aligned_flags(parts, width)


def aligned(states: Sequence[Tensor], width: int) -> Tensor:
    """Keys or values ``[b, Hkv, k, D]`` of each part as one ``[B, Hkv, width, D]``, right-aligned, zero in front."""
    rows, (_, heads, _, size) = sum(len(part) for part in states), states[0].shape
    out = states[0].new_zeros(rows, heads, width, size)
    begin = 0
    for part in states:
        out[begin : begin + len(part), :, width - part.shape[2] :] = part
        begin += len(part)
    return out


def aligned_flags(parts: Sequence[CompactLayer], width: int) -> Tensor:
    """Which of the aligned entries count, ``[B, 1 or Hkv, width]``."""
    flags = [
        torch.ones(len(part.pads), 1, part.length, dtype=torch.bool, device=part.keys.device)
        if part.valid is None
        else part.valid[..., : part.length]
        for part in parts
    ]
    heads = max(flag.shape[1] for flag in flags)
    padded = [torch.nn.functional.pad(flag, (width - flag.shape[2], 0)).expand(-1, heads, -1) for flag in flags]
    return torch.cat(padded)
