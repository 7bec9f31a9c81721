"""Several caches as one batch, so that the same forward pass reads several tokens into each of them.

Rows keep their own logical lengths: whoever goes on with a stacked cache passes ``position_ids``,
and :func:`row_mask` as ``attention_mask`` (:func:`winnowkv.cache.reading.extend` does both).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.looking import check_chosen
from winnowkv.cache.other_layers import shares_keys
from winnowkv.errors import CacheError


def stack(caches: Sequence[CompactCache]) -> CompactCache:
    """One cache whose rows are the rows of ``caches``, in order; the caches themselves stay as they are.

    Rows that hold fewer entries than the longest are right-aligned. Quantized entries are stacked
    as they read, in full precision: what a request holds is in its own cache's report.
    Raises CacheError for no cache, caches of several models or decode budgets, one with a decode budget
    that has generated already, one that still holds its whole prompt to choose from, and layers of another kind.
    """
    if not caches:
        raise CacheError("no cache was given to stack: give at least one")
    model = caches[0].model
    if any(cache.model is not model for cache in caches):
        raise CacheError("the caches belong to several models: stack those of one model")
    for cache in caches:
        check_chosen(cache, "stacked")
    limits = [cache.decode_budget for cache in caches]
    if len(set(limits)) > 1:
        raise CacheError(f"the caches have several decode budgets ({', '.join(map(str, limits))}): stack those of one")
    if limits[0] is not None and any(cache.compact_layers[0].seen > cache.compact_layers[0].prompt for cache in caches):
        raise CacheError("rows with a decode budget evict after equally many tokens: stack before the first is generated")
    stacked = CompactCache(model, "full", 1, decode_budget=limits[0])
    for mine, theirs in zip(stacked.compact_layers, caches[0].compact_layers, strict=True):
        mine.decode_eviction = theirs.decode_eviction
    stacked.resume(stacked.report)
    for index, layer in enumerate(stacked.layers):
        parts: list[Any] = [cache.layers[index] for cache in caches]
        if isinstance(layer, CompactLayer):
            fill(layer, parts)
        elif layer in stacked.sliding_layers:
            slide(layer, parts)
        elif not shares_keys(layer):
            raise CacheError(f"only full attention and sliding windows can be stacked, not a {type(layer).__name__}")
    return stacked


def slide(layer: Any, parts: Sequence[Any]) -> None:
    """Fill an empty sliding-window layer with the windows of others, row after row, the last tokens side by side."""
    width = max(part.keys.shape[2] for part in parts)
    layer.update(aligned([part.keys for part in parts], width), aligned([part.values for part in parts], width))
    layer.cumulative_length = max(part.cumulative_length for part in parts)


def row_mask(cache: CompactCache, positions: Sequence[int], added: int, device: torch.device) -> Tensor | None:
    """Which of a cache's tokens each row has, ``[B, seen + added]``, if a row does not fill a sliding window; else None.

    ``positions``: tokens that each row has seen before the ``added`` ones.
    """
    window, seen = max((layer.sliding_window for layer in cache.sliding_layers), default=0), cache.get_seq_length()
    if min(positions) >= min(seen, window - 1):
        return None
    missing = torch.tensor([seen - tokens for tokens in positions], device=device)
    return torch.arange(seen + added, device=device) >= missing[:, None]


def fill(layer: CompactLayer, parts: Sequence[CompactLayer]) -> None:
    """Fill an empty layer with the entries of others, row after row."""
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
