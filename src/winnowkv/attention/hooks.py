"""transformers' two sockets, attention and mask, and what caches answer them.

A routed model (routing.py) calls these functions in place of its own. Keys that do not come from one of our caches, and their
masks, go on to the functions that the model had before, untouched: a plain forward pass computes the same whether the model is
routed or not, also if that changes in the middle of it.

For keys of our caches we build the mask ourselves, because layers differ in length, so that no mask of the framework can serve
them all; own.py says which function then attends. Afterwards the cache is shown the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from winnowkv.attention.own import attend_as, attend_rows, own_attention
from winnowkv.errors import InputError, UnsupportedModelError
from winnowkv.types import Keys, Padding, Queries, Valid, Values

TAG = "_winnow"  # attribute of keys and values that one of our caches returned: (cache, layer index)
ATTENDED = "_winnow_valid"  # attribute of keys that their own layer has attended to: (which entries counted then,)
OWN = "_winnow_own"  # attribute of a mask: it is the model's own, of a whole prompt
# Models may slice what the mask socket returns, which loses attributes but no dtype: no other mask has these.
PADDING = torch.uint8  # a padding mask, [B, 1, 1, tokens]
UNSERVED = torch.int8  # in place of a mask with which no compact cache can be served; some models make such and never use it
# The mask socket sees no cache, only its sizes: this offset, which no other cache reports, marks ours.
COMPACT_OFFSET = -(2**40)
SLOT_OFFSET = -(2**41)  # and this one marks slots, whose mask no 2D mask could express
BYPASSED = (
    "the keys that the cache returned did not reach our attention function: the model's attention does not go "
    "through transformers' AttentionInterface, or it rebuilds keys after the cache (latent attention)"
)
LATENT = "its cache holds latents from which keys are made anew in every pass (latent attention), and no keys"
OTHER_VALUES = "it does not attend to the values that the cache returned with the keys, but to others made of them"
NOT_CAUSAL = (
    "its mask is not plainly causal; a compact cache serves such a mask, as of images that look ahead, only for a whole prompt "
    "without padding"
)


Observer = Callable[[Queries, float], None]


class AttentionCache(Protocol):
    """What attention asks of the cache that returned its keys (:func:`tag_states`).

    One whose rows hold their entries apart has ``row_entries(layer_idx)``, too, which gives what each of them attends to.
    """

    def valid_entries(self, layer_idx: int, padding: Padding | None, added: int) -> Valid | None:
        """Which entries of a layer count, ``[B, 1 or Hkv, K]``, None if all do. Asked before attention.

        ``padding`` is the 2D mask of the forward pass, None if nothing is padded; ``added``: the newest entries.
        """

    def shared(self, layer_idx: int, by: int) -> None:
        """Layer ``by``, which keeps nothing, attends to this layer's keys as they were when it attended to them itself."""

    def observer(self, layer_idx: int) -> Observer | None:
        """Who wants to see this layer's queries and its scale after attention; None if nothing is observed."""


def tag_states(keys: Keys, values: Values, cache: AttentionCache, layer_idx: int) -> tuple[Keys, Values]:
    """Keys and values by which attention finds its cache again. They must be views: a tag must not outlive the call."""
    for states in (keys, values):
        setattr(states, TAG, (cache, layer_idx))
    return keys, values


def winnow_mask(*args: Any, base: str = "sdpa", **kwargs: Any) -> Any:
    """Mask socket of a model whose own attention is ``base``.

    For compact caches the padding mask goes through as it is. If nothing is padded there is none, but for a whole prompt that
    the model's own attention will read or that is not plainly causal, which gets the mask that the model would have made.

    Raises InputError for a 2D mask that does not cover all tokens that the cache has seen and the new ones.
    """
    make = AttentionMaskInterface().get(base)
    if kwargs.get("kv_offset") == SLOT_OFFSET:
        return None
    if kwargs.get("kv_offset") != COMPACT_OFFSET:
        if getattr(kwargs.get("config"), "num_kv_shared_layers", 0):  # layers that share keys may get the last queries only
            kwargs["allow_is_causal_skip"] = False
        return None if make is None else make(*args, **kwargs)
    causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    # Newer releases pass numbers of tokens seen and new, older ones the positions of the new ones.
    padding, places = kwargs.get("attention_mask"), kwargs.get("cache_position")
    new = int(kwargs["q_length"]) if places is None else len(places)
    if padding is not None:
        seen = int(kwargs["q_offset"] if places is None else places[0])
        if padding.shape[-1] != seen + new:
            raise InputError(
                f"attention_mask covers {padding.shape[-1]} tokens, but the cache has read {seen} and {new} come now: pass "
                f"only tokens that it has not read yet, with a mask of all {seen + new}, or none"
            )
        if not bool(padding.all()):
            return padding[:, None, None].to(PADDING) if causal else unserved()
    if kwargs["kv_length"] != new or make is None or (causal and base in ("sdpa", "eager")):
        return None if causal else unserved()
    mask = make(*args, **{**kwargs, "kv_offset": 0})
    if mask is None:
        return None if causal else unserved()
    setattr(mask, OWN, True)
    return mask


def unserved() -> Tensor:
    """In place of a mask with which no compact cache can be served: refused if a layer of one gets it."""
    return torch.empty(1, 1, 1, 1, dtype=UNSERVED)


def winnow_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    base: str = "sdpa",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention socket: ``query`` ``[B, Hq, S, D]`` after RoPE, ``key`` and ``value`` unexpanded ``[B, Hkv, K, D]``.

    ``base`` is the model's own attention, to which all keys go that no cache of ours returned.

    Raises
    ------
    InputError
        For a ready-made 4D mask beside a compact cache, which cannot follow eviction, and for attention weights.
    UnsupportedModelError
        For a mask that is not causal, for values that are not the cache's, and for attention with terms that belong to
        positions (``position_bias``).
    """
    tag, kind = getattr(key, TAG, None), getattr(attention_mask, "dtype", None)
    if kind == UNSERVED:
        refuse(module, NOT_CAUSAL)
    if tag is None:
        if kind == PADDING:  # only compact caches get such masks
            refuse(module, bypassed(module.config))
        own = own_attention(module, base)
        return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    cache: AttentionCache
    cache, layer = tag
    if getattr(value, TAG, None) is None:
        refuse(module, OTHER_VALUES)
    attended = getattr(key, ATTENDED, None)
    # A layer that shares keys may get a slice of the mask that the layer before it was served with.
    mask = None if kind == PADDING else attention_mask
    if mask is not None and attended is None and not hasattr(mask, OWN):
        raise InputError(
            "a compact cache builds its own mask: pass a 2D attention_mask [batch, tokens], left-padded; a model that makes "
            "one in its attention cannot be served"
        )
    if mask is None and query.shape[2] > 1 and not getattr(module, "is_causal", True):
        refuse(module, NOT_CAUSAL)
    if kwargs.get("output_attentions"):
        raise InputError(
            "output_attentions=True: a compact cache returns no attention weights; leave it out, or read the prompt without one"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    observe = None
    if attended is None:
        padding = attention_mask[:, 0, 0].bool() if kind == PADDING else None
        attended = (cache.valid_entries(layer, padding, query.shape[2]),)
        setattr(key, ATTENDED, attended)
        observe = cache.observer(layer)
    else:
        cache.shared(layer, getattr(module, "layer_idx", layer))
    if hasattr(cache, "row_entries"):
        output = attend_rows(base, module, query, cache.row_entries(layer), scale, dropout, **kwargs)
    else:
        output = attend_as(base, module, query, key, value, scale, attended[0], dropout, mask=mask, **kwargs)
    if observe is not None:
        observe(query, scale)
    return NoGradient.apply(output) if output.requires_grad else output, None


def bypassed(config: Any) -> str:
    """Why the keys of a cache did not come back, as far as a model's config tells."""
    return LATENT if getattr(config, "kv_lora_rank", None) else BYPASSED


def refuse(module: nn.Module, reason: str) -> NoReturn:
    """Raise UnsupportedModelError for an attention module."""
    raise UnsupportedModelError(f"{type(module).__name__}: {reason}")


class NoGradient(torch.autograd.Function):
    """Passes attention's output on and refuses to go back through it: keys and values in a cache have no gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        """The output as it is."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raise InputError, rather than give gradients that lack the way through keys and values."""
        raise InputError(
            "no gradients through a compact cache: keys and values of the prompt are stored without them; train with "
            "use_cache=False and outside the compress block"
        )
