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

from winnowkv.attention.own import attend_as, own_attention
from winnowkv.errors import InputError, UnsupportedModelError
from winnowkv.types import Keys, Padding, Queries, Valid

TAG = "_winnow"  # attribute of keys that one of our caches returned: (cache, layer index)
MARK = "_winnow_mask"  # attribute of a mask: OWN, or why no compact cache can be served with it
OWN = "the model's own mask of a whole prompt"
# The mask socket sees no cache, only its sizes: this offset, which no other cache reports, marks ours.
COMPACT_OFFSET = -(2**40)
SLOT_OFFSET = -(2**41)  # and this one marks slots, whose mask no 2D mask could express
BYPASSED = (
    "the keys that the cache returned did not reach our attention function: the model's attention does not go "
    "through transformers' AttentionInterface, or it rebuilds keys after the cache (latent attention)"
)
NOT_CAUSAL = "this model's full-attention layers use a mask that is not plainly causal"


Observer = Callable[[Queries, float], None]


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


def winnow_mask(*args: Any, base: str = "sdpa", **kwargs: Any) -> Any:
    """Mask socket of a model whose own attention is ``base``.

    For compact caches the 2D padding mask goes through as it is. If nothing is padded there is none, but for a whole prompt
    that the model's own attention will read, which gets the mask that the model would have made.

    Raises InputError for a 2D mask that does not cover all tokens that the cache has seen and the new ones.
    """
    make = AttentionMaskInterface().get(base)
    if kwargs.get("kv_offset") == SLOT_OFFSET:
        return None
    if kwargs.get("kv_offset") != COMPACT_OFFSET:
        return None if make is None else make(*args, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        return marked(torch.empty(0), NOT_CAUSAL)  # some models make such a mask and never use it
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
            return padding
    if kwargs["kv_length"] != new or make is None or base in ("sdpa", "eager"):
        return None
    mask = make(*args, **{**kwargs, "kv_offset": 0})
    return mask if mask is None else marked(mask, OWN)


def marked(mask: Any, mark: str) -> Any:
    """A mask that says in our attention function what it is."""
    setattr(mask, MARK, mark)
    return mask


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
        For a mask that is not causal, and for attention with terms that belong to positions (``position_bias``).
    """
    tag = getattr(key, TAG, None)
    if tag is None:
        if isinstance(attention_mask, Tensor) and attention_mask.ndim < 3:  # only compact caches get such masks
            refuse(module, getattr(attention_mask, MARK, BYPASSED))
        own = own_attention(module, base)
        return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    cache: AttentionCache
    cache, layer = tag
    mark = getattr(attention_mask, MARK, None)
    if mark is not None and mark != OWN:
        refuse(module, mark)
    if mark is None and attention_mask is not None and attention_mask.ndim != 2:
        raise InputError("a compact cache builds its own mask: pass a 2D attention_mask [batch, tokens], left-padded")
    if kwargs.get("output_attentions"):
        raise InputError(
            "output_attentions=True: a compact cache returns no attention weights; leave it out, or read the prompt without one"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    valid = cache.valid_entries(layer, None if mark == OWN else attention_mask, query.shape[2])
    mask = attention_mask if mark == OWN else None
    output = attend_as(base, module, query, key, value, scale, valid, dropout, mask=mask, **kwargs)
    if (observe := cache.observer(layer)) is not None:
        observe(query, scale)
    return NoGradient.apply(output) if output.requires_grad else output, None


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
