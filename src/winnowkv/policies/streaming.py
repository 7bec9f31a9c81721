"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import LayerStates, PromptInfo, Scorer
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class Streaming(TokenPolicy):
    """The first tokens and as many of the last as fit (arXiv 2309.17453, section 3.2).

    Formula
    -------
    ``score[i] = i``: later is better.

    Departures
    ----------
    From the paper: keys keep the positions they had in the prompt. The paper renumbers positions inside the cache, which serves
    endless streams, not prompts that fit the model.
    """

    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    scope: ClassVar[str] = "tokens, same for all heads and layers"
    purpose: ClassVar[str] = "a text without end, of which only the newest part matters"

    sinks: int = 4

    def minimum_budget(self, prompt: PromptInfo) -> int:
        """Sinks and at least one recent token."""
        return self.sinks + max(self.observe, 1)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """Later is better."""
        return PositionScorer(prompt.tokens, self.observe)


class PositionScorer(Scorer):
    """The position itself."""

    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """``0, 1, 2, ...`` of the context, ``[1, 1, C]``."""
        context = self.tokens - self.window
        return torch.arange(context, dtype=torch.float32, device=states.keys.device).expand(1, 1, -1)
