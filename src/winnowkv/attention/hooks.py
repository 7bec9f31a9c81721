"""The attention function: transformers' attention and mask sockets. Only this file and cache.py know its internals.

Our function observes, builds its own mask (layers differ in length, so no mask of the
framework can serve them all) and calls torch's scaled dot product attention. Keys that do
not come from a compact cache go to transformers' own SDPA function untouched.
"""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from winnowkv.errors import InputError, UnsupportedModelError
from winnowkv.models.info import Fingerprint
from winnowkv.models.rope import Rotation
from winnowkv.types import Valid

NAME = "winnow"  # our key in transformers' two registries
TAG = "_winnow"  # attribute of a compact cache's keys: (cache, layer index)
# The mask socket sees no cache, only its sizes: this offset, which no other cache reports, marks ours.
COMPACT_OFFSET = -(2**40)
SLOT_OFFSET = -(2**41)  # and this one slots, whose mask no 2D mask could say
QUERY_BLOCK = 256  # queries of a prompt's later chunk that attend at once: no mask is larger than [G * 256, K]
ROUTING = "_winnow_routing"  # attribute of a routed model; gone when nobody needs it any more
EXTRAS = ("softcap", "s_aux", "sinks", "position_bias")  # terms that plain SDPA does not compute
UNTURNED = ("no_rope_layers", "no_rope_layer_interval")  # options of configs in which some layers know no positions
LATENT = ("qk_rope_head_dim",)  # of configs that turn the last dimensions of a head
LOCAL = ("cohere2", "exaone4", "exaone_moe", "afmoe")  # kinds of models of which only layers that slide know positions
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")  # what models call the projection behind the heads
BYPASSED = (
    "the keys that the cache returned did not reach our attention function: the model's attention does not go "
    "through transformers' AttentionInterface, or it rebuilds keys behind the cache (latent attention)"
)

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # for any number of entries

_lock = threading.Lock()


def winnow_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask socket. For compact caches the 2D padding mask goes through as it is (None where nothing is padded)."""
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
    cache, layer = tag
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError("a compact cache builds its own mask: pass a 2D attention_mask [batch, tokens], left-padded")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    valid = cache.validity(layer, attention_mask, query.shape[2])
    output = attend(query, key, value, scale, valid, dropout)
    cache.observe(layer, query, scale)
    return output.transpose(1, 2).contiguous(), None


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, valid: Valid | None = None, dropout: float = 0.0) -> Tensor:
    """Causal attention of the newest ``q`` tokens over all ``K`` entries, ``[B, Hq, q, D]``.

    The last ``q`` entries are the queries' own; ``valid`` ``[B, 1 or Hkv, K]`` says which entries count.
    Short queries are packed as ``[B, Hkv, G * q, D]``, so that KV heads need not be repeated:
    on the CPU that is six times faster at one query and 3,000 entries.
    """
    batch, heads, queries, size = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    prompt, group = queries == entries, heads // kv_heads
    if queries > QUERY_BLOCK and not prompt:
        parts = []
        for begin in range(0, queries, QUERY_BLOCK):  # each block over the keys that it can see
            end = min(begin + QUERY_BLOCK, queries)
            seen = slice(entries - queries + end)
            counts = None if valid is None else valid[..., seen]
            parts.append(attend(query[:, :, begin:end], key[:, :, seen], value[:, :, seen], scale, counts, dropout))
        return torch.cat(parts, 2)
    mask = None if valid is None else valid[:, :, None, :]
    if queries > 1 and not (prompt and valid is None):  # a prompt without padding needs no mask, only is_causal
        causal_mask = torch.ones(queries, entries, dtype=torch.bool, device=key.device).tril(entries - queries)
        mask = causal_mask[None, None] if mask is None else mask & causal_mask
        if valid is not None:
            # A padded query sees no entry at all; let it see itself, or its output is not a number.
            mask = mask | torch.ones_like(causal_mask).triu(entries - queries) & causal_mask
    if prompt:
        causal = queries > 1 and mask is None
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=group > 1)
    packed = query.reshape(batch, kv_heads, group * queries, size)
    if mask is not None and queries > 1:
        mask = mask.repeat(1, 1, group, 1)
    with any_length(key):
        output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return output.reshape(batch, heads, queries, value.shape[-1])


def any_length(key: Tensor) -> AbstractContextManager[None]:
    """On CUDA, leave cuDNN's attention out: it plans anew for every number of entries, for 3 ms, and each step has one more.

    Measured on an H200 with torch 2.11, which asks cuDNN first (docs/log.md). Compiled steps have few shapes.
    """
    if not key.is_cuda or torch.compiler.is_compiling():
        return nullcontext()
    return sdpa_kernel(KERNELS)


def output_projections(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The projection behind the heads of each attention block, by layer index.

    Raises UnsupportedModelError where a model names it in a way that we do not know.
    """
    found = {}
    for block in model.modules():
        index = getattr(block, "layer_idx", None)
        projection = next((getattr(block, name) for name in PROJECTIONS if hasattr(block, name)), None)
        if isinstance(index, int) and projection is not None:
            found[index] = projection
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its attention blocks have no output projection (looked for {', '.join(PROJECTIONS)})"
        )
    return found


def read_rotation(model: PreTrainedModel) -> Rotation | None:
    """How all full-attention layers turn queries and keys by their position; None where they do not, or we cannot tell."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in LOCAL or any(getattr(config, name, None) for name in (*UNTURNED, *LATENT)):
        return None
    for module in model.get_decoder().modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        # Models whose sliding layers turn otherwise name the frequencies by the kind of layer.
        found = getattr(module, "full_attention_inv_freq", getattr(module, "inv_freq", None))
        half = getattr(sys.modules[type(module).__module__], "rotate_half", None)
        if found is None or half is None or found.is_meta or isinstance(found, FakeTensor):  # no values to read
            return None
        interleaved = half(torch.arange(4.0)).tolist() == [-1, 0, -3, 2]
        return Rotation(tuple(found.float().tolist()), interleaved)
    return None


def known(model: PreTrainedModel) -> Fingerprint:
    """Everything that a policy may know of a model."""
    return replace(Fingerprint.of(model), rotation=read_rotation(model))


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
