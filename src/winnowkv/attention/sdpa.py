"""Attention of new tokens over the entries that a cache holds, by torch's scaled dot product attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from winnowkv.types import Valid

QUERY_BLOCK = 256  # queries of a prompt's later chunk that attend at once: no mask is larger than [G * 256, K]
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # for any number of entries


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
    return sdpa_kernel(SDPA_BACKENDS)
