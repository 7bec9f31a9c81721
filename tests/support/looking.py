"""Lookahead the slow way: one forward pass without a cache shows every query, and what stays is chosen and refitted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import EVICTING, Case
from support.reference import attending
from winnowkv.budget import Budget
from winnowkv.cache.selection import PromptSelection
from winnowkv.models.info import ModelInfo
from winnowkv.policies import LayerStates
from winnowkv.prompt.task import TaskProfile

LOOKING = "lookahead=4:draft=3:refit=true"


def looking(case: Case, options: str = LOOKING) -> Case:
    """A case that looks, too; what stands last in a spec belongs to the innermost policy."""
    return Case(f"{case.spec}:{options}", case.task, case.budget)


LOOKING_CASES = [looking(case) for case in EVICTING]


@contextmanager
def watched(model: PreTrainedModel, states: dict[int, tuple[Tensor, Tensor, Tensor, float]]) -> Iterator[None]:
    """Collect queries, keys, values and scale of each layer of one causal pass without a cache."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        states[module.layer_idx] = query, key, value, scaling
        group = query.shape[1] // key.shape[1]
        wide = (part.repeat_interleave(group, 1) for part in (key, value))
        output = nn.functional.scaled_dot_product_attention(query, *wide, is_causal=True, scale=scaling)
        return output.transpose(1, 2).contiguous(), None

    with attending(model, attention):
        yield


@torch.no_grad()
def chosen_by_hand(
    model: PreTrainedModel, case: Case, prompt: Tensor, spoken: Tensor
) -> tuple[list[Tensor | None], list[tuple[Tensor, Tensor, Tensor, float]]]:
    """What stays of each layer ``[H, n]`` if ``spoken`` tokens came after the prompt; queries, keys, values and scales."""
    states: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}
    with watched(model, states):
        model(input_ids=torch.cat([prompt, spoken], 1), use_cache=False)
    policy, info, tokens = wk.policy(case.spec), ModelInfo.of(model), prompt.shape[1]
    bound = policy.bind(info, policy.prompt_info(Budget(case.budget), tokens, len(states), TaskProfile.of(case.task)))
    selection, places = PromptSelection(bound), bound.query_positions()
    for layer in range(len(states)):
        queries, keys, values, scale = states[layer]
        heard = queries[:, :, tokens : tokens + policy.lookahead] if policy.lookahead else None
        projection = model.model.layers[layer].self_attn.o_proj.weight.t().unflatten(0, (queries.shape[1], -1))
        selection.observe(
            LayerStates(
                layer, queries[:, :, places], keys[:, :, :tokens], values[:, :, :tokens], scale, projection,
                heard=heard, weight=policy.heard,
            )
        )  # fmt: skip
    return [None if kept is None else kept[0] for kept in selection.kept], [states[layer] for layer in range(len(states))]
