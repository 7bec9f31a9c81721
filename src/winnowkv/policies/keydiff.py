"""KeyDiff: tokens whose keys differ most from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import LayerStates, PromptInfo, QueryFreeScorer, Scorer
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class KeyDiff(TokenPolicy):
    """Tokens whose keys are least like the mean direction of all keys, per KV head (arXiv 2504.15364, section 3).

    No attention is read.

    Formula
    -------
    ``score[i] = 1 - cos(k[i], mean over j of k[j] / |k[j]|)``.

    Departures
    ----------
    From the paper: it evicts block by block while a prompt is read, here the whole prompt's keys choose once.
    """

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "KeyDiff, arXiv 2504.15364, section 3"
    scope: ClassVar[str] = "tokens per KV head, same budget for all layers"
    purpose: ClassVar[str] = "the question is not known, and reading must be fast"

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the keys alone."""
        return KeyDiffScorer(prompt.tokens, self.observe)


class KeyDiffScorer(QueryFreeScorer):
    """How far a key points away from the mean of the keys' directions."""

    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """``1 - cos(key, mean direction)``, 0 to 2, ``[1, Hkv, C]``."""
        keys = F.normalize(states.keys.float(), dim=-1)
        anchor = keys.mean(2, keepdim=True)
        scores = (1 - F.cosine_similarity(keys, anchor, dim=-1)).clamp(min=0)
        return states.heads.whole(scores[..., : self.tokens - self.window])
