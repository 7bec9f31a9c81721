"""WindowKV: windows of consecutive tokens, scored by task, shared by groups of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from winnowkv.models.info import ModelInfo
from winnowkv.policies.observation import WindowPolicy, WindowScorer
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
GROUP, SLOPE = 6, 14.0  # of paper and repository


class Review(NamedTuple):
    """Windows of ``window`` tokens, scored by their ``top`` best, for ``group`` layers at a time; the budgets' ``slope``."""

    window: int
    top: int
    group: int
    slope: float


# For a question that looks at one place of the text: measured on tuning needles, docs/log.md.
QUESTION_REVIEW = Review(window=16, top=4, group=3, slope=1.0)


@dataclass(frozen=True, kw_only=True)
class WindowKV(WindowPolicy):
    """The best windows of consecutive tokens, one selection for each group of layers (arXiv 2503.17922).

    Paper and repository (optim996/WindowKV) disagree on the numbers; ``preset`` names whom to follow, options that are given
    win over it. Tokens that look, ``window`` and ``top``, for localization and for aggregation: ``paper`` 16, 8, 8 and
    32, 16, 8; ``repo`` 32, 8, 4 and 16, 8, 8. The paper does not state its top-p for windows of 16: half of it here.

    Without a preset the question looks where it is known, and if the task is localization, groups are of 3 layers, budgets
    equal and windows of 16 tokens, which finds twice as much (docs/log.md); the repository's numbers else.

    Formula
    -------
    ``score of a window = mean over all query heads(mean of the top best of s[i])``, ``s[i] = sum over q of A[q, i]`` in the
    first layer of the group. Above the recent tokens budgets fall in equal steps from group to group, to ``mean / slope`` in
    the last.

    Parameters
    ----------
    preset: ``paper`` or ``repo``: whose numbers.
    window: tokens of a review window; None: by preset and task.
    top: its best tokens, which are its score; None: by preset and task.
    group: layers that keep the same windows; None: 6, or 3 as said above.
    slope: the mean budget over the last group's; None: 14, or 1 as said above.
    task: ``localization`` or ``aggregation``; None: the prompt's.
    fallback: the task if a classifier is less than ``sure``.
    sure: the probability that a classifier must have.

    Departures
    ----------
    From the repository: the budget includes the window and is met to the entry, the group's size does not bend the pyramid, no
    selection is stale, every prompt of a batch votes alone. The question looks where it is known (``preset`` takes the
    published window).
    """

    name: ClassVar[str] = "windowkv"
    source: ClassVar[str] = "WindowKV, arXiv 2503.17922"
    scope: ClassVar[str] = "windows, same for all heads and a group of layers, falling budgets"
    purpose: ClassVar[str] = "passages rather than words; wants to know the prompt's task"
    uses_task: ClassVar[bool] = True
    keeps_spans: ClassVar[bool] = True
    own_selector: ClassVar[bool] = True

    published: ClassVar[int] = 32  # of localization; see PRESETS

    window: int | None = None
    top: int | None = None
    group: int | None = None
    slope: float | None = None
    preset: Literal["paper", "repo"] | None = None  # type: ignore[assignment]
    task: Task | None = None
    fallback: Task = "localization"  # if a classifier is less than ``sure``
    sure: float = 0.75

    def __post_init__(self) -> None:
        for option in ("window", "top", "group", "slope", "sure"):
            self.require(option, minimum=0 if option == "sure" else 1)
        super().__post_init__()

    def check(self, model: ModelInfo, task: TaskProfile | None) -> None:
        """Raise PolicyError if the task is neither an option nor known."""
        if task is not None:
            self.decided(task)

    def decided(self, task: TaskProfile) -> Task:
        """The task to work with."""
        return self.task or task.decided(self.name, self.sure, self.fallback)

    @property
    def looks_from(self) -> str:
        """Which tokens look, in words; without a ``task`` those of both."""
        if isinstance(self.observe, int):
            return super().looks_from
        sizes = {task: numbers[0] for task, numbers in PRESETS[self.preset or "repo"].items()}
        both = " or ".join(f"{size} ({task})" for task, size in sizes.items())
        last = f"the last {sizes[self.task] if self.task else both} tokens"
        return f"the question, or {last} if it is not known" if self.uses_structure else last

    def published_window(self, prompt: PromptInfo) -> int:
        """The preset's for the prompt's task."""
        return PRESETS[self.preset or "repo"][self.decided(prompt.task)][0]

    def review(self, prompt: PromptInfo) -> Review:
        """As given, or the preset's for the prompt's task, or those for a question that looks."""
        task = self.decided(prompt.task)
        found = Review(*PRESETS[self.preset or "repo"][task][1:], GROUP, SLOPE)
        if self.preset is None and task == "localization" and self.asking(prompt) is not None:
            found = QUESTION_REVIEW
        given = {name: value for name in Review._fields if (value := getattr(self, name)) is not None}
        return found._replace(**given)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the observation window's attention, once for a group of layers."""
        window = self.observed(prompt)
        return GroupScorer(prompt.tokens, window.size, tail=window.tail, group=self.review(prompt).group)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """Falling from group to group."""
        review, recent = self.review(prompt), self.observed(prompt).recent
        return GroupAllocator(prompt, recent=recent, sinks=self.sinks, group=review.group, slope=review.slope)

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """Whole review windows."""
        review, window = self.review(prompt), self.observed(prompt)
        end = (prompt.tokens, window.size, self.sinks, window.recent)
        return ReviewWindows(*end, width=review.window, top=review.top)


@dataclass(frozen=True, kw_only=True)
class GroupScorer(WindowScorer):
    """Attention of the first layer of each ``group`` of layers."""

    group: int
    shares_heads: ClassVar[bool] = True

    def leader(self, layer: int) -> int:
        """The first layer of the group."""
        return layer - layer % self.group

    def score(self, states: LayerStates) -> Scores:
        """Attention of every query head, ``[1, Hq, C]``: windows are scored head by head in the selector."""
        states = self.seen(states)
        return states.heads.whole(window_attention(states.queries, states.keys, states.scale))


@dataclass(frozen=True, kw_only=True)
class GroupAllocator(Allocator):
    """Budgets that fall in equal steps from group to group; ``recent`` entries on top, ``sinks`` at least."""

    recent: int
    sinks: int
    group: int
    slope: float

    def prefill_limits(self) -> list[int]:
        """Falling in equal steps from group to group; sinks are every layer's floor."""
        prompt, recent = self.prompt, self.recent
        mean, cap = prompt.budget - recent, prompt.tokens - recent
        budgets = arithmetic_groups(prompt.layers, self.group, mean, self.slope, cap, self.sinks)
        return [entries + recent for entries in budgets]


@dataclass(frozen=True, kw_only=True)
class ReviewWindows(Selector):
    """The best windows of ``width`` tokens by the mean of their ``top`` best, the same for all heads."""

    width: int
    top: int

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """The best windows by the mean over heads, ``[1, 1, entries]``."""
        recent = self.recent_tokens(scores.shape[-1], entries)
        windows = window_reduce(with_sinks(scores, self.sinks), self.width, self.top).mean(1, keepdim=True)
        tokens = with_sinks(scores.mean(1, keepdim=True), self.sinks)
        context = top_windows(windows, tokens, int(entries) - recent, self.width)
        return with_recent(context, self.tokens, recent)
