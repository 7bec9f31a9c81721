"""CriticalKV: half of the budget by score, the rest by score times what the value adds to the output, over any scorer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from winnowkv.policies.compose import WrappedScorer, Wrapper, from_inner
from winnowkv.policies.parts import LayerStates, Parts, PromptInfo
from winnowkv.scoring.select import top_tokens
from winnowkv.scoring.values import projected_norms
from winnowkv.types import Scores

EPSILON = 1e-4  # added to scores so that a large value counts even without attention, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Wrapper):
    """Tokens whose loss would change the layer's output most (arXiv 2502.03805, section 4).

    Part of the budget goes to the best scores, the rest to the best products of score and projected value.

    Formula
    -------
    After the ``first`` best by the inner policy's ``score[i]``: ``(score[i] + 0.0001) * |W_O v[i]|``, with the L1 norm.

    Parameters
    ----------
    of: the policy whose scores and budgets are used.
    first: share of the budget that goes by the score alone.

    Departures
    ----------
    From the paper: ``first`` is of the mean budget of all layers, since a layer's own may not be known yet (a layer with less
    room keeps the best products of them); one score serving several KV heads becomes one a head; a layer's scores keep their
    sum, by which some allocators split.
    """

    name: ClassVar[str] = "criticalkv"
    source: ClassVar[str] = "CriticalKV, arXiv 2502.03805, section 4"
    scope: ClassVar[str] = "tokens per KV head by scores and values, budgets as the inner policy"
    purpose: ClassVar[str] = "around another policy: what a value adds to the output counts"
    needs_projection: ClassVar[bool] = True
    keeps_equal = from_inner("keeps_equal")

    first: float = 0.5

    def __post_init__(self) -> None:
        self.require("first", minimum=0, maximum=1)

    def wrap(self, inner: Parts, prompt: PromptInfo) -> Parts:
        """Its scorer."""
        recent = inner.selector.recent_tokens(prompt.tokens - inner.scorer.window, prompt.budget)
        before = int(self.first * max(prompt.budget - recent, 0))
        return replace(inner, scorer=CriticalScorer(prompt.tokens, inner.scorer.window, inner=inner.scorer, before=before))


@dataclass(frozen=True, kw_only=True)
class CriticalScorer(WrappedScorer):
    """The ``before`` best of the inner scores, then the best products of score and projected value norm."""

    before: int

    @property
    def shares_heads(self) -> bool:  # type: ignore[override]
        """As the inner scorer."""
        return self.inner.shares_heads

    def score(self, states: LayerStates) -> Scores:
        """``[1, Hkv, C]``; ``[1, Hq, C]`` if the inner scores are of query heads."""
        scores = self.inner.score(states)
        assert states.projection is not None
        norms = states.heads.whole(projected_norms(states.values, states.projection)[..., : scores.shape[-1]])
        norms = norms.repeat_interleave(max(scores.shape[1] // norms.shape[1], 1), 1)
        weighted = (scores + EPSILON) * norms
        first = top_tokens(scores, min(self.before, scores.shape[-1])).expand(1, weighted.shape[1], -1)
        weighted = weighted.scatter_add(-1, first, weighted.amax(-1, keepdim=True).expand(first.shape))
        return weighted * (scores.sum() / weighted.sum().clamp(min=1e-30))
