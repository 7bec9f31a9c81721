"""H2O: heavy hitters of the whole prompt, and its most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.base import Policy, Prompt
from winnowkv.scoring.attention import GroupKind, accumulated_attention, group_reduce
from winnowkv.scoring.select import top_tokens, with_recent, with_sinks
from winnowkv.types import Entries, Indices, Keys, Queries, Scores


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Attention accumulated over every query of the prompt, half of the budget for recent tokens (arXiv 2306.14048, section 4).

    ``recent`` is the share of the budget that goes to the most recent tokens (the paper halves it).
    Departures: the paper evicts one token at every step of prefill and decoding, here the
    accumulated scores choose once, at the end of prefill; a GQA group votes together (``group_by``).
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "H2O, arXiv 2306.14048, section 4"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"

    recent: float = 0.5
    group_by: GroupKind = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("recent", minimum=0, maximum=1)

    def reads(self, tokens: int) -> int:
        """Every query of the prompt."""
        return tokens

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Accumulated attention, ``[1, Hkv, C]``, a block of queries at a time."""
        total = accumulated_attention(queries, keys, scale)[..., : keys.shape[2] - self.observe]
        return group_reduce(total, keys.shape[1], self.group_by)

    def select(self, layer: int, scores: Scores, entries: Entries, prompt: Prompt) -> Indices:
        """Heavy hitters among the older tokens, and the recent ones."""
        free = int(entries) - self.observe
        recent = min(int(self.recent * free), free - self.sinks)
        older = with_sinks(scores[..., : scores.shape[-1] - recent], self.sinks)
        return with_recent(top_tokens(older, free - recent), prompt.tokens, self.observe + recent)
