"""The slow reference for any family: the model's own eager attention over everything, with evicted entries masked out.

Unlike :mod:`support.reference` it computes no attention itself, so softcaps, learned sinks and windows are the model's.
Nothing here is shared with the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from support.reference import visible
from winnowkv import CompactCache

NAME = "own_reference"
Seen = Callable[[int, int, int, int], Tensor]  # of a layer, tokens, query and KV heads: which key each query may see


def kept_of(cache: CompactCache) -> dict[int, Tensor | None]:
    """The kept positions of a cache's first row, by the index of the layer in the model."""
    return {
        index: None if layer.positions[0] is None else layer.positions[0].clone()
        for index, layer in enumerate(cache.layers)
        if layer in cache.compact_layers
    }


def source_layer(module: nn.Module) -> int:
    """The layer whose keys a module attends to: its own, or for one that shares the last of its kind that has some."""
    layer, shared = module.layer_idx, getattr(module.config, "num_kv_shared_layers", 0)
    first = module.config.num_hidden_layers - shared if shared else layer + 1
    if layer < first:
        return layer
    kinds = module.config.layer_types
    return max(other for other in range(first) if kinds[other] == kinds[layer])


def least(kept: Mapping[int, Tensor | None], prompt: int) -> Seen:
    """Later tokens see of a prompt only what was kept."""
    return lambda layer, tokens, heads, kv_heads: visible(kept.get(layer), prompt, tokens, heads, kv_heads)


@contextmanager
def own_attention(model: PreTrainedModel, seen: Seen) -> Iterator[None]:
    """Run the model's eager attention, in which queries see at most the keys that ``seen`` says; then it is as before."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        sees = seen(source_layer(module), key.shape[2], query.shape[1], key.shape[1])
        hidden = torch.zeros(sees.shape, dtype=query.dtype).masked_fill(~sees, torch.finfo(query.dtype).min)
        attention_mask = hidden[None] if attention_mask is None else (attention_mask + hidden).clamp(min=hidden.min())
        return eager(module, query, key, value, attention_mask, **options)

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def own_logits(
    model: PreTrainedModel, prompt: Tensor, more: Tensor, kept: Mapping[int, Tensor | None], seen: Seen | None = None
) -> Tensor:
    """Logits of the last prompt token and of every token of ``more``, ``[1 + len(more), vocabulary]``."""
    tokens = prompt.shape[1]
    with own_attention(model, seen or least(kept, tokens)):
        output = model(input_ids=torch.cat([prompt, more], dim=1))
    return output.logits[0, tokens - 1 :]
