"""Policies, and the states of layers, that are drawn and not those of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import winnowkv as wk
from support.profiles import random_profile
from winnowkv.cache.selection import PromptSelection
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import Rotation
from winnowkv.policies import BoundPolicy, LayerStates
from winnowkv.scoring.study import Evidence, Studied

HEADS, KV_HEADS, SIZE = 4, 2, 4


def drawn_model(layers: int) -> ModelInfo:
    """A model of HEADS query heads and KV_HEADS KV heads, which exists on paper only."""
    return ModelInfo("Drawn", layers, HEADS, KV_HEADS, "", Rotation((1.0, 0.1)))


def decided(spec: str, layers: int) -> wk.Policy:
    """The policy with a random calibration profile if it needs one; winnow with one and without, by its options."""
    return _with_profile(wk.policy(spec), layers)


def _with_profile(made: Any, layers: int) -> Any:
    if hasattr(made, "of"):
        return replace(made, of=_with_profile(made.of, layers))
    if made.needs_profile or (made.name == "winnow" and (made.profile or made.heads in (None, 1, 3, 5))):
        return replace(made, profile=random_profile(drawn_model(layers), layers))
    return made


def bind(spec: str | wk.Policy, tokens: int, layers: int, budget: int, task: wk.TaskProfile | str | None = None) -> BoundPolicy:
    """A policy for a prompt of the drawn model. Raises BudgetError if the budget cannot hold what always stays."""
    made = decided(spec, layers) if isinstance(spec, str) else spec
    return made.bind(drawn_model(layers), wk.PromptInfo(tokens, layers, budget, wk.TaskProfile.of(task)))


def drawn_states(bound: BoundPolicy, layer: int, generator: torch.Generator, *, constant: bool = False) -> LayerStates:
    """Queries that a policy wants of a layer, keys, values and a projection; ``constant``: all attention scores tie."""

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    tokens = bound.prompt.tokens
    queries = 2 * normal(1, HEADS, len(bound.query_positions()), SIZE)
    keys, values = normal(1, KV_HEADS, tokens, SIZE), normal(1, KV_HEADS, tokens, SIZE)
    projection = normal(HEADS, SIZE, HEADS * SIZE)
    made = LayerStates(layer, torch.zeros_like(queries) if constant else queries, keys, values, 0.5, projection)
    if not bound.policy.needs_study:
        return made
    found = Studied(HEADS, KV_HEADS, tokens, keys.device)
    found.most = torch.full_like(found.most, 0.5) if constant else normal(1, KV_HEADS, tokens).abs()
    return replace(made, studied=Evidence(found))


def run(
    made: str | wk.Policy, tokens: int, layers: int, budget: int, seed: int = 0
) -> tuple[PromptSelection, list[LayerStates]]:
    """A policy over drawn layers, and what it saw of them; its scores are kept."""
    generator = torch.Generator().manual_seed(seed)
    selection = PromptSelection(bind(made, tokens, layers, budget), keep_scores=True)
    states = [drawn_states(selection.bound, layer, generator) for layer in range(layers)]
    for each in states:
        selection.observe(each)
    return selection, states


def kept_rows(selection: PromptSelection) -> list[list[list[int]]]:
    """Positions that stay: layer, KV head, ascending."""
    found = []
    for kept in selection.kept:
        assert kept is not None
        heads = kept[0].tolist() * (KV_HEADS // kept.shape[1])
        found.append([[position for position in row if position >= 0] for row in heads])
    return found


def best(scores: Sequence[float], count: int) -> list[int]:
    """Positions of the highest scores, ascending; ties go to the earlier one."""
    return sorted(sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count])


def projected_norm(states: LayerStates, kv_head: int, token: int) -> float:
    """``|W_O v|`` of one token, L1, mean over the query heads of a KV head: one product after the other."""
    assert states.projection is not None
    value, group = states.values[0, kv_head, token].tolist(), HEADS // KV_HEADS
    total = 0.0
    for head in range(kv_head * group, (kv_head + 1) * group):
        for column in states.projection[head].T.tolist():
            total += abs(sum(v * w for v, w in zip(value, column, strict=True)))
    return total / group
