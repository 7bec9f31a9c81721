"""HeadKV: every head of the model has a budget of its own, by its importance found offline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from winnowkv.errors import PolicyError
from winnowkv.models.calibration import HeadKind, Profile, find_profile
from winnowkv.models.info import Fingerprint
from winnowkv.policies.base import Prompt
from winnowkv.policies.snapkv import SnapKV
from winnowkv.scoring.allocate import weighted
from winnowkv.scoring.select import ragged_tokens, with_recent, with_sinks
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class HeadKV(SnapKV):
    """A fixed part for every head, the pool ``budget / beta`` by head importance (arXiv 2410.19258, section 3).

    Importance is a profile's head score to the power ``temperature``, over all heads of all
    layers. Departures: the authors measure retrieval-reasoning heads on prompts of their own, here
    ``heads`` names the score of our calibration; a KV head's weight is the mean of its query heads'.
    Heads are stored padded to the longest of the layer: the report's held bytes say so.
    """

    name: ClassVar[str] = "headkv"
    source: ClassVar[str] = "HeadKV, arXiv 2410.19258, section 3"
    scope: ClassVar[str] = "tokens per KV head, budgets over all heads of the model by a profile"
    by_profile: ClassVar[bool] = True
    per_head: ClassVar[bool] = True

    profile: str | Profile | None = None
    heads: HeadKind = "semantic"
    beta: float = 1.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", minimum=1)
        self.require("temperature", minimum=0)

    def for_model(self, model: Fingerprint) -> HeadKV:
        """The policy with the model's profile read."""
        return replace(self, profile=find_profile(self.profile, model))

    def budgets(self, prompt: Prompt) -> list[tuple[int, ...]]:
        """Context entries of every KV head, a list for each layer."""
        if not isinstance(self.profile, Profile):
            raise PolicyError("headkv was not told its model: call for_model() first")
        kv_heads = self.profile.fingerprint.kv_heads
        weights = tuple(w**self.temperature for w in self.profile.kv_weights(self.heads))
        mean, cap = prompt.budget - self.observe, prompt.tokens - self.observe
        safe = max(mean - int(mean / self.beta), self.sinks)
        flat = weighted(weights, mean, safe, cap)
        return [flat[at : at + kv_heads] for at in range(0, len(flat), kv_heads)]

    def ceilings(self, prompt: Prompt) -> list[Entries]:
        """The mean over a layer's heads; a fraction where they do not divide."""
        return [Fraction(sum(heads), len(heads)) + self.observe for heads in self.budgets(prompt)]

    def select(self, layer: int, scores: Scores, entries: Entries, prompt: Prompt) -> Indices:
        """As many tokens of each head as it was given."""
        context = ragged_tokens(with_sinks(scores, self.sinks), self.budgets(prompt)[layer])
        return with_recent(context, prompt.tokens, self.observe)
