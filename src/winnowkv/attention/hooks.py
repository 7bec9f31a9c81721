"""Routing a model's attention through ours: transformers' attention and mask sockets, and what caches answer them.

Our function builds its own mask (layers differ in length, so no mask of the framework can serve them all), calls torch's
scaled dot product attention, and shows the queries to the cache. Keys that do not come from one of our caches go to
transformers' own SDPA function untouched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from winnowkv.attention.sdpa import attend
from winnowkv.errors import InputError, UnsupportedModelError
from winnowkv.types import Keys, Padding, Queries, Valid

NAME = "winnow"  # our key in transformers' two registries
TAG = "_winnow"  # attribute of keys that one of our caches returned: (cache, layer index)
# The mask socket sees no cache, only its sizes: this offset, which no other cache reports, marks ours.
COMPACT_OFFSET = -(2**40)
SLOT_OFFSET = -(2**41)  # and this one marks slots, whose mask no 2D mask could express
ROUTING = "_winnow_routing"  # attribute of a routed model; gone once it is not needed any more
EXTRAS = ("softcap", "s_aux", "sinks", "position_bias")  # terms that plain SDPA does not compute
BYPASSED = (
    "the keys that the cache returned did not reach our attention function: the model's attention does not go "
    "through transformers' AttentionInterface, or it rebuilds keys after the cache (latent attention)"
)


Observer = Callable[[Queries, float], None]

_lock = threading.Lock()


class AttentionCache(Protocol):
    """What attention asks of the cache that returned its keys (:func:`tag_keys`)."""

    def valid_entries(self, layer_idx: int, padding: Padding | None, added: int) -> Valid | None:
        """Which entries of a layer count, ``[B, 1 or Hkv, K]``, None if all do. Asked before attention.

        ``padding`` is the 2D mask of the forward pass, None if nothing is padded; ``added``: the newest entries.
        """

    def observer(self, layer_idx: int) -> Observer | None:
        """Who wants to see this layer's queries and its scale after attention; None if nothing is observed."""


def tag_keys(keys: Keys, cache: AttentionCache, layer_idx: int) -> Keys:
    """Keys by which attention finds its way back to their cache. They must be a view: a tag must not outlive the call."""
    setattr(keys, TAG, (cache, layer_idx))
    return keys


def winnow_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask socket. For compact caches the 2D padding mask goes through as it is (None if nothing is padded)."""
    if kwargs.get("kv_offset") == SLOT_OFFSET:
        return None
    if kwargs.get("kv_offset") != COMPACT_OFFSET:
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UnsupportedModelError("this model's full-attention layers use a mask that is not plainly causal")
    padding = kwargs.get("attention_mask")
    return None if padding is None or bool(padding.all()) else padding


def winnow_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention socket: ``query`` ``[B, Hq, S, D]`` after RoPE, ``key`` and ``value`` unexpanded ``[B, Hkv, K, D]``.

    Raises
    ------
    InputError
        For a ready-made 4D mask beside a compact cache, which cannot follow eviction.
    UnsupportedModelError
        For attention with terms that SDPA does not compute (softcap, learned sinks).
    """
    for extra in EXTRAS:
        if kwargs.get(extra) is not None:
            raise UnsupportedModelError(f"{type(module).__name__}: attention with {extra!r} is not supported yet")
    tag = getattr(key, TAG, None)
    if tag is None:
        if attention_mask is not None and attention_mask.ndim == 2:  # only compact caches get 2D masks
            raise UnsupportedModelError(f"{type(module).__name__}: {BYPASSED}")
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    cache: AttentionCache
    cache, layer = tag
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError("a compact cache builds its own mask: pass a 2D attention_mask [batch, tokens], left-padded")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    valid = cache.valid_entries(layer, attention_mask, query.shape[2])
    output = attend(query, key, value, scale, valid, dropout)
    if (observe := cache.observer(layer)) is not None:
        observe(query, scale)
    return output.transpose(1, 2).contiguous(), None


@dataclass
class Routing:
    """How a model was before, how many need it routed, and the compress blocks open on it, innermost last."""

    before: str
    holders: int = 0
    runs: list[Any] = field(default_factory=list)


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model that compact caches cannot serve."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{kind} is not a transformers model (PreTrainedModel)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder model; only decoder-only models are supported")


def acquire(model: PreTrainedModel) -> Routing:
    """Route the model's attention through ours until :func:`release` was called as often. Thread-safe."""
    check_model(model)
    with _lock:
        held: Routing | None = getattr(model, ROUTING, None)
        if held is None:
            AttentionInterface.register(NAME, winnow_attention)
            AttentionMaskInterface.register(NAME, winnow_mask)
            held = Routing(before=model.config._attn_implementation)
            model.set_attn_implementation(NAME)
            if model.config._attn_implementation != NAME:
                raise UnsupportedModelError(
                    f"the attention of {type(model).__name__} does not go through transformers' AttentionInterface"
                )
            setattr(model, ROUTING, held)
        held.holders += 1
        return held


def is_routed(model: PreTrainedModel | None) -> bool:
    """Whether the model's attention goes through ours now."""
    return getattr(model, ROUTING, None) is not None


def release(model: PreTrainedModel) -> None:
    """Give one hold back; the last one puts the model's attention back as it was."""
    with _lock:
        held: Routing = getattr(model, ROUTING)
        held.holders -= 1
        if held.holders == 0:
            model.set_attn_implementation(held.before)
            delattr(model, ROUTING)
