"""Prompts drawn by hand for the policy winnow: queries, keys, the heads that a profile scores, and what is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import winnowkv as wk
from support.profiles import random_profile
from winnowkv.cache.session import PrefillPlan
from winnowkv.models.info import Fingerprint
from winnowkv.models.rope import Rotation
from winnowkv.policies import Policy, Prompt
from winnowkv.prompt.structure import Layout
from winnowkv.prompt.task import TaskProfile

HEADS, KV_HEADS, SIZE = 4, 2, 8
LAYOUT = Layout(tokens=40, question=10, tail=3, ends=(6, 11, 20, 30))
Layer = tuple[Tensor, Tensor]


def shape(layers: int) -> Fingerprint:
    return Fingerprint("Drawn", layers, HEADS, KV_HEADS, "", Rotation((1.0, 0.1)))


def profile_of(layers: int, scores: dict[tuple[int, int], float]) -> wk.Profile:
    """A profile in which only these heads ``(layer, head)`` score anything."""
    table = tuple(tuple(scores.get((layer, head), 0.0) for head in range(HEADS)) for layer in range(layers))
    return replace(random_profile(shape(layers), layers), semantic=table)


def made(layers: int, task: TaskProfile | None = None, **options: Any) -> Any:
    """The policy with everything decided that depends on the model of ``layers`` layers and on the task."""
    return wk.policy("winnow", **options).for_model(shape(layers)).for_task(task or TaskProfile(layout=LAYOUT))


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


def stages(policy: Policy, asked: Prompt, layers: Sequence[Layer]) -> Iterator[list[list[set[int]]]]:
    """What each KV head of each layer seen holds, before a layer is read and after the last one."""
    plan = PrefillPlan(policy, asked)
    for queries, keys in layers:
        yield [held(kept, asked.tokens) for kept in plan.kept]
        plan.observe(queries[:, :, policy.wanted(asked.tokens)], keys, SIZE**-0.5)
    yield [held(kept, asked.tokens) for kept in plan.kept]


def held(kept: Tensor | None, tokens: int) -> list[set[int]]:
    return [set(range(tokens)) if kept is None else set(kept[0, head].tolist()) for head in range(KV_HEADS)]


def ends(policy: Policy, asked: Prompt, layers: Sequence[Layer]) -> list[list[set[int]]]:
    """What is held after the last layer."""
    return list(stages(policy, asked, layers))[-1]


def in_all(kept: list[list[set[int]]]) -> set[int]:
    """What every KV head of every layer holds."""
    return set.intersection(*(head for layer in kept for head in layer))
