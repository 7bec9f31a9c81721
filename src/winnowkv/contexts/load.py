"""From a stored context back to a compact cache of the running model, to be forked and gone on from.

The entries' keys were moved so that what follows stands at ``n'``, ``n' + 1``, ... (flat.py). So the cache is one of a prompt
of ``n'`` tokens that holds all of them, at no positions of its own: what vLLM serves, with the same numbers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.snapshot import read_one
from winnowkv.contexts.context import Context
from winnowkv.contexts.fit import fields_difference, model_fields
from winnowkv.contexts.flat import FlatStates, context_rotation
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import CacheError
from winnowkv.models.head_group import HeadGroup
from winnowkv.report import Report


def load_context(
    store: ContextStore, context: Context | str, model: PreTrainedModel, *, like: CompactCache | None = None
) -> CompactCache:
    """A cache that goes on from a stored context; ``like`` as for :func:`context_cache`.

    Raises as :meth:`ContextStore.states` and :func:`context_cache` do.
    """
    found = context if isinstance(context, Context) else store.context(context)
    check_fit(found, model)  # before a large file is read
    return context_cache(found, store.states(found.id), model, like=like)


def context_cache(
    context: Context, states: FlatStates, model: PreTrainedModel, *, like: CompactCache | None = None
) -> CompactCache:
    """A cache whose next token stands at position ``n'``, and which holds all of the ``n'`` entries before it.

    Its report says what was kept of the document. It has no decode budget, and is no cache to save: the file is there already.

    Parameters
    ----------
    context, states: what the store holds, in any dtype; the cache has the model's.
    like: a cache into which this model has read something, which shows its layers' sizes and devices; without one the model
        reads one token.

    Raises
    ------
    CacheError
        For a context of another model, and for one that does not cover a sliding window.
    UnsupportedModelError
        For a model whose keys cannot be moved.
    """
    HeadGroup.of(model).check_alone("loading a context")
    context_rotation(model)
    check_fit(context, model)
    like = like or read_one(model)
    cache = CompactCache(model, "full", 1)
    layers: list[Any] = cache.layers
    if len(layers) != len(states.keys):
        raise CacheError(f"context {context.id}: {len(states.keys)} layers, the model has {len(layers)}")
    for index, (layer, shown) in enumerate(zip(layers, like.layers, strict=True)):
        keys, values = (part[index].transpose(0, 1)[None] for part in (states.keys, states.values))
        _fill(layer, shown, keys, values, f"context {context.id}: layer {index}", states.seen)
    cache.resume(_report(context, cache, states.seen))
    return cache


def check_fit(context: Context, model: PreTrainedModel) -> None:
    """Raise CacheError for a context of another model; weights are not compared."""
    if difference := fields_difference(context.header.model, model_fields(model.config)):
        raise CacheError(f"context {context.id} is of another model: {difference}; add the document anew")


def _fill(layer: Any, like: Any, keys: Tensor, values: Tensor, what: str, seen: int) -> None:
    """Give a layer its entries ``[1, Hkv, n', D]``; one that slides takes its last ones."""
    kept = keys.shape[2]
    for mine, theirs in ((keys, like.keys), (values, like.values)):
        if (mine.shape[1], mine.shape[3]) != (theirs.shape[1], theirs.shape[3]):
            heads, size = theirs.shape[1], theirs.shape[3]
            raise CacheError(f"{what} has {mine.shape[1]} heads of {mine.shape[3]}, the model's has {heads} of {size}")
    if not isinstance(layer, CompactLayer):
        visible = min(layer.sliding_window - 1, seen)
        if kept < visible:
            raise CacheError(f"{what} slides over {visible} tokens, the context keeps {kept} entries: add the document anew")
        keys, values = keys[:, :, kept - visible :], values[:, :, kept - visible :]
    home, dtype = like.keys.device, like.keys.dtype
    keys, values = (part.to(home, dtype, copy=True).contiguous() for part in (keys, values))
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if not isinstance(layer, CompactLayer):
        layer.cumulative_length = kept
        return
    layer.length = layer.seen = layer.prompt = kept
    layer.pads, layer.positions = [0], [None]


def _report(context: Context, cache: CompactCache, seen: int) -> Report:
    """What was kept of the document, as the header tells it."""
    layers = cache.compact_layers
    entry = sum(layer.entry_bytes for layer in layers)
    kept = context.kept * entry
    return Report(
        context.header.policy, context.header.budget, prompt_tokens=[seen], kept_entries=[[context.kept] * len(layers)],
        kept_bytes=kept, full_bytes=seen * entry, held_bytes=sum(layer.held_bytes for layer in layers), peak_bytes=kept,
    )  # fmt: skip
