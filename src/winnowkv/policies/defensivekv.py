"""DefensiveKV: tokens by the worst that their loss could cost, not by the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.models.info import ModelInfo
from winnowkv.policies.adakv import AdaptiveHeads
from winnowkv.policies.observation import WindowPolicy, WindowScorer
from winnowkv.policies.parts import Allocator, LayerStates, Parts, PromptInfo
from winnowkv.scoring.attention import worst_case_attention
from winnowkv.scoring.values import projected_norms
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(WindowPolicy):
    """Tokens by the worst that their loss could cost: the most attention that one query pays (arXiv 2510.13334).

    All heads of a layer share its budget by one top-k.

    Formula
    -------
    ``score[h, i] = max(m[i], mean over i of m[i]) * n[h, i] / sum over KV heads of n[., i]``. ``m[i]`` is the maximum of
    ``smooth(A[q, i])`` over the queries and the group, where ``smooth`` averages over ``kernel`` neighbours and keeps the sum;
    ``n[h, i] = |W_O v[h, i]|``, the L1 norm, as a share of all heads' at the same token, as in the authors' code.

    Parameters
    ----------
    kernel: neighbouring tokens over which attention is averaged, odd; 1 averages nothing.

    Departures
    ----------
    From the authors' code: it keeps the tokens that hold 90% of the attention before values count; here values count for all.
    The question looks where it is known, not the last 32 tokens (``preset=paper``).
    """

    name: ClassVar[str] = "defensivekv"
    source: ClassVar[str] = "DefensiveKV, arXiv 2510.13334, section 4"
    scope: ClassVar[str] = "tokens per KV head by attention and values, budgets over the heads of a layer"
    purpose: ClassVar[str] = "a question at the end, when a token missed once is too costly"
    per_head: ClassVar[bool] = True
    own_selector: ClassVar[bool] = True
    needs_projection: ClassVar[bool] = True

    published: ClassVar[int] = 32

    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("kernel", minimum=1, odd=True)

    def parts(self, model: ModelInfo, prompt: PromptInfo) -> Parts:
        """The worst case scores, one top-k over all heads selects."""
        window = self.observed(prompt)
        scorer = DefensiveScorer(prompt.tokens, window.size, tail=window.tail, kernel=self.kernel)
        selector = AdaptiveHeads(prompt.tokens, window.size, self.sinks, window.recent, floor=0.0)
        return Parts(scorer, Allocator(prompt), selector)


@dataclass(frozen=True, kw_only=True)
class DefensiveScorer(WindowScorer):
    """Maximum over window and group, bounded from below by its mean, times the head's share of the projected values' norms."""

    kernel: int
    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """``[1, Hkv, C]``."""
        states, context = self.seen(states), self.tokens - self.window
        assert states.projection is not None
        worst = worst_case_attention(states.queries, states.keys, states.scale, context, self.kernel)
        norms = states.heads.whole(projected_norms(states.values, states.projection)[..., :context])
        return states.heads.whole(worst) * (norms / norms.sum(1, keepdim=True).clamp(min=1e-30))
