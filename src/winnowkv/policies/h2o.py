"""H2O: heavy hitters of the whole prompt, and its most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import LayerStates, PromptInfo, Scorer, Selector
from winnowkv.scoring.attention import GroupKind, accumulated_attention, group_reduce
from winnowkv.scoring.select import top_tokens, with_recent, with_sinks
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class H2O(TokenPolicy):
    """Attention accumulated over every query of the prompt, and recent tokens (arXiv 2306.14048, section 4).

    Formula
    -------
    ``score[i] = mean over the group(sum over q of A[q, i])``, over all queries of the prompt.

    Parameters
    ----------
    recent: share of the budget that goes to the most recent tokens (the paper halves it).
    group_by: how the query heads of a KV head vote together, ``mean`` or ``max``.

    Departures
    ----------
    From the paper: it evicts one token at every step of prefill and decoding, here the accumulated scores choose once, at the
    end of prefill; a GQA group votes together (``group_by``).
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "H2O, arXiv 2306.14048, section 4"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"
    purpose: ClassVar[str] = "to compare: what the whole prompt looked at, and recent tokens"
    keeps_equal: ClassVar[bool] = True

    recent: float = 0.5
    group_by: GroupKind = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("recent", minimum=0, maximum=1)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By all queries' attention."""
        return AccumulatedScorer(prompt.tokens, self.observe, group_by=self.group_by)

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """Heavy hitters and recent tokens."""
        return HeavyHitters(prompt.tokens, self.observe, self.sinks, share=self.recent)


@dataclass(frozen=True, kw_only=True)
class AccumulatedScorer(Scorer):
    """Attention of every query of the prompt."""

    group_by: GroupKind
    shares_heads: ClassVar[bool] = True

    def query_positions(self) -> Tensor:
        """All."""
        return torch.arange(self.tokens)

    def score(self, states: LayerStates) -> Scores:
        """Accumulated attention, ``[1, Hkv, C]``, a block of queries at a time."""
        total = accumulated_attention(states.queries, states.keys, states.scale)[..., : self.tokens - self.window]
        return states.heads.whole(group_reduce(total, states.kv_heads, self.group_by))


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(Selector):
    """The best of the older tokens and, with ``share`` of the budget, the latest ones."""

    share: float

    def recent_tokens(self, context: int, entries: Entries) -> int:
        """The observation window, and the share of what it leaves."""
        free = int(entries) - self.window
        return self.window + min(int(self.share * free), free - self.sinks)

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """Heavy hitters among the older tokens, and the recent ones."""
        recent = self.recent_tokens(scores.shape[-1], entries)
        older = with_sinks(scores[..., : self.tokens - recent], self.sinks)
        return with_recent(top_tokens(older, int(entries) - recent), self.tokens, recent)
