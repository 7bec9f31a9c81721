"""The slow, obvious reference of the decode budget: forward passes over everything without a cache.

One pass for each eviction, to see queries and keys, and one at the end. What is evicted is masked out for
the tokens that come after. Only the sizes are the package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.reference import Kept, visible
from winnowkv.cache.generated import DECODE_BLOCK
from winnowkv.policies.decode_eviction import DecodeEviction

OBSERVE, RECENT = DecodeEviction().observe, DecodeEviction().recent


@contextmanager
def watched(model: PreTrainedModel, masks: Sequence[Tensor], seen: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Run the model's attention under these masks ``[heads, all, all]`` and note its queries and expanded keys."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group, tokens = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        seen[module.layer_idx] = query[0] * scaling, key[0]
        mask = masks[module.layer_idx][:, :tokens, :tokens]
        weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["decode_reference"] = attention
    model.set_attn_implementation("decode_reference")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS["decode_reference"]


def best(queries: Tensor, keys: Tensor, held: list[int], budget: int, choose: Callable[[Tensor], Tensor]) -> list[int]:
    """Of the positions that a KV head holds, its queries ``[G, all, D]``: the most recent and the best others."""
    places, received, queries, keys = torch.tensor(held), torch.zeros(len(held)), queries.cpu(), keys.cpu()
    for head in range(len(queries)):
        most = torch.zeros(len(held))
        for query in held[-OBSERVE:]:
            logits = (keys[head, places] @ queries[head, query]).masked_fill(places > query, float("-inf"))
            most = torch.maximum(most, logits.softmax(-1))
        received += most
    received = choose(received)
    older = sorted(range(len(held) - RECENT), key=lambda i: -float(received[i]))[: budget - RECENT]
    return [held[i] for i in sorted(older)] + held[-RECENT:]


@torch.no_grad()
def slow_logits(
    model: PreTrainedModel,
    ids: Tensor,
    more: Tensor,
    sizes: Sequence[int],
    kept: Kept,
    budget: int,
    choose: Callable[[Tensor], Tensor] = lambda received: received,
) -> Tensor:
    """Logits of the last prompt token and of ``more``, read in steps of these sizes; ``choose`` may spoil the scores."""
    tokens, everything = ids.shape[1], torch.cat([ids, more], dim=1)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    masks = [visible(k, tokens, everything.shape[1], heads, kv_heads) for k in kept]
    held: list[list[list[int]]] = [[[] for _ in range(kv_heads)] for _ in masks]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    end = tokens
    for size in sizes:
        for layer in held:
            for row in layer:
                row += range(end, end + size)
        end += size
        if len(held[0][0]) < budget + DECODE_BLOCK:
            continue
        with watched(model, masks, seen):
            model(input_ids=everything[:, :end], use_cache=False)
        for layer, (queries, keys) in seen.items():
            for head, group in enumerate(torch.arange(heads).chunk(kv_heads)):
                stays = best(queries[group], keys[group], held[layer][head], budget, choose)
                gone = sorted(set(held[layer][head]) - set(stays))
                masks[layer][group[0] : group[-1] + 1, end:, gone] = False
                held[layer][head] = stays
    with watched(model, masks, seen):
        return model(input_ids=everything, use_cache=False).logits[0, tokens - 1 :]
