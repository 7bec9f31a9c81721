"""WindowKV: windows of consecutive tokens, scored by task, shared by groups of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import Allocator, LayerStates, PromptInfo, Scorer, Selector
from winnowkv.prompt.task import Task, TaskProfile
from winnowkv.scoring.allocate import arithmetic_groups
from winnowkv.scoring.attention import window_attention
from winnowkv.scoring.select import top_windows, with_recent, with_sinks
from winnowkv.scoring.spans import window_reduce
from winnowkv.types import Entries, Indices, Scores

# (observe, window, top) for each task. Paper and repository disagree, see the class.
PRESETS = {
    "paper": {"localization": (16, 8, 8), "aggregation": (32, 16, 8)},
    "repo": {"localization": (32, 8, 4), "aggregation": (16, 8, 8)},
}


@dataclass(frozen=True, kw_only=True)
class WindowKV(TokenPolicy):
    """Best windows of ``window`` tokens, one selection for each ``group`` of layers (arXiv 2503.17922).

    A window scores the mean of its ``top`` best tokens, mean over heads. Paper and repository
    (optim996/WindowKV) disagree on the numbers; ``preset`` names whom to follow, options that are
    given win over it. The paper does not state its top-p for windows of 16: half of it here.

    Departures from the repository: the budget includes the window and is met to the entry, the
    group's size does not bend the pyramid, no selection is stale, every prompt of a batch votes alone.
    """

    name: ClassVar[str] = "windowkv"
    source: ClassVar[str] = "WindowKV, arXiv 2503.17922"
    scope: ClassVar[str] = "windows, same for all heads and a group of layers, falling budgets"
    purpose: ClassVar[str] = "passages rather than words; wants to know the prompt's task"
    uses_task: ClassVar[bool] = True
    keeps_spans: ClassVar[bool] = True
    own_selector: ClassVar[bool] = True

    observe: int | None = None  # type: ignore[assignment]  # None takes the preset's number for the prompt's task
    window: int | None = None
    top: int | None = None
    group: int = 6
    slope: float = 14.0
    preset: Literal["paper", "repo"] = "repo"
    task: Task | None = None
    fallback: Task = "localization"  # if a classifier is less than ``sure``
    sure: float = 0.75

    def __post_init__(self) -> None:
        for option in ("sinks", "observe", "window", "top", "group", "slope", "sure"):
            self.require(option, minimum=0 if option in ("sinks", "sure") else 1)
        super().__post_init__()

    def check(self, model: ModelInfo, task: TaskProfile | None) -> None:
        """Raise PolicyError if the task is neither an option nor known."""
        if task is not None:
            self.decided(task)

    def decided(self, task: TaskProfile) -> Task:
        """The task to work with."""
        return self.task or task.decided(self.name, self.sure, self.fallback)

    def numbers(self, prompt: PromptInfo) -> tuple[int, int, int]:
        """Observation window, width of a review window and how many of its tokens score it, for the prompt's task."""
        observe, window, top = PRESETS[self.preset][self.decided(prompt.task)]
        return self.observe or observe, self.window or window, self.top or top

    def observation_window(self, prompt: PromptInfo) -> int:
        """As given, or the preset's for the prompt's task."""
        return self.numbers(prompt)[0]

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the observation window's attention, once for a group of layers."""
        return GroupScorer(prompt.tokens, self.numbers(prompt)[0], group=self.group)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """Falling from group to group."""
        return GroupAllocator(prompt, window=self.numbers(prompt)[0], sinks=self.sinks, group=self.group, slope=self.slope)

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """Whole review windows."""
        observe, width, top = self.numbers(prompt)
        return ReviewWindows(prompt.tokens, observe, self.sinks, width=width, top=top)


@dataclass(frozen=True, kw_only=True)
class GroupScorer(Scorer):
    """Attention of the first layer of each ``group`` of layers."""

    group: int
    shares_heads: ClassVar[bool] = True

    def leader(self, layer: int) -> int:
        """The first layer of the group."""
        return layer - layer % self.group

    def score(self, states: LayerStates) -> Scores:
        """Attention of every query head, ``[1, Hq, C]``: windows are scored head by head in the selector."""
        return states.heads.whole(window_attention(states.queries, states.keys, states.scale))


@dataclass(frozen=True, kw_only=True)
class GroupAllocator(Allocator):
    """Budgets that fall in equal steps from group to group; ``window`` entries on top, ``sinks`` at least."""

    window: int
    sinks: int
    group: int
    slope: float

    def prefill_limits(self) -> list[int]:
        """Falling in equal steps from group to group; sinks are every layer's floor."""
        prompt, window = self.prompt, self.window
        mean, cap = prompt.budget - window, prompt.tokens - window
        budgets = arithmetic_groups(prompt.layers, self.group, mean, self.slope, cap, self.sinks)
        return [entries + window for entries in budgets]


@dataclass(frozen=True, kw_only=True)
class ReviewWindows(Selector):
    """The best windows of ``width`` tokens by the mean of their ``top`` best, the same for all heads."""

    width: int
    top: int

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """The best windows by the mean over heads, ``[1, 1, entries]``."""
        windows = window_reduce(with_sinks(scores, self.sinks), self.width, self.top).mean(1, keepdim=True)
        tokens = with_sinks(scores.mean(1, keepdim=True), self.sinks)
        context = top_windows(windows, tokens, int(entries) - self.window, self.width)
        return with_recent(context, self.tokens, self.window)
