"""Prompts drawn by hand for the policy winnow: queries, keys, the heads that a profile scores, and what is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import winnowkv as wk
from support.policies import HEADS, KV_HEADS, drawn_model as shape
from support.profiles import random_profile
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import BoundPolicy, LayerStates, PromptInfo
from winnowkv.prompt.structure import Structure
from winnowkv.prompt.task import TaskProfile

SIZE = 8
STRUCTURE = Structure(tokens=40, question=10, tail=3, ends=(6, 11, 20, 30))
Layer = tuple[Tensor, Tensor]


def profile_of(layers: int, scores: dict[tuple[int, int], float]) -> wk.CalibrationProfile:
    """A profile in which only these heads ``(layer, head)`` score anything."""
    table = tuple(tuple(scores.get((layer, head), 0.0) for head in range(HEADS)) for layer in range(layers))
    return replace(random_profile(shape(layers), layers), semantic=table)


def asked(tokens: int, layers: int, budget: int, task: TaskProfile | None = None) -> PromptInfo:
    """A prompt of STRUCTURE, or of a task of its own."""
    return PromptInfo(tokens, layers, budget, task or TaskProfile(structure=STRUCTURE))


def bound(prompt: PromptInfo, **options: Any) -> BoundPolicy:
    """The policy with these options for the prompt."""
    return wk.policy("winnow", **options).bind(shape(prompt.layers), prompt)


def drawn(tokens: int, seed: int, spread: float = 1.0) -> Layer:
    """Queries and keys of one layer."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(1, heads, tokens, SIZE, generator=generator) * spread for heads in (HEADS, KV_HEADS))
    return queries, keys


def look(layer: Layer, head: int, queries: range, at: Iterable[int], strength: float = 40.0) -> None:
    """Let these queries of a head attend to tokens ``at``, all of its KV head's alike."""
    sight = torch.zeros(SIZE)
    sight[head] = strength
    layer[0][0, head, queries] = sight
    layer[1][0, head // (HEADS // KV_HEADS), :, head] = 0.0
    layer[1][0, head // (HEADS // KV_HEADS), list(at), head] = 1.0


def states_of(bound: BoundPolicy, layer: int, drawn: Layer) -> LayerStates:
    """What the policy sees of a layer; no policy here reads values."""
    queries, keys = drawn
    return LayerStates(layer, queries[:, :, bound.query_positions()], keys, keys, SIZE**-0.5)


def stages(bound: BoundPolicy, layers: Sequence[Layer]) -> Iterator[list[list[set[int]]]]:
    """What each KV head of each layer seen holds, before a layer is read and after the last one."""
    selection, tokens = PromptSelection(bound), bound.prompt.tokens
    for at, layer in enumerate(layers):
        yield [held(kept, tokens) for kept in selection.kept]
        selection.observe(states_of(bound, at, layer))
    yield [held(kept, tokens) for kept in selection.kept]


def held(kept: Tensor | None, tokens: int) -> list[set[int]]:
    return [set(range(tokens)) if kept is None else set(kept[0, head].tolist()) for head in range(KV_HEADS)]


def ends(bound: BoundPolicy, layers: Sequence[Layer]) -> list[list[set[int]]]:
    """What is held after the last layer."""
    return list(stages(bound, layers))[-1]


def in_all(kept: list[list[set[int]]]) -> set[int]:
    """What every KV head of every layer holds."""
    return set.intersection(*(head for layer in kept for head in layer))
