"""LagKV: tokens whose keys and values stand out from those of the partition that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import LayerStates, PromptInfo, QueryFreeScorer, Scorer
from winnowkv.scoring.values import lagged_spread
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class LagKV(TokenPolicy):
    """Tokens whose keys and values stand out against the tokens that follow (arXiv 2504.04704).

    Tokens compete within their partition of ``lag`` tokens; the last one and what does not fill one stay. No attention is read.

    Formula
    -------
    ``score[i] = rank within the partition of spread(k)[i] + spread(v)[i]``. ``spread(x)[i]`` is the softmax over the partition
    of the standard deviation over channels of ``(x[i] - least) / (most - least)``, with each channel's ``least`` and ``most``
    in the next partition.

    Parameters
    ----------
    lag: tokens of a partition.

    Departures
    ----------
    From the paper: if the budget does not hold what always stays, the latest of these tokens stay.
    """

    name: ClassVar[str] = "lagkv"
    source: ClassVar[str] = "LagKV, arXiv 2504.04704, section 3"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"
    purpose: ClassVar[str] = "the question is not known: what stands out of the text stays"

    sinks: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("lag", minimum=1)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By keys and values."""
        return LagScorer(prompt.tokens, self.observe, sinks=self.sinks, lag=self.lag)


@dataclass(frozen=True, kw_only=True)
class LagScorer(QueryFreeScorer):
    """Rank within a partition of ``lag`` tokens, counted after the ``sinks``; no query is read."""

    sinks: int
    lag: int
    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """Below 1 for what competes, 1 and more for what follows the last partition that has a next one, ``[1, Hkv, C]``."""
        parts = max((self.tokens - self.sinks) // self.lag - 1, 0)
        begin, end = self.sinks, self.sinks + parts * self.lag
        scores = states.keys.new_ones(1, states.kv_heads, self.tokens, dtype=torch.float32)
        scores[..., end:] += torch.arange(self.tokens - end, device=scores.device) / max(self.tokens - end, 1)
        if parts:
            shares = lagged_spread(states.keys[:, :, begin : end + self.lag], self.lag)
            shares = shares + lagged_spread(states.values[:, :, begin : end + self.lag], self.lag)
            ranks = shares.argsort(-1).argsort(-1) / self.lag
            scores[..., begin:end] = (ranks + 0 * shares).flatten(2)  # a rank is a number even of what is none
        return states.heads.whole(scores[..., : self.tokens - self.window])
