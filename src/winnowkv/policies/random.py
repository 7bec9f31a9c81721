"""Random tokens: the floor that any scoring must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from winnowkv.policies.base import Policy
from winnowkv.types import Keys, Queries, Scores


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Sinks, a recent window, and random tokens between them, drawn anew for each layer.

    The draw hangs on ``seed``, layer and prompt length only: the global generator is
    neither read nor moved, so the same prompt keeps the same entries every time.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "baseline of this package"
    scope: ClassVar[str] = "tokens, same for all heads of a layer"

    sinks: int = 4
    observe: int = 8
    seed: int = 0

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Uniform noise, ``[1, 1, C]``; drawn on the CPU so that every device keeps the same tokens."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        noise = torch.rand(1, 1, keys.shape[2] - self.observe, generator=generator)
        return noise.to(keys.device)
