"""Sentences that all layers keep: spans of a prompt that its question asks for, by the model's retrieval heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from winnowkv.models.calibration import CalibrationProfile
from winnowkv.policies.parts import LayerStates, SharedTokens
from winnowkv.prompt.structure import Structure
from winnowkv.scoring.attention import some_heads_attention, window_attention
from winnowkv.scoring.select import top_spans
from winnowkv.scoring.spans import concentrated, span_owner, span_reduce
from winnowkv.types import HeadScores, Indices

NEAR_QUESTION = 64  # tokens before the question that do not choose them


@dataclass(frozen=True)
class SentenceVotes(SharedTokens):
    """Spans by the attention of retrieval heads from the question.

    Parameters
    ----------
    structure: question, template tail and sentence ends of the prompt. longest: most tokens of a span.
    sinks: first tokens, which always stay. top: tokens by which a span is scored.
    profile, heads: the calibrated heads as ``(layer, head)``; None if they are guessed, ``guessed`` of them.
    room: how many tokens of sentences every layer keeps once so many layers have voted.
    """

    structure: Structure
    longest: int
    sinks: int
    top: int
    profile: CalibrationProfile | None
    heads: tuple[tuple[int, int], ...] | None
    guessed: int
    room: Callable[[int], int]
    shares_heads: ClassVar[bool] = True

    def query_positions(self) -> Tensor:
        """The question's, without the chat template's tail."""
        place = self.structure
        return torch.arange(max(place.tokens - place.question, 0), place.tokens - place.tail)

    def vote(self, states: LayerStates) -> HeadScores:
        """Attention of this layer's chosen heads from the question, weighted by their score, ``[1, heads, C]``."""
        place = self.structure
        keys = states.keys[:, :, : place.tokens - place.tail]
        if self.profile is None or self.heads is None:
            return self.most_concentrated(states.heads.whole(window_attention(states.queries, keys, states.scale)))
        mine = [head for at, head in self.heads if at == states.layer]
        if not mine:
            return keys.new_zeros(1, 0, place.tokens - place.question, dtype=torch.float32)
        weights = torch.tensor([self.profile.semantic[states.layer][head] for head in mine])
        attention = some_heads_attention(states.queries, keys, states.scale, mine, states.heads)
        return attention * weights.to(keys.device, non_blocking=True)[:, None]

    def choose(self, votes: Sequence[HeadScores], earlier: Indices | None) -> Indices:
        """The best sentences so far, ``[1, 1, n]``; what was chosen earlier if it has no more tokens than there is room for."""
        room = self.room(len(votes))
        if earlier is not None and earlier.shape[-1] <= room:
            return earlier  # a part of it that is as large is the same
        return self.best(votes, room, earlier)

    def best(self, votes: Sequence[HeadScores], count: int, earlier: Indices | None) -> Indices:
        """So many tokens of the best sentences so far, ``[1, 1, count]``, out of those that won ``earlier``."""
        sinks, together = self.sinks, torch.cat(list(votes), 1)
        if self.profile is None:
            together = self.most_concentrated(together)
        scores = together.sum(1, keepdim=True)
        gone = torch.arange(scores.shape[-1], device=scores.device) < sinks
        if earlier is not None:
            gone = gone | torch.ones_like(gone).index_fill(0, earlier[0, 0].long(), False)
        owner, scores = self.spans(scores), scores.masked_fill(gone, -1.0)
        count = min(count, scores.shape[-1] - sinks)
        return top_spans(span_reduce(scores.clamp(min=0), owner, self.top), scores, owner, count)

    def most_concentrated(self, votes: HeadScores) -> HeadScores:
        """The heads that stand in if there is no profile: those that attend most to one span."""
        near = min(NEAR_QUESTION, votes.shape[-1] // 8)
        return concentrated(votes, self.spans(votes), self.sinks, near, self.guessed)

    def spans(self, scores: HeadScores) -> Tensor:
        """The span of each token that ``scores`` are of; the sinks are one."""
        ends = (self.sinks, *self.structure.ends)
        return owners(scores.shape[-1], ends, self.longest, scores.device)


@lru_cache(maxsize=16)  # every layer of a prompt asks for the same
@torch.inference_mode(False)  # or the next prompt, which may be read outside of it, could not use it
def owners(tokens: int, ends: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """:func:`winnowkv.scoring.spans.span_owner` on the device."""
    return span_owner(tokens, ends, longest).to(device)
