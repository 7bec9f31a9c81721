"""PyramidKV: SnapKV's scores, with budgets that fall from the first layer to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.base import Prompt
from winnowkv.policies.snapkv import SnapKV
from winnowkv.scoring.allocate import pyramid


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Linear pyramid of context budgets over SnapKV's scores (arXiv 2406.02069).

    ``slope`` (the paper's beta, 20) sets the last layer to ``mean / slope``. Departure from
    the published code, which floors every step and falls back to equal budgets for short
    prompts: here the sum is exact, and what one layer cannot use goes to the others.
    """

    name: ClassVar[str] = "pyramidkv"
    source: ClassVar[str] = "PyramidKV, arXiv 2406.02069"
    scope: ClassVar[str] = "tokens per KV head, falling budgets over layers"

    observe: int = 8
    slope: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("slope", minimum=1)

    def ceilings(self, prompt: Prompt) -> list[int]:
        """The pyramid over context entries, sinks as every layer's floor, plus the window that every layer keeps."""
        context = pyramid(prompt.layers, prompt.budget - self.observe, self.slope, prompt.tokens - self.observe, self.sinks)
        return [entries + self.observe for entries in context]
