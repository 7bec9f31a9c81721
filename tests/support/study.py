"""The slow, obvious reference of a study: one forward pass without a cache, whose attention is written down whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.models import DEVICE

NAME = "study_reference"
Written = dict[int, tuple[Tensor, Tensor]]  # by layer: attention [Hq, T, T] and values [Hq, T, D], KV heads repeated


@contextmanager
def writing_down(model: PreTrainedModel) -> Iterator[Written]:
    """Run the model's attention head by head in float64, and write it down."""
    found: Written = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group, tokens = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(group, 1).double(), value.repeat_interleave(group, 1).double()
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        weights = (query.double() @ key.transpose(-1, -2) * scaling).masked_fill(future, float("-inf")).softmax(-1)
        found[module.layer_idx] = (weights[0], value[0])
        return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    model.set_attn_implementation(NAME)
    try:
        yield found
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


@torch.no_grad()
def attended(model: PreTrainedModel, text: Sequence[int], later: Sequence[int], *, plus: bool = False) -> list[Tensor]:
    """By layer, the attention ``[Hq, len(later), len(text)]`` of tokens that are read after a text.

    ``plus``: times the norm of each entry's projected value, over that of the hidden state that goes into the query's block.
    """
    hidden: dict[int, Tensor] = {}
    blocks = [layer.self_attn for layer in model.model.layers]
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, given: hidden.update({module.layer_idx: given["hidden_states"][0]}), with_kwargs=True
        )
        for block in blocks
    ]
    with writing_down(model) as found:
        model(input_ids=torch.tensor([[*text, *later]], device=DEVICE), use_cache=False)
    for hook in hooks:
        hook.remove()
    heads = []
    for layer, block in enumerate(blocks):
        weights, values = found[layer]
        weights = weights[:, len(text) :, : len(text)]
        if plus:
            size = values.shape[-1]
            projected = torch.stack(
                [values[h] @ block.o_proj.weight[:, h * size : (h + 1) * size].double().t() for h in range(len(values))]
            )
            weights = weights * projected.norm(dim=-1)[:, None, : len(text)]
            weights = weights / hidden[layer][len(text) :].double().norm(dim=-1)[None, :, None]
        heads.append(weights)
    return heads
