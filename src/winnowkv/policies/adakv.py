"""Ada-KV: heads of a layer share its budget by where their scores are, over any scorer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.compose import SelectorWrapper
from winnowkv.policies.parts import Selector
from winnowkv.scoring.allocate import apportion, global_top_k
from winnowkv.scoring.select import ragged_tokens, with_recent, with_sinks
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class AdaKV(SelectorWrapper):
    """One top-k over all heads of a layer says how many tokens each head gets (arXiv 2407.11550, section 4).

    A head's part of the winners is its part of the budget. Heads are stored padded to the longest: the report's held bytes say
    so.

    Formula
    -------
    ``score`` is the inner policy's. ``entries[h] = low + rest * winners[h] / sum of winners``: ``winners[h]`` counts head ``h``
    among the best ``total`` scores of all heads of the layer, ``low`` is ``floor`` of the mean, ``rest`` is what that leaves.

    Parameters
    ----------
    of: the policy whose scores and budgets of layers are used.
    floor: share of the mean that is safe for every head (the paper's alpha).

    Departures
    ----------
    From the authors' code: shares are rounded by largest remainder, so that the budget is met to the entry; heads are KV heads,
    whose GQA group votes together.
    """

    name: ClassVar[str] = "adakv"
    source: ClassVar[str] = "Ada-KV, arXiv 2407.11550, section 4"
    scope: ClassVar[str] = "tokens per KV head, budgets over the heads of a layer by this prompt's scores; of any policy"
    purpose: ClassVar[str] = "around another policy: heads of a layer share its budget"
    per_head: ClassVar[bool] = True

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("floor", minimum=0, maximum=1)

    def selector_over(self, inner: Selector) -> Selector:
        """The same sinks and recent tokens, other context tokens."""
        return AdaptiveHeads(inner.tokens, inner.window, inner.sinks, inner=inner, floor=self.floor)


@dataclass(frozen=True, kw_only=True)
class AdaptiveHeads(Selector):
    """The best tokens over all heads of a layer say how many each head gets, at least ``floor`` of the mean."""

    floor: float

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """As many tokens of each head as its part of the layer's budget."""
        recent = self.recent_tokens(scores.shape[-1], entries)
        tokens = with_sinks(scores := scores[..., : self.tokens - recent], self.sinks)
        total = int((entries - recent) * scores.shape[1])
        winners = global_top_k(list(scores.split(1, dim=1)), total)
        # A head cannot get back what it evicted, and what must stay, stays in each.
        held, fixed, safe = (tokens >= 0).sum(-1)[0], tokens.isinf().sum(-1)[0], int(self.floor * (total // scores.shape[1]))
        floors = fixed.clamp(min=safe).minimum(held).tolist()
        more = apportion(winners, total - sum(floors), [cap - low for cap, low in zip(held.tolist(), floors, strict=True)])
        context = ragged_tokens(tokens, [low + count for low, count in zip(floors, more, strict=True)])
        return with_recent(context, self.tokens, recent)
