"""Forks of a cache whose prompt is read: each goes on by itself, and they share storage until they are written to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.looking import check_chosen
from winnowkv.cache.other_layers import fork_layer
from winnowkv.cache.reports import report_decode
from winnowkv.errors import CacheError


def fork(cache: CompactCache, decode_budget: int | None = None) -> CompactCache:
    """A cache that goes on from where this one stands; neither sees what the other one reads.

    What both hold is stored once until one of them reads more: that one then gets a buffer of its own (what is quantized stays
    shared for good). ``held_bytes`` of each counts what it uses, shared or not; :func:`stored_bytes` counts it once.
    The report is a copy, its tokens after the prompt are counted from here on. ``decode_budget``: of the fork, in place of the
    cache's, from the next token on; None for the cache's.

    Raises CacheError before a prompt was read, and while it is held whole for its answer's first tokens.
    """
    if cache.session is not None:
        raise CacheError("nothing was read into this cache yet, or not all of it: read a prompt, then fork")
    check_chosen(cache, "forked")
    asked = cache.compression
    limit = cache.decode_budget if decode_budget is None else decode_budget
    settings: dict[str, Any] = {"task": asked.tasks, "decode_budget": limit, "keep": asked.keep}
    other = CompactCache(cache.model, asked.policy, asked.budget, **settings)
    report = replace(cache.report)
    report_decode(report, 0, report.decode_entries, 0.0)
    other.resume(report)
    for index, layer in enumerate(cache.layers):
        other.layers[index] = fork_layer(layer)
    for layer in other.compact_layers:
        layer.decode_budget = limit
    return other


def stored_bytes(caches: Iterable[CompactCache]) -> int:
    """Storage of keys and values of the compressed layers of several caches, what they share counted once."""
    parts = (part for cache in caches for layer in cache.compact_layers if layer.is_initialized for part in tensors(layer))
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


def tensors(layer: CompactLayer) -> list[Tensor]:
    """What :attr:`CompactLayer.held_bytes` counts."""
    frozen = [tensor for part in layer.quantized for tensor in (part.codes, part.scales, part.zeros)]
    return [layer.keys, layer.values, *frozen, *([] if layer.queries is None else [layer.queries])]
