"""TOVA: tokens that the last token of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from winnowkv.models.info import ModelInfo
from winnowkv.policies.observation import WindowPolicy, WindowScorer
from winnowkv.policies.parts import LayerStates, PromptInfo, Scorer
from winnowkv.scoring.attention import window_attention
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class TOVA(WindowPolicy):
    """Tokens that the last query attends to, the same for all heads, one selection a layer (arXiv 2401.06104, section 3.2).

    Formula
    -------
    ``score[i] = mean over all query heads(A[q, i])``, in which ``q`` is the last token of the prompt.

    Departures
    ----------
    From the paper: it drops one token at every step, here the last query of the prompt chooses once; the last token itself
    always stays, the paper lets it compete.
    """

    name: ClassVar[str] = "tova"
    source: ClassVar[str] = "TOVA, arXiv 2401.06104, section 3.2"
    scope: ClassVar[str] = "tokens, same for all heads of a layer, same budget for all layers"
    purpose: ClassVar[str] = "to compare: what the last token looks at"

    published: ClassVar[int] = 1

    observe: int | Literal["question"] | None = 1

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the last query's attention."""
        window = self.observed(prompt)
        return MeanWindowScorer(prompt.tokens, window.size, tail=window.tail)


class MeanWindowScorer(WindowScorer):
    """Attention of the observation window, the same score for all heads."""

    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """Mean over query heads, ``[1, 1, C]``."""
        states = self.seen(states)
        return states.heads.whole(window_attention(states.queries, states.keys, states.scale)).mean(1, keepdim=True)
