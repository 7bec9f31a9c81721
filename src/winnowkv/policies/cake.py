"""CAKE: layers share the budget by how spread and how restless their attention is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from winnowkv.models.info import ModelInfo
from winnowkv.policies.cascade import CascadeAllocator
from winnowkv.policies.observation import WindowScorer
from winnowkv.policies.parts import Allocator, LayerStates, PromptInfo, Scorer
from winnowkv.policies.snapkv import SnapKV
from winnowkv.scoring.allocate import apportion
from winnowkv.scoring.attention import GroupKind, PoolKind, group_reduce, moments, pool, totals
from winnowkv.types import Entries, Scores


@dataclass(frozen=True, kw_only=True)
class CAKE(SnapKV):
    """Layers whose attention is spread and restless get more of the budget, in a cascade (arXiv 2503.12491, section 4).

    The whole model's budget goes to the layers seen so far, so a layer only ever shrinks.

    Formula
    -------
    ``score[i] = max over the group(pool(mean over q of A[q, i] + gamma * variance over q of A[q, i]))``. A layer's share of the
    budget is proportional to ``H^(1/tau1) * V^(1/tau2)``: ``H`` is the entropy of the window's attention on the context, ``V``
    its variance over the window's queries, both summed.

    Parameters
    ----------
    kernel: neighbouring tokens whose scores are pooled, odd; 1 pools nothing.
    pooling: ``avg`` or ``max`` over them.
    group_by: how the query heads of a KV head vote together, ``mean`` or ``max``.
    gamma: weight of the variance in a token's score.
    tau1: temperature of the entropy in a layer's preference.
    tau2: temperature of the variance in it.

    Departures
    ----------
    From the authors' code: what is over after rounding goes to the largest remainders, not to all layers alike. The authors
    tune ``tau1``, ``tau2`` and ``gamma`` for each model; these are plain defaults. The question looks where it is known, not
    the last 32 tokens (``preset=paper``).
    """

    name: ClassVar[str] = "cake"
    source: ClassVar[str] = "CAKE, arXiv 2503.12491, section 4"
    scope: ClassVar[str] = "tokens per KV head, budgets over layers by this prompt's attention"
    purpose: ClassVar[str] = "summaries and other prompts in which much of the text matters"

    fewest: ClassVar[int] = 2  # one query has no variance

    kernel: int = 5
    pooling: PoolKind = "avg"
    group_by: GroupKind = "max"
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("gamma", minimum=0)
        self.require("tau1", minimum=0.01)
        self.require("tau2", minimum=0.01)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By mean and variance of the window's attention."""
        window = self.observed(prompt)
        return MomentScorer(prompt.tokens, window.size, tail=window.tail, options=self)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """By the layers' preferences."""
        return PreferenceAllocator(prompt, recent=self.observed(prompt).recent, sinks=self.sinks)


@dataclass(frozen=True, kw_only=True)
class MomentScorer(WindowScorer):
    """Mean plus ``gamma`` times the variance of the observation window's attention."""

    options: CAKE
    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """Mean plus variance, pooled, ``[1, Hkv, C]``; scaled so that their sum is the layer's preference."""
        states = self.seen(states)
        asked, window = self.options, states.queries.shape[2]
        mean, square, entropy = moments(states.queries, states.keys, states.scale, self.tokens - self.window, causal=True)
        variance = (square - mean.square()).clamp_(min=0) * (window / (window - 1))
        entropy, spread = states.heads.total(torch.stack([entropy, variance.sum()]))
        preference = entropy ** (1 / asked.tau1) * spread ** (1 / asked.tau2)
        pooled = pool(mean + asked.gamma * variance, asked.kernel, asked.pooling)
        scores = states.heads.whole(group_reduce(pooled, states.kv_heads, asked.group_by))
        # One factor for the whole layer changes no choice within it, and carries its preference to allocate().
        factor: torch.Tensor = preference / scores.sum().clamp(min=1e-30)
        return scores * factor


@dataclass(frozen=True, kw_only=True)
class PreferenceAllocator(CascadeAllocator):
    """In proportion to the sums of the layers' scores, which are their preferences; ``recent`` entries on top."""

    recent: int
    sinks: int

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[int]:
        """The sum is exact once all layers are there."""
        caps = [int(entries) - self.recent for entries in held]
        total = min((self.prompt.budget - self.recent) * self.prompt.layers, sum(caps))
        context = apportion(totals(scores), total, caps, [self.sinks] * len(caps))
        return [entries + self.recent for entries in context]
