"""SnapKV: tokens that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.models.info import ModelInfo
from winnowkv.policies.observation import WindowPolicy, WindowScorer
from winnowkv.policies.parts import LayerStates, PromptInfo, Scorer
from winnowkv.scoring.attention import GroupKind, PoolKind, group_reduce, pool, window_attention
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowPolicy):
    """Tokens that the observation window attends to, pooled, the best of each KV head (arXiv 2404.14469).

    Defaults are those of the authors' LongBench configuration (window 32, kernel 7, max pooling).

    Formula
    -------
    ``score[i] = pool(mean over the group(sum over q of A[q, i]))``.

    Parameters
    ----------
    kernel: neighbouring tokens whose scores are pooled, odd; 1 pools nothing.
    pooling: ``avg`` or ``max`` over them.
    group_by: how the query heads of a KV head vote together, ``mean`` or ``max``.

    Departures
    ----------
    From the authors' code: a GQA group votes together (``group_by``), so that keys are stored unexpanded; there every query
    head keeps its own copy. The question looks where it is known, not the last 32 tokens (``preset=paper``).
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"
    purpose: ClassVar[str] = "a question at the prompt's end, with no time to spare for reading"

    published: ClassVar[int] = 32

    kernel: int = 7
    pooling: PoolKind = "max"
    group_by: GroupKind = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("kernel", minimum=1, odd=True)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the observation window's attention."""
        window = self.observed(prompt)
        return PooledScorer(
            prompt.tokens, window.size, tail=window.tail, kernel=self.kernel, pooling=self.pooling, group_by=self.group_by
        )


@dataclass(frozen=True, kw_only=True)
class PooledScorer(WindowScorer):
    """Attention of the observation window."""

    kernel: int
    pooling: PoolKind
    group_by: GroupKind
    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """Attention summed over the window, reduced over each GQA group, then pooled, ``[1, Hkv, C]``."""
        states = self.seen(states)
        attention = window_attention(states.queries, states.keys, states.scale)
        scores = group_reduce(attention, states.kv_heads, self.group_by)
        return states.heads.whole(pool(scores, self.kernel, self.pooling))
