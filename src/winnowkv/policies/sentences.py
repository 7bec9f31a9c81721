"""Sentences: which spans of a prompt its question asks for, by the heads of the model that look things up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from winnowkv.models.calibration import Profile
from winnowkv.policies.base import GIVEN, Prompt
from winnowkv.policies.expected import Expected
from winnowkv.prompt.structure import Layout
from winnowkv.prompt.task import Task
from winnowkv.scoring.attention import some_heads_attention, window_attention
from winnowkv.scoring.select import top_spans
from winnowkv.scoring.spans import concentrated, span_owner, span_reduce
from winnowkv.types import HeadScores, Indices, Keys, Queries, Scores

WIDTH = 16  # tokens of a span where nobody knows the sentences
UNKNOWN = 16  # heads that stand in for retrieval heads where there is no profile
NEAR = 64  # tokens before the question that do not choose them


@dataclass(frozen=True, kw_only=True)
class Sentences(Expected):
    """What ``winnow`` adds to ``expected``: question, spans, the heads that are heard, and the spans that these choose."""

    observe: int | Literal["context"] = 32  # type: ignore[assignment]  # for_model() leaves numbers only
    share: float = 0.25
    least: int = 40
    heads: int | None = None
    top: int = 8
    longest: int = 32
    profile: str | Profile | None = None
    task: Task | None = None
    layout: Layout | None = field(default=None, metadata=GIVEN)  # by for_task()

    def __post_init__(self) -> None:
        if self.observe != "context":
            super().__post_init__()
            self.require("observe", minimum=1)
        for option in ("heads", "top", "longest"):
            self.require(option, minimum=1)
        self.require("share", minimum=0, maximum=1)
        self.require("least", minimum=0)

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

    def wanted(self, tokens: int) -> Tensor:
        """The sampled ones, and those of the question where it chooses sentences."""
        sampled = super().wanted(tokens)
        if self.scattered:
            return sampled
        window, tail, _, _ = self.place(tokens)
        return torch.cat([sampled, torch.arange(max(tokens - window, 0), tokens - tail)])

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
        return owners(scores.shape[-1], (self.sinks, *ends), longest, scores.device)

    @cached_property  # every layer asks, and the heads of a model never change
    def chosen(self) -> Sequence[tuple[int, int]]:
        """The heads as ``(layer, head)``; none without a profile."""
        if not isinstance(self.profile, Profile):
            return ()
        return self.profile.strong_heads() if self.heads is None else self.profile.top_heads(self.heads)

    def hear(self, layer: int, queries: Queries, keys: Keys, scale: float) -> HeadScores | None:
        """Attention of this layer's chosen heads from the question, weighted by their score, ``[1, heads, C]``."""
        if self.scattered:
            return None
        tokens = keys.shape[2]
        window, tail, _, _ = self.place(tokens)
        queries, keys = queries[:, :, queries.shape[2] - (window - tail) :], keys[:, :, : tokens - tail]
        if not isinstance(self.profile, Profile):
            return self.loudest(window_attention(queries, keys, scale), tokens)
        mine = [head for at, head in self.chosen if at == layer]
        if not mine:
            return keys.new_zeros(1, 0, tokens - window, dtype=torch.float32)
        weights = torch.tensor([self.profile.semantic[layer][head] for head in mine]).to(keys.device, non_blocking=True)
        return some_heads_attention(queries, keys, scale, mine) * weights[:, None]

    def loudest(self, heard: HeadScores, tokens: int) -> HeadScores:
        """The heads that stand in where there is no profile."""
        near = min(NEAR, heard.shape[-1] // 8)
        return concentrated(heard, self.spans(tokens, heard), self.sinks, near, self.heads or UNKNOWN)

    def best(self, heard: Sequence[HeadScores], tokens: int, count: int, earlier: Indices | None) -> Indices:
        """So many tokens of the best sentences so far, ``[1, 1, count]``, out of those that won ``earlier``."""
        together = torch.cat(list(heard), 1)
        if not isinstance(self.profile, Profile):
            together = self.loudest(together, tokens)
        scores = together.sum(1, keepdim=True)
        gone = torch.arange(scores.shape[-1], device=scores.device) < self.sinks
        if earlier is not None:
            gone = gone | torch.ones_like(gone).index_fill(0, earlier[0, 0].long(), False)
        owner, scores = self.spans(tokens, scores), scores.masked_fill(gone, -1.0)
        count = min(count, scores.shape[-1] - self.sinks)
        return top_spans(span_reduce(scores.clamp(min=0), owner, self.top), scores, owner, count)


@lru_cache(maxsize=16)  # every layer of a prompt asks for the same
@torch.inference_mode(False)  # or the next prompt, which may be read outside of it, could not use it
def owners(tokens: int, ends: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """:func:`winnowkv.scoring.spans.span_owner` on the device."""
    return span_owner(tokens, ends, longest).to(device)
