"""Winnow: retrieval heads of the whole model choose whole sentences, once, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from winnowkv.errors import ProfileError
from winnowkv.fingerprint import Fingerprint
from winnowkv.layout import Layout
from winnowkv.policies.base import Policy, Prompt
from winnowkv.profile import Profile, find_profile
from winnowkv.scores import concentrated, some_heads_attention, span_owner, span_reduce, window_attention
from winnowkv.select import top_spans, with_recent, with_sinks
from winnowkv.task import TaskProfile
from winnowkv.types import Entries, Indices, Keys, Queries, Scores

WIDTH = 16  # tokens of a span where nobody knows the sentences


@dataclass(frozen=True, kw_only=True)
class Winnow(Policy):
    """Sentences by the best ``heads`` semantic retrieval heads of the whole model, seen from the question; all layers alike.

    The heads are CompressKV's (arXiv 2508.02401), taken over all layers; the spans WindowKV's (arXiv 2503.17922),
    cut at the ends of sentences and lines and behind ``longest`` tokens, scored by their ``top`` best; the shrinking
    of earlier layers DynamicKV's (arXiv 2412.14838): until the last of the heads was heard every layer keeps
    candidates, so that never more than ``peak`` of the full cache is held (or all, with ``progressive=false``).
    Where no profile fits, the heads that attend most to one span of this prompt stand in. Without a layout
    (:func:`winnowkv.layout.read_layout`) spans are 16 tokens and the question is the last ``observe``.
    """

    name: ClassVar[str] = "winnow"
    source: ClassVar[str] = "ours, docs/winnow-policy.md"
    scope: ClassVar[str] = "sentences, same for all heads and layers"

    by_layout: ClassVar[bool] = True

    sinks: int = 4
    observe: int = 32
    heads: int = 16
    top: int = 8
    longest: int = 32
    peak: float = 0.35
    progressive: bool = True
    profile: str | Profile | None = None
    layout: Layout | None = None  # given by for_task()

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("observe", "heads", "top", "longest"):
            self.require(option, minimum=1)
        self.require("peak", minimum=0, maximum=1)

    def for_task(self, profile: TaskProfile) -> Winnow:
        """The policy with the prompt's layout, where somebody has read it."""
        return replace(self, layout=profile.layout)

    def for_model(self, model: Fingerprint) -> Winnow:
        """The policy with the model's profile, where there is one; raises ProfileError only for one that was asked for."""
        try:
            return replace(self, profile=find_profile(self.profile, model))
        except ProfileError:
            if self.profile is not None:
                raise
            return self

    def place(self, tokens: int) -> tuple[int, int, Sequence[int], int]:
        """Question and tail in tokens, ends of spans, longest span of a prompt."""
        found = self.layout
        if found is None or found.tokens != tokens or found.question > tokens // 2:
            return self.observe, 0, (), min(WIDTH, self.longest)
        return found.question, found.tail, found.ends, self.longest

    def reads(self, tokens: int) -> int:
        """The question, and what the chat template put behind it."""
        return self.place(tokens)[0]

    def spans(self, tokens: int, scores: Scores) -> Tensor:
        """The span of each token that ``scores`` are of, in a prompt of ``tokens``; the sinks are one."""
        _, _, ends, longest = self.place(tokens)
        return span_owner(scores.shape[-1], (self.sinks, *ends), longest).to(scores.device)

    @property
    def chosen(self) -> Sequence[tuple[int, int]]:
        """The heads as ``(layer, head)``; none without a profile."""
        return self.profile.top_heads(self.heads) if isinstance(self.profile, Profile) else ()

    def limit(self, layer: int, prompt: Prompt) -> int:
        """What each layer may hold once ``layer`` was read."""
        layers = [at for at, _ in self.chosen] or [0, prompt.layers - 1]
        if layer >= max(layers):
            return prompt.budget
        if layer < min(layers):
            return prompt.tokens
        # One layer is whole while it is read; the others share what is left of the peak.
        room = int((self.peak * prompt.layers - 1) * prompt.tokens) // (layer + 1)
        return max(min(room, prompt.tokens), prompt.budget) if self.progressive else prompt.tokens

    def ceilings(self, prompt: Prompt) -> list[int]:
        """Falling from the whole prompt to the budget."""
        return [self.limit(layer, prompt) for layer in range(prompt.layers)]

    def revise(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[Entries]:
        """All layers seen so far come down together."""
        return [min(entries, self.limit(len(scores) - 1, prompt)) for entries in held]

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """The same for every layer."""
        return [prompt.budget] * prompt.layers

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Attention of this layer's chosen heads from the question, ``[1, heads, C]``; nothing where it has none of them."""
        tokens = keys.shape[2]
        window, tail, _, _ = self.place(tokens)
        queries, keys = queries[:, :, : window - tail], keys[:, :, : tokens - tail]
        if not isinstance(self.profile, Profile):
            attention = window_attention(queries, keys, scale)
            return concentrated(attention, self.spans(tokens, attention), self.sinks, self.heads)
        mine = [head for at, head in self.chosen if at == layer]
        if not mine:
            return keys.new_zeros(1, 0, tokens - window, dtype=torch.float32)
        return some_heads_attention(queries, keys, scale, mine)

    def shared(self, scores: Sequence[Scores], prompt: Prompt) -> Scores:
        """The mean over all heads heard so far, ``[1, 1, C]``."""
        together = torch.cat(list(scores), 1)
        if not isinstance(self.profile, Profile):
            together = concentrated(together, self.spans(prompt.tokens, together), self.sinks, self.heads)
        return together.sum(1, keepdim=True) / max(together.shape[1], 1)

    def select(self, layer: int, scores: Scores, entries: Entries, prompt: Prompt) -> Indices:
        """Sinks, the best sentences, and the question as far as it takes half of what stays."""
        recent = min(self.reads(prompt.tokens), max(self.observe, int(entries) // 2))
        owner = self.spans(prompt.tokens, scores)
        first = with_sinks(scores, self.sinks)
        context = top_spans(span_reduce(first.clamp(min=0), owner, self.top), first, owner, int(entries) - recent)
        return with_recent(context, prompt.tokens, recent)
