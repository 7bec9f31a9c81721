"""Ada-KV: heads of a layer share its budget by where their attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.base import Prompt
from winnowkv.policies.snapkv import SnapKV
from winnowkv.scoring.allocate import global_top_k, weighted
from winnowkv.scoring.select import ragged_tokens, with_recent, with_sinks
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV's scores, one top-k over all heads of a layer, a floor for each head (arXiv 2407.11550, section 4).

    A head's part of the winners is its part of the budget; ``floor`` of the mean is safe for every
    head (the paper's alpha). Departures from the authors' code: shares are rounded by largest
    remainder, so that the budget is met to the entry; heads are KV heads, whose GQA group votes
    together. Heads are stored padded to the longest of the layer: the report's held bytes say so.
    """

    name: ClassVar[str] = "adakv"
    source: ClassVar[str] = "Ada-KV, arXiv 2407.11550, section 4"
    scope: ClassVar[str] = "tokens per KV head, budgets over the heads of a layer by this prompt's scores"
    per_head: ClassVar[bool] = True

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("floor", minimum=0, maximum=1)

    def select(self, layer: int, scores: Scores, entries: Entries, prompt: Prompt) -> Indices:
        """As many tokens of each head as its part of the layer's budget."""
        heads, mean = scores.shape[1], int(entries) - self.observe
        safe = max(int(self.floor * mean), self.sinks)
        winners = global_top_k(list(scores.split(1, dim=1)), heads * mean)
        context = ragged_tokens(with_sinks(scores, self.sinks), weighted(tuple(winners), mean, safe, scores.shape[-1]))
        return with_recent(context, prompt.tokens, self.observe)
