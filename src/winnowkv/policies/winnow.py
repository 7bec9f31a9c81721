"""Winnow: whole sentences that the model's retrieval heads look at, and tokens that the answer is expected to need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from winnowkv.errors import ProfileError
from winnowkv.fingerprint import Fingerprint
from winnowkv.layout import Layout
from winnowkv.policies.base import GIVEN, Policy, Prompt
from winnowkv.policies.expected import Expected
from winnowkv.profile import Profile, find_profile
from winnowkv.scores import concentrated, some_heads_attention, span_owner, span_reduce, window_attention
from winnowkv.select import top_spans
from winnowkv.task import Task, TaskProfile
from winnowkv.types import Entries, HeadScores, Indices, Keys, Queries, Scores

WIDTH = 16  # tokens of a span where nobody knows the sentences
UNKNOWN = 16  # heads that stand in for retrieval heads where there is no profile


@dataclass(frozen=True, kw_only=True)
class Winnow(Expected):
    """Sentences for all layers by the model's retrieval heads, seen from the question; the rest of the budget as ``expected``.

    Sentences get ``share`` of the budget, at least ``least`` entries; none where the task is aggregation or ``share=0``.
    The heads are CompressKV's (arXiv 2508.02401) of all layers, weighted by their score: those that score half of the
    best, or ``heads`` of them. The spans are WindowKV's (arXiv 2503.17922), cut at the ends of sentences and lines and
    behind ``longest`` tokens, scored by their ``top`` best. Until the last of the heads was heard every layer keeps
    candidates, fewer with each (as DynamicKV, arXiv 2412.14838): never more than ``peak`` of the full cache where the
    first head sits early enough, or all with ``progressive=false``.
    Without a profile the heads that attend most to one span of this prompt stand in; without a layout
    (:func:`winnowkv.layout.read_layout`) spans are 16 tokens and the question is the last ``observe``.
    ``observe="context"``: no question is known yet, so that all goes as ``expected``.
    """

    name: ClassVar[str] = "winnow"
    source: ClassVar[str] = "ours, docs/winnow-policy.md"
    scope: ClassVar[str] = "sentences, same for all heads and layers, and tokens per KV head, layers by this prompt's attention"
    by_task: ClassVar[bool] = True
    by_layout: ClassVar[bool] = True

    observe: int | Literal["context"] = 32  # type: ignore[assignment]  # for_model() leaves numbers only
    share: float = 0.25
    least: int = 40
    heads: int | None = None
    top: int = 8
    longest: int = 32
    peak: float = 0.35
    progressive: bool = True
    profile: str | Profile | None = None
    task: Task | None = None
    fallback: Task = "localization"  # where nobody said, or a classifier is less than ``sure``
    sure: float = 0.75
    layout: Layout | None = field(default=None, metadata=GIVEN)  # by for_task()

    def __post_init__(self) -> None:
        if self.observe != "context":
            super().__post_init__()
            self.require("observe", minimum=1)
        for option in ("heads", "top", "longest"):
            self.require(option, minimum=1)
        for option in ("share", "peak", "sure"):
            self.require(option, minimum=0, maximum=1)
        self.require("least", minimum=0)

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
        return "no calibration profile of this model: winnow guesses its retrieval heads; winnow calibrate finds them"

    def minimum_budget(self) -> int:
        """Sinks and the last tokens; those of ``expected`` where no question is known."""
        return self.sinks + (Expected.observe if self.observe == "context" else self.observe)

    @property
    def scattered(self) -> bool:
        """Whether no sentences are kept."""
        return self.task == "aggregation" or not self.share

    def place(self, tokens: int) -> tuple[int, int, Sequence[int], int]:
        """Question and tail in tokens, ends of spans, longest span of a prompt."""
        found = self.layout
        if found is None or found.tokens != tokens or found.question > tokens // 2:
            return int(self.observe), 0, (), min(WIDTH, self.longest)
        return found.question, found.tail, found.ends, self.longest

    def window(self, tokens: int) -> int:
        """The question, and what the chat template put behind it."""
        return self.place(tokens)[0]

    def recent(self, prompt: Prompt) -> int:
        """The question as far as it takes half of the budget."""
        return min(self.window(prompt.tokens), max(int(self.observe), prompt.budget // 2), prompt.budget - self.sinks)

    def room(self, prompt: Prompt, entries: int) -> int:
        """What sentences get of a layer's ``entries``."""
        if self.scattered:
            return 0
        return max(min(max(int(self.share * entries), self.least), entries - self.sinks - self.recent(prompt)), 0)

    def always(self, prompt: Prompt) -> int:
        """Sinks, sentences and question."""
        return super().always(prompt) + self.room(prompt, prompt.budget)

    def spans(self, tokens: int, scores: Scores) -> Tensor:
        """The span of each token that ``scores`` are of, in a prompt of ``tokens``; the sinks are one."""
        _, _, ends, longest = self.place(tokens)
        return span_owner(scores.shape[-1], (self.sinks, *ends), longest).to(scores.device)

    @cached_property  # every layer asks, and the heads of a model never change
    def chosen(self) -> Sequence[tuple[int, int]]:
        """The heads as ``(layer, head)``; none without a profile."""
        if not isinstance(self.profile, Profile):
            return ()
        return self.profile.strong_heads() if self.heads is None else self.profile.top_heads(self.heads)

    def awaited(self, prompt: Prompt) -> range:
        """The layers from the first to the last head that is heard."""
        if not self.room(prompt, prompt.budget):
            return range(0)
        layers = [at for at, _ in self.chosen] or [0, prompt.layers - 1]
        return range(min(layers), max(layers))

    def limit(self, layer: int, prompt: Prompt) -> int:
        """What each layer may hold once ``layer`` was read and the last of the heads was not."""
        if not self.progressive or layer < self.awaited(prompt).start:
            return prompt.tokens
        # One layer is whole while it is read; the others share what is left of the peak.
        room = int((self.peak * prompt.layers - 1) * prompt.tokens) // (layer + 1)
        return max(min(room, prompt.tokens), prompt.budget)

    def peak_entries(self, prompt: Prompt) -> int:
        """The layers seen at their limits, and the layer that is being read."""
        waiting = range(self.awaited(prompt).stop)
        return max([super().peak_entries(prompt), *(self.limit(at, prompt) * (at + 1) + prompt.tokens for at in waiting)])

    def hear(self, layer: int, queries: Queries, keys: Keys, scale: float) -> HeadScores | None:
        """Attention of this layer's chosen heads from the question, weighted by their score, ``[1, heads, C]``."""
        if self.scattered:
            return None
        tokens = keys.shape[2]
        window, tail, _, _ = self.place(tokens)
        queries, keys = queries[:, :, queries.shape[2] - window : queries.shape[2] - tail], keys[:, :, : tokens - tail]
        if not isinstance(self.profile, Profile):
            attention = window_attention(queries, keys, scale)
            return concentrated(attention, self.spans(tokens, attention), self.sinks, self.heads or UNKNOWN)
        mine = [head for at, head in self.chosen if at == layer]
        if not mine:
            return keys.new_zeros(1, 0, tokens - window, dtype=torch.float32)
        weights = torch.tensor([self.profile.semantic[layer][head] for head in mine], device=keys.device)
        return some_heads_attention(queries, keys, scale, mine) * weights[:, None]

    def shared(self, heard: Sequence[HeadScores], prompt: Prompt, earlier: Indices | None) -> Indices | None:
        """The best sentences so far, more of them while heads are awaited."""
        entries = prompt.budget if len(heard) > self.awaited(prompt).stop else self.limit(len(heard) - 1, prompt)
        together = torch.cat(list(heard), 1)
        if not isinstance(self.profile, Profile):
            together = concentrated(together, self.spans(prompt.tokens, together), self.sinks, self.heads or UNKNOWN)
        scores = together.sum(1, keepdim=True)
        gone = torch.arange(scores.shape[-1], device=scores.device) < self.sinks
        if earlier is not None:
            gone = gone | torch.ones_like(gone).index_fill(0, earlier[0, 0].long(), False)
        owner, scores = self.spans(prompt.tokens, scores), scores.masked_fill(gone, -1.0)
        room = min(self.room(prompt, entries), scores.shape[-1] - self.sinks)
        return top_spans(span_reduce(scores.clamp(min=0), owner, self.top), scores, owner, room)

    def revise(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """All layers come down together while heads are awaited, then they share the budget."""
        if len(scores) > self.awaited(prompt).stop:
            return self.allocate(scores, held, prompt)
        return [min(int(entries), self.limit(len(scores) - 1, prompt)) for entries in held]
