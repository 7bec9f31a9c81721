"""Knorm: tokens whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import LayerStates, PromptInfo, QueryFreeScorer, Scorer
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class Knorm(TokenPolicy):
    """Keys with a small L2 norm stay, since they tend to get much attention (arXiv 2406.11430, section 3).

    No attention is read.

    Formula
    -------
    ``score[i] = max over j of |k[j]| - |k[i]|``.

    Departures
    ----------
    From the paper: it leaves the first two layers whole, here all layers keep the budget.
    """

    name: ClassVar[str] = "knorm"
    source: ClassVar[str] = "L2 norm of keys, arXiv 2406.11430, section 3"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"
    purpose: ClassVar[str] = "the cheapest score there is: keys of small norm"

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the keys alone."""
        return KeyNormScorer(prompt.tokens, self.observe)


class KeyNormScorer(QueryFreeScorer):
    """How much shorter a key is than the longest one."""

    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """The head's largest norm less the key's, ``[1, Hkv, C]``."""
        norms = states.keys.float().norm(dim=-1)
        scores = norms.amax(-1, keepdim=True) - norms
        return states.heads.whole(scores[..., : self.tokens - self.window])
