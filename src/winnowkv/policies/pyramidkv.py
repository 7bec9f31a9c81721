"""PyramidKV: SnapKV's scores, with budgets that fall from the first layer to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.models.info import ModelInfo
from winnowkv.policies.parts import Allocator, PromptInfo
from winnowkv.policies.snapkv import SnapKV
from winnowkv.scoring.allocate import pyramid


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's scores, with budgets that fall from the first layer to the last (arXiv 2406.02069).

    Formula
    -------
    ``score[i] = pool(mean over the group(sum over q of A[q, i]))``. Above the recent tokens layers get from ``2 * mean - mean /
    slope`` entries, the first, to ``mean / slope``, the last, in equal steps.

    Parameters
    ----------
    kernel: neighbouring tokens whose scores are pooled, odd; 1 pools nothing.
    pooling: ``avg`` or ``max`` over them.
    group_by: how the query heads of a KV head vote together, ``mean`` or ``max``.
    slope: the mean budget over the last layer's (the paper's beta).

    Departures
    ----------
    From the published code, which floors every step and falls back to equal budgets for short prompts: here the sum is exact,
    and what one layer cannot use goes to the others. The question looks where it is known, not the last 8 tokens
    (``preset=paper``).
    """

    name: ClassVar[str] = "pyramidkv"
    source: ClassVar[str] = "PyramidKV, arXiv 2406.02069"
    scope: ClassVar[str] = "tokens per KV head, falling budgets over layers"
    purpose: ClassVar[str] = "to compare: early layers keep more than late ones"

    published: ClassVar[int] = 8

    slope: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("slope", minimum=1)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """A pyramid over the context's entries."""
        return PyramidAllocator(prompt, recent=self.observed(prompt).recent, sinks=self.sinks, slope=self.slope)


@dataclass(frozen=True, kw_only=True)
class PyramidAllocator(Allocator):
    """Budgets that fall linearly; ``recent`` entries on top and ``sinks`` at least stay in every layer."""

    recent: int
    sinks: int
    slope: float

    def prefill_limits(self) -> list[int]:
        """The pyramid over context entries, sinks as every layer's floor, plus the recent tokens that every layer keeps."""
        prompt, recent = self.prompt, self.recent
        context = pyramid(prompt.layers, prompt.budget - recent, self.slope, prompt.tokens - recent, self.sinks)
        return [entries + recent for entries in context]
