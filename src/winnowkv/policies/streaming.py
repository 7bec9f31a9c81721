"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from winnowkv.policies.base import Policy
from winnowkv.types import Keys, Queries, Scores


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """The first ``sinks`` tokens and as many of the last as fit (arXiv 2309.17453, section 3.2).

    Departure from the paper: keys keep the positions they had in the prompt. The paper
    renumbers positions inside the cache, which serves endless streams, not prompts that
    fit the model.
    """

    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    scope: ClassVar[str] = "tokens, same for all heads and layers"

    sinks: int = 4

    def minimum_budget(self) -> int:
        """Sinks and at least one recent token."""
        return self.sinks + max(self.observe, 1)

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Later is better: the position itself, ``[1, 1, C]``."""
        context = keys.shape[2] - self.observe
        return torch.arange(context, dtype=torch.float32, device=keys.device).expand(1, 1, -1)
