"""HeadKV: every head of the model has a budget of its own, by its importance found offline."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from winnowkv.models.calibration import CalibrationProfile, HeadKind, find_profile
from winnowkv.models.info import ModelInfo
from winnowkv.policies.parts import Allocator, PromptInfo, Selector
from winnowkv.policies.snapkv import SnapKV
from winnowkv.prompt.task import TaskProfile
from winnowkv.scoring.allocate import weighted
from winnowkv.scoring.select import ragged_tokens, with_recent, with_sinks
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class HeadKV(SnapKV):
    """A fixed part for every head, and a pool that is shared by head importance (arXiv 2410.19258, section 3).

    Importance is a profile's head score, over all heads of all layers. Heads are stored padded to the longest of the layer: the
    report's held bytes say so.

    Formula
    -------
    ``score[i] = pool(mean over the group(sum over q of A[q, i]))``. ``entries[h] = mean - mean / beta + pool * w[h]^temperature
    / sum of w^temperature`` above the recent tokens: ``w[h]`` is the head's importance, ``mean`` the budget without the recent
    tokens, ``pool`` is ``mean / beta`` of all heads together.

    Parameters
    ----------
    kernel: neighbouring tokens whose scores are pooled, odd; 1 pools nothing.
    pooling: ``avg`` or ``max`` over them.
    group_by: how the query heads of a KV head vote together, ``mean`` or ``max``.
    profile: a calibration profile, its file or a folder of profiles; None: one that ships with the package.
    heads: which score of the profile: ``semantic`` or ``traditional``.
    beta: what the pool takes of the budget is one part in ``beta``.
    temperature: power of the importance; 0 makes all heads equal.

    Departures
    ----------
    From the paper: the authors measure retrieval-reasoning heads on prompts of their own, here ``heads`` names the score of our
    calibration; a KV head's weight is the mean of its query heads'. The question looks where it is known, not the last 32
    tokens (``preset=paper``).
    """

    name: ClassVar[str] = "headkv"
    source: ClassVar[str] = "HeadKV, arXiv 2410.19258, section 3"
    scope: ClassVar[str] = "tokens per KV head, budgets over all heads of the model by a profile"
    purpose: ClassVar[str] = "one fact in a long text, with a model that has a profile"
    needs_profile: ClassVar[bool] = True
    per_head: ClassVar[bool] = True
    own_selector: ClassVar[bool] = True

    profile: str | CalibrationProfile | None = None
    heads: HeadKind = "semantic"
    beta: float = 1.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", minimum=1)
        self.require("temperature", minimum=0)

    def check(self, model: ModelInfo, task: TaskProfile | None) -> None:
        """Raise ProfileError if there is no profile of the model."""
        find_profile(self.profile, model)

    def budgets(self, model: ModelInfo, prompt: PromptInfo) -> list[tuple[int, ...]]:
        """Context entries of every KV head, a list for each layer; none if the prompt is kept whole."""
        if not self.evicts_from(prompt):
            return []
        profile = find_profile(self.profile, model)
        weights = tuple(w**self.temperature for w in profile.kv_weights(self.heads))
        window = self.observed(prompt)
        mean, cap = prompt.budget - window.recent, prompt.tokens - window.size
        safe = max(mean - int(mean / self.beta), self.sinks)
        flat, heads = weighted(weights, mean, safe, cap), profile.model_info.kv_heads
        return [flat[at : at + heads] for at in range(0, len(flat), heads)]

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """By head importance."""
        return HeadAllocator(prompt, recent=self.observed(prompt).recent, budgets=self.budgets(model, prompt))

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """As many tokens of each head as it was given."""
        window = self.observed(prompt)
        budgets = self.budgets(model, prompt)
        return HeadSelector(prompt.tokens, window.size, self.sinks, window.recent, budgets=budgets)


@dataclass(frozen=True, kw_only=True)
class HeadAllocator(Allocator):
    """Every head has its own budget: ``budgets`` are context entries by layer and KV head, above ``recent`` ones."""

    recent: int
    budgets: list[tuple[int, ...]]

    def prefill_limits(self) -> list[Entries]:
        """The mean over a layer's heads; a fraction if they do not divide."""
        return [Fraction(sum(heads), len(heads)) + self.recent for heads in self.budgets]


@dataclass(frozen=True, kw_only=True)
class HeadSelector(Selector):
    """The best tokens of each head, as many as ``budgets`` gives it."""

    budgets: list[tuple[int, ...]]

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """As many tokens of each head as it was given."""
        context = ragged_tokens(with_sinks(scores, self.sinks), self.budgets[layer])
        return with_recent(context, self.tokens, self.recent_tokens(scores.shape[-1], entries))
