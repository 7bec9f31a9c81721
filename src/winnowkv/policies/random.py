"""Random tokens: the floor that any scoring must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import LayerStates, PromptInfo, Scorer
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class Random(TokenPolicy):
    """Sinks, a recent window, and random tokens between them, drawn anew for each layer.

    The draw depends on ``seed``, layer and prompt length only: the global generator is neither read nor moved, so the same
    prompt keeps the same entries every time.

    Formula
    -------
    ``score[i] =`` a uniform random number.

    Parameters
    ----------
    seed: of the draw.

    Departures
    ----------
    None: a baseline of this package.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "baseline of this package"
    scope: ClassVar[str] = "tokens, same for all heads of a layer"
    purpose: ClassVar[str] = "the baseline that every other policy must beat"

    sinks: int = 4
    observe: int = 8
    seed: int = 0

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """Noise."""
        return RandomScorer(prompt.tokens, self.observe, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class RandomScorer(Scorer):
    """Uniform noise by seed and layer."""

    seed: int
    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """Uniform noise, ``[1, 1, C]``; drawn on the CPU so that every device keeps the same tokens."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + states.layer)
        return torch.rand(1, 1, self.tokens - self.window, generator=generator).to(states.keys.device)
