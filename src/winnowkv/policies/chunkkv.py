"""ChunkKV: whole chunks of consecutive tokens stay or go, over any scorer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from winnowkv.policies.compose import Wrapper
from winnowkv.policies.parts import Parts, PromptInfo, Selector
from winnowkv.scoring.select import top_windows, with_recent, with_sinks
from winnowkv.scoring.spans import window_reduce
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class ChunkKV(Wrapper):
    """The best chunks of ``chunk`` tokens by the sum of their scores, for each head of the inner scorer (arXiv 2502.00299).

    Departures from the paper: the last chunk, which would pass the budget, gives its best tokens, so that the budget is met to
    the entry; a shorter chunk at the end counts by its mean; no layer takes over another one's indices.
    """

    name: ClassVar[str] = "chunkkv"
    source: ClassVar[str] = "ChunkKV, arXiv 2502.00299, section 3"
    scope: ClassVar[str] = "chunks of consecutive tokens, heads and budgets as the inner policy"
    keeps_spans: ClassVar[bool] = True
    own_selector: ClassVar[bool] = True

    chunk: int = 10

    def __post_init__(self) -> None:
        self.require("chunk", minimum=1)
        self.require_exchangeable_selector()

    def wrap(self, inner: Parts, prompt: PromptInfo) -> Parts:
        """Its selector."""
        now = inner.selector
        return replace(inner, selector=Chunks(now.tokens, now.window, now.sinks, inner=now, chunk=self.chunk))


@dataclass(frozen=True, kw_only=True)
class Chunks(Selector):
    """Chunks of ``chunk`` tokens by the mean of their scores; sinks win within theirs."""

    chunk: int

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """The best chunks of each head of ``scores``."""
        recent = self.recent_tokens(scores.shape[-1], entries)
        tokens = with_sinks(scores[..., : self.tokens - recent], self.sinks)
        chunks = window_reduce(tokens, self.chunk, self.chunk)
        context = top_windows(chunks, tokens, int(entries) - recent, self.chunk)
        return with_recent(context, self.tokens, recent)
