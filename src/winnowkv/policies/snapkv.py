"""SnapKV: tokens that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.base import Policy
from winnowkv.scoring.attention import GroupKind, PoolKind, group_reduce, pool, window_attention
from winnowkv.types import Keys, Queries, Scores


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Pooled attention of the last ``observe`` queries, top tokens per KV head (arXiv 2404.14469).

    Defaults are those of the authors' LongBench configuration (window 32, kernel 7, max
    pooling). Departure from their code: a GQA group votes together (``group_by``), so
    that keys are stored unexpanded; there every query head keeps its own copy.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"

    observe: int = 32
    kernel: int = 7
    pooling: PoolKind = "max"
    group_by: GroupKind = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("observe", minimum=1)
        self.require("kernel", minimum=1, odd=True)

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Attention summed over the window, reduced over each GQA group, then pooled, ``[1, Hkv, C]``."""
        attention = window_attention(queries, keys, scale)
        return pool(group_reduce(attention, keys.shape[1], self.group_by), self.kernel, self.pooling)
