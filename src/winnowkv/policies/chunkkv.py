"""ChunkKV: whole chunks of consecutive tokens stay or go, over any scorer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.compose import SelectorWrapper, from_inner
from winnowkv.policies.parts import Selector
from winnowkv.scoring.select import top_windows, with_recent, with_sinks
from winnowkv.scoring.spans import window_reduce
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class ChunkKV(SelectorWrapper):
    """The best chunks of consecutive tokens, for each head of the inner scorer (arXiv 2502.00299).

    Formula
    -------
    ``score of a chunk = sum of the inner policy's score[i] over its tokens``.

    Parameters
    ----------
    of: the policy whose scores and budgets are used.
    chunk: tokens of a chunk.

    Departures
    ----------
    From the paper: the last chunk, which would pass the budget, gives its best tokens, so that the budget is met to the entry;
    a shorter chunk at the end counts by its mean; no layer takes over another one's indices.
    """

    name: ClassVar[str] = "chunkkv"
    source: ClassVar[str] = "ChunkKV, arXiv 2502.00299, section 3"
    scope: ClassVar[str] = "chunks of consecutive tokens, heads and budgets as the inner policy"
    purpose: ClassVar[str] = "around another policy: neighbouring tokens stay together"
    keeps_spans: ClassVar[bool] = True
    keeps_equal = from_inner("keeps_equal")

    chunk: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("chunk", minimum=1)

    def selector_over(self, inner: Selector) -> Selector:
        """The same sinks and recent tokens, other context tokens."""
        return Chunks(inner.tokens, inner.window, inner.sinks, inner=inner, chunk=self.chunk)


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
