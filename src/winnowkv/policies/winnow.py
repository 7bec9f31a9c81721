"""Winnow: whole sentences that the model's retrieval heads look at, and tokens that the answer is expected to need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from winnowkv.errors import ProfileError
from winnowkv.models.calibration import Profile, find_profile
from winnowkv.models.info import Fingerprint
from winnowkv.policies.base import Policy, Prompt
from winnowkv.policies.expected import Expected
from winnowkv.policies.sentences import Sentences
from winnowkv.prompt.task import Task, TaskProfile
from winnowkv.types import Entries, HeadScores, Indices, Scores

STEP = 2.0  # layers that wait for the heads shrink to make room for so many times themselves


@dataclass(frozen=True, kw_only=True)
class Winnow(Sentences):
    """Sentences for all layers by the model's retrieval heads, seen from the question; the rest of the budget as ``expected``.

    Sentences get ``share`` of the budget, at least ``least`` entries; none where the task is aggregation or ``share=0``.
    The heads are CompressKV's (arXiv 2508.02401) of all layers, weighted by their score: those that score half of the
    best, or ``heads`` of them. The spans are WindowKV's (arXiv 2503.17922), cut at the ends of sentences and lines and
    behind ``longest`` tokens, scored by their ``top`` best. Until the last of the heads was heard every layer keeps
    candidates, fewer the more layers there are (as DynamicKV, arXiv 2412.14838): never more than ``peak`` of the full
    cache where the first head sits early enough, or all with ``progressive=false``.
    Without a profile the heads that attend most to one span of this prompt stand in, and all is held until the last layer
    was heard; without a layout
    (:func:`winnowkv.prompt.structure.read_layout`) spans are 16 tokens and the question is the last ``observe``.
    ``observe="context"``: no question is known yet, so that all goes as ``expected``.
    """

    name: ClassVar[str] = "winnow"
    source: ClassVar[str] = "ours, docs/winnow-policy.md"
    scope: ClassVar[str] = "sentences, same for all heads and layers, and tokens per KV head, layers by this prompt's attention"
    by_task: ClassVar[bool] = True
    by_layout: ClassVar[bool] = True

    peak: float = 0.35
    progressive: bool = True
    fallback: Task = "localization"  # where nobody said, or a classifier is less than ``sure``
    sure: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("peak", "sure"):
            self.require(option, minimum=0, maximum=1)

    def for_task(self, profile: TaskProfile) -> Winnow:
        """The policy with the prompt's task and layout, where somebody has looked."""
        unsure = profile.probability is not None and profile.probability < self.sure
        task = self.task or (None if unsure else profile.task) or self.fallback
        return replace(self, task=task, layout=profile.layout or self.layout)

    def for_model(self, model: Fingerprint) -> Policy:
        """The policy with the model's profile, where there is one; raises ProfileError only for one that was asked for."""
        if self.observe == "context":
            blind = Expected(sinks=self.sinks, samples=self.samples, ahead=self.ahead, quantize=self.quantize)
            return blind.for_model(model)
        made = replace(self, rotation=model.rotation or self.rotation)
        try:
            return replace(made, profile=find_profile(self.profile, model))
        except ProfileError:
            if self.profile is not None:
                raise
            return made

    @property
    def hint(self) -> str | None:
        """Says that heads are guessed."""
        if isinstance(self.profile, Profile) or self.scattered:
            return None
        return (
            "no calibration profile of this model: winnow guesses its retrieval heads, and holds the whole prompt's cache "
            "until the last layer was read; winnow calibrate finds them"
        )

    def awaited(self, prompt: Prompt) -> range:
        """The layers from the first to the last head that is heard."""
        if not self.room(prompt, prompt.budget):
            return range(0)
        layers = [at for at, _ in self.chosen] or [prompt.layers - 1]  # whoever guesses heads has to compare all of them
        return range(min(layers), max(layers))

    def limit(self, layer: int, prompt: Prompt) -> int:
        """What each layer may hold once ``layer`` was read and the last of the heads was not."""
        waited = self.awaited(prompt)
        if not self.progressive or layer < waited.start:
            return prompt.tokens
        # Room for the next layers, too, so that not all of them are copied after each.
        layers = 1
        while layers <= layer:
            layers = math.ceil(layers * STEP)
        layers = min(layers, max(waited.stop, layer + 1))
        # Twice the budget each for the layers behind the last head, so that nothing shrinks for them before the end.
        behind = 2 * prompt.budget * (prompt.layers - 1 - waited.stop)
        room = (self.bound(prompt) - behind) // layers
        return max(min(room, prompt.tokens), prompt.budget)

    def bound(self, prompt: Prompt) -> int:
        """What the peak leaves beside the layer that is being read, at least an eighth more than the budget."""
        if self.scattered:
            return super().bound(prompt)
        return max(prompt.total * 9 // 8, int((self.peak * prompt.layers - 1) * prompt.tokens))

    def peak_entries(self, prompt: Prompt) -> int:
        """The layers seen at their limits, and the layer that is being read."""
        waiting = range(self.awaited(prompt).stop)
        return max([super().peak_entries(prompt), *(self.limit(at, prompt) * (at + 1) + prompt.tokens for at in waiting)])

    def shared(self, heard: Sequence[HeadScores], prompt: Prompt, earlier: Indices | None) -> Indices | None:
        """The best sentences so far, more of them while heads are awaited."""
        entries = prompt.budget if len(heard) > self.awaited(prompt).stop else self.limit(len(heard) - 1, prompt)
        room = self.room(prompt, entries)
        if earlier is not None and earlier.shape[-1] <= room:
            return earlier  # a part of it that is as large is the same
        return self.best(heard, prompt.tokens, room, earlier)

    def revise(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """All layers come down together while heads are awaited, then they share the budget."""
        if len(scores) > self.awaited(prompt).stop:
            return super().revise(scores, held, prompt)
        return [min(int(entries), self.limit(len(scores) - 1, prompt)) for entries in held]
