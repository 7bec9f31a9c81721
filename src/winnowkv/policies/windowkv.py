"""WindowKV: windows of consecutive tokens, scored by task, shared by groups of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from winnowkv.policies.base import Policy, Prompt
from winnowkv.prompt.task import Task, TaskProfile
from winnowkv.scoring.allocate import arithmetic_groups
from winnowkv.scoring.attention import window_attention
from winnowkv.scoring.select import top_windows, with_recent, with_sinks
from winnowkv.scoring.spans import window_reduce
from winnowkv.types import Entries, Indices, Keys, Queries, Scores

# (observe, window, top) for each task. Paper and repository disagree, see the class.
PRESETS = {
    "paper": {"localization": (16, 8, 8), "aggregation": (32, 16, 8)},
    "repo": {"localization": (32, 8, 4), "aggregation": (16, 8, 8)},
}


@dataclass(frozen=True, kw_only=True)
class WindowKV(Policy):
    """Best windows of ``window`` tokens, one selection for each ``group`` of layers (arXiv 2503.17922).

    A window scores the mean of its ``top`` best tokens, mean over heads. Paper and repository
    (optim996/WindowKV) disagree on the numbers; ``preset`` names whom to follow, options given by
    hand win over it. The paper does not state its top-p for windows of 16: half of it here.

    Departures from the repository: the budget includes the window and is met to the entry, the
    group's size does not bend the pyramid, no selection is stale, every prompt of a batch votes alone.
    """

    name: ClassVar[str] = "windowkv"
    source: ClassVar[str] = "WindowKV, arXiv 2503.17922"
    scope: ClassVar[str] = "windows, same for all heads and a group of layers, falling budgets"
    by_task: ClassVar[bool] = True

    # None until for_task() fills in the preset's numbers; every other hook is called after it.
    observe: int = None  # type: ignore[assignment]
    window: int = None  # type: ignore[assignment]
    top: int = None  # type: ignore[assignment]
    group: int = 6
    slope: float = 14.0
    preset: Literal["paper", "repo"] = "repo"
    task: Task | None = None
    fallback: Task = "localization"  # where a classifier is less than ``sure``
    sure: float = 0.75

    def __post_init__(self) -> None:
        for option in ("sinks", "observe", "window", "top", "group", "slope", "sure"):
            self.require(option, minimum=0 if option in ("sinks", "sure") else 1)

    def for_task(self, profile: TaskProfile) -> WindowKV:
        """The policy with the preset's numbers filled in. Raises PolicyError where no task was given."""
        task = self.task or profile.decided(self.name, self.sure, self.fallback)
        observe, window, top = PRESETS[self.preset][task]
        return replace(self, task=task, observe=self.observe or observe, window=self.window or window, top=self.top or top)

    def leader(self, layer: int) -> int:
        """The first layer of the group."""
        return layer - layer % self.group

    def ceilings(self, prompt: Prompt) -> list[int]:
        """Falling in equal steps from group to group; sinks are every layer's floor."""
        mean, cap = prompt.budget - self.observe, prompt.tokens - self.observe
        budgets = arithmetic_groups(prompt.layers, self.group, mean, self.slope, cap, self.sinks)
        return [entries + self.observe for entries in budgets]

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Attention of every query head, ``[1, Hq, C]``: windows are scored head by head in :meth:`select`."""
        return window_attention(queries, keys, scale)

    def select(self, layer: int, scores: Scores, entries: Entries, prompt: Prompt) -> Indices:
        """The best windows by the mean over heads, ``[1, 1, entries]``."""
        windows = window_reduce(with_sinks(scores, self.sinks), self.window, self.top).mean(1, keepdim=True)
        tokens = with_sinks(scores.mean(1, keepdim=True), self.sinks)
        context = top_windows(windows, tokens, int(entries) - self.observe, self.window)
        return with_recent(context, prompt.tokens, self.observe)
