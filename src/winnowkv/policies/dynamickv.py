"""DynamicKV: every layer gets the budget that this prompt needs, decided while prefill runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from winnowkv.models.info import ModelInfo
from winnowkv.policies.parts import Allocator, PromptInfo
from winnowkv.policies.snapkv import SnapKV
from winnowkv.scoring.allocate import apportion, global_top_k
from winnowkv.scoring.attention import PoolKind
from winnowkv.types import Entries, Scores


@dataclass(frozen=True, kw_only=True)
class DynamicKV(SnapKV):
    """A maximum for the current layer, and earlier layers that shrink every few layers (arXiv 2412.14838).

    At an update the pooled scores of all layers so far compete in one global top-k. A layer that has shrunk cannot grow again,
    so its cap at a later update is what it still holds.

    Formula
    -------
    ``score[i] = pool(mean over the group(sum over q of A[q, i]))``. ``entries of a layer = total * its winners / all winners``
    of the top-k over all layers read so far, at least ``floor`` and at most ``ceiling`` times the mean.

    Parameters
    ----------
    kernel: neighbouring tokens whose scores are pooled, odd; 1 pools nothing.
    pooling: ``avg`` or ``max`` over them. The paper takes the average for Llama and the maximum for Mistral and Qwen2.
    group_by: how the query heads of a KV head vote together, ``mean`` or ``max``.
    every: layers between two updates.
    ceiling: the most that a layer holds while the prompt is read, in means (the paper's ``r_max``).
    floor: share of the mean that every layer keeps.

    Departures
    ----------
    From the repository: an update spends the budget of the layers *seen*, not the whole model's; shares are rounded by largest
    remainder and what a layer cannot hold goes to the others; every layer keeps ``floor`` of the mean; the layers after the
    last multiple of ``every`` are updated too. The question looks where it is known, not the last 8 tokens (``preset=paper``).
    """

    name: ClassVar[str] = "dynamickv"
    source: ClassVar[str] = "DynamicKV, arXiv 2412.14838"
    scope: ClassVar[str] = "tokens per KV head, budgets over layers by this prompt's scores"
    purpose: ClassVar[str] = "prompts whose layers differ; the whole cache is held meanwhile"

    published: ClassVar[int] = 8

    pooling: PoolKind = "avg"
    every: int = 4
    ceiling: float = 10.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("every", minimum=1)
        self.require("ceiling", minimum=1)
        self.require("floor", minimum=0)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """Progressively, by a global top-k."""
        return GlobalTopK(prompt, recent=self.observed(prompt).recent, options=self)


@dataclass(frozen=True, kw_only=True)
class GlobalTopK(Allocator):
    """A layer's share of the best scores of all layers read so far is its share of their budget, above ``recent`` each."""

    recent: int
    options: DynamicKV

    def prefill_limits(self) -> list[int]:
        """``ceiling`` times the mean context budget, as far as the prompt has it."""
        prompt, recent = self.prompt, self.recent
        most = int(self.options.ceiling * (prompt.budget - recent))
        return [min(most + recent, prompt.tokens)] * prompt.layers

    def shrink(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[int]:
        """At every ``every``-th layer the layers read so far share their part of the budget."""
        due = len(scores) % self.options.every == 0
        return self.allocate(scores, held) if due else [int(entries) for entries in held]

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[int]:
        """Shares of one global top-k over the layers read; the sum is exact."""
        mean = self.prompt.budget - self.recent
        total = mean * len(scores)
        winners = global_top_k(scores, total * scores[0].shape[1])
        caps = [int(entries) - self.recent for entries in held]
        least = max(self.options.sinks, int(min(self.options.floor, 1.0) * mean))
        context = apportion(winners, total, caps, [min(least, cap) for cap in caps])
        return [entries + self.recent for entries in context]
