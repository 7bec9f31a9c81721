"""A policy for winnowkv in a package of its own: tokens with large values stay."""

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.models.info import ModelInfo
from winnowkv.policies import LayerStates, PromptInfo, QueryFreeScorer, Scorer, TokenPolicy
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class ValueNorm(TokenPolicy):
    """Tokens with the largest values, per KV head: what a head reads from them is large if it attends to them at all.

    ``norm`` is the order of the norm; sinks and observation window stay, as in every policy.
    """

    name: ClassVar[str] = "valuenorm"
    source: ClassVar[str] = "an example of winnowkv's documentation"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"

    sinks: int = 4
    observe: int = 8
    norm: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("norm", minimum=1)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the values alone: no queries are asked for."""
        return ValueNormScorer(prompt.tokens, self.observe, norm=self.norm)


@dataclass(frozen=True, kw_only=True)
class ValueNormScorer(QueryFreeScorer):
    """The norm of each value."""

    norm: float

    def score(self, states: LayerStates) -> Scores:
        """``[1, Hkv, C]``: not negative, higher stays. The last ``window`` tokens do not compete."""
        context = states.values[:, :, : self.tokens - self.window]
        return context.float().norm(p=self.norm, dim=-1)
