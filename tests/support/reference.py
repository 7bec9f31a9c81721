"""The slow, obvious reference: one forward pass without any cache, in which evicted entries are masked out.

A token of the prompt sees every token up to itself: prefill knows no eviction. A token after
the prompt sees the entries of the prompt that were kept, for its layer and KV head, and every
later token up to itself. Nothing here is shared with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.models import DEVICE
from winnowkv import CompactCache

NAME = "law_reference"
Kept = Sequence[Tensor | None]  # per layer ``[H, n]`` positions of one row; None where everything stays


def positions(cache: CompactCache, row: int = 0) -> list[Tensor | None]:
    """The positions that a cache reports for one row, per layer."""
    return [None if layer.positions[row] is None else layer.positions[row].clone() for layer in cache.compact_layers]


def same_positions(left: Kept, right: Kept) -> bool:
    """Whether two rows keep the same entries in every layer."""
    pairs = list(zip(left, right, strict=True))
    return all((a is None) == (b is None) for a, b in pairs) and all(
        a.shape == b.shape and bool((a == b).all()) for a, b in pairs if a is not None
    )


def visible(kept: Tensor | None, prompt: int, tokens: int, heads: int, kv_heads: int) -> Tensor:
    """Which key each query may see, ``[heads, tokens, tokens]``."""
    mask = torch.ones(tokens, tokens, device=DEVICE).tril().bool().repeat(heads, 1, 1)
    if kept is not None:
        mask[:, prompt:, :prompt] = False
        for head in range(heads):
            row = kept[0] if len(kept) == 1 else kept[head // (heads // kv_heads)]
            mask[head, prompt:, row[row >= 0].long()] = True
    return mask


@contextmanager
def masked_attention(model: PreTrainedModel, kept: Kept, prompt: int) -> Iterator[None]:
    """Run the model's attention over everything, under our masks; afterwards the model is as before."""
    masks: dict[int, Tensor] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        layer, heads, kv_heads = module.layer_idx, query.shape[1], key.shape[1]
        if layer not in masks:
            masks[layer] = visible(kept[layer], prompt, query.shape[2], heads, kv_heads)
        key = key.repeat_interleave(heads // kv_heads, dim=1)
        value = value.repeat_interleave(heads // kv_heads, dim=1)
        weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~masks[layer], float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    with attending(model, attention):
        yield


@contextmanager
def attending(model: PreTrainedModel, attention: Any) -> Iterator[None]:
    """Run the model's attention as this function; afterwards the model is as before."""
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


@torch.no_grad()
def reference_logits(model: PreTrainedModel, prompt: Tensor, more: Tensor, kept: Kept) -> Tensor:
    """Logits of the last prompt token and of every token of ``more``, ``[1 + len(more), vocabulary]``."""
    tokens = prompt.shape[1]
    with masked_attention(model, kept, tokens):
        output = model(input_ids=torch.cat([prompt, more], dim=1), use_cache=False)
    return output.logits[0, tokens - 1 :]


@torch.no_grad()
def compact_logits(model: PreTrainedModel, cache: CompactCache, prompt: Tensor, chunks: Sequence[Tensor]) -> Tensor:
    """The same logits by the package: prefill, then one forward pass for each chunk of further tokens."""
    logits = [model(input_ids=prompt, past_key_values=cache, use_cache=True).logits[0, -1:]]
    for chunk in chunks:
        logits.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(logits)


def chunked(tokens: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cut ``[1, n]`` tokens into consecutive chunks of these sizes."""
    assert sum(sizes) == tokens.shape[1]
    return list(tokens.split(list(sizes), dim=1))


def generate(model: PreTrainedModel, prompt: Tensor, tokens: int = 12, **options: Any) -> list[list[int]]:
    """Greedy tokens after the prompt, per row."""
    options.setdefault("do_sample", False)
    output = model.generate(input_ids=prompt, max_new_tokens=tokens, **options)
    return output[:, prompt.shape[1] :].tolist()
