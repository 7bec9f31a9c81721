"""Why a token stayed or went: its score and rank beside the lowest score that stayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from winnowkv.cache.auto import AutoSelection
from winnowkv.cache.selection import PromptSelection
from winnowkv.errors import CacheError, InputError

Reason = Literal[
    "everything kept",
    "protected",
    "sink",
    "recent window",
    "shared by all layers",
    "score",
    "its span",
    "evicted",
    "evicted between chunks",
]


@dataclass(frozen=True)
class Explanation:
    """What became of one prompt token in one KV head of one layer.

    Attributes
    ----------
    layer, head, token: where; ``layer`` counts compressed layers, ``token`` the prompt's tokens without padding.
    kept: whether it is in the cache.
    reason: what kept it: ``keep=`` (protected), the sinks, the recent window (or a question that does not compete), what all
        layers keep, its own score, or its span (a window or chunk that was kept whole, while its own score was not enough);
        or that it was evicted, by the policy or, under a ceiling, between chunks before the policy saw it. ``everything
        kept``: the layer keeps all that the policy chose from.
    score, rank: its importance score and its place among the tokens of its head that compete, 1 is best; None if it does not.
    threshold: the lowest score that stayed by itself in this head; None if no token did.
    competing: tokens that compete in this head, sinks and what all layers keep included.
    """

    layer: int
    head: int
    token: int
    kept: bool
    reason: Reason
    score: float | None
    rank: int | None
    threshold: float | None
    competing: int

    def __str__(self) -> str:
        fate = "kept" if self.kept else "went"
        if self.score is None or self.rank is None:
            return f"layer {self.layer} head {self.head}: {fate}, {self.reason}"
        least = "" if self.threshold is None else f", lowest kept {self.threshold:.3g}"
        place = f"score {self.score:.3g}, rank {self.rank} of {self.competing}"
        return f"layer {self.layer} head {self.head}: {fate}, {self.reason} ({place}{least})"


@dataclass(frozen=True)
class Choices:
    """What was decided of the prompts of a batch, kept to be explained.

    Attributes
    ----------
    selections: of each row of the batch as it was read, with their scores.
    held: text positions ``[n]`` that the policy chose from, ascending, if a ceiling left not all of them; else None.
    """

    selections: Sequence[PromptSelection | AutoSelection]
    held: Tensor | None = None

    def explain(self, layer: int, token: int, row: int = 0) -> list[Explanation]:
        """One :class:`Explanation` for each KV head. Raises InputError for a layer, token or row that is not there."""
        check_range("row", row, len(self.selections))
        selection = self.selections[row]
        prompt, heads = selection.bound.prompt, range(selection.bound.model.kv_heads)
        check_range("layer", layer, prompt.layers)
        check_range("token", token, prompt.tokens if self.held is None else int(self.held[-1]) + 1)
        place = token
        if self.held is not None:
            place = int(torch.searchsorted(self.held, token))
            if int(self.held[place]) != token:
                return [Explanation(layer, h, token, False, "evicted between chunks", None, None, None, 0) for h in heads]
        kept = selection.kept[layer]
        if kept is None:
            return [Explanation(layer, h, token, True, "everything kept", None, None, None, 0) for h in heads]
        scores = head_scores(selection, layer)
        return [
            Explanation(
                layer, h, token, *_fate(competition(selection, scores[h % len(scores)], kept[0, h % kept.shape[1]]), place)
            )
            for h in heads
        ]


def head_scores(selection: PromptSelection | AutoSelection, layer: int) -> Tensor:
    """A layer's importance scores ``[1 or Hkv, C]``, by which its heads chose."""
    scores = selection.scores[layer][0].float()
    if len(scores) > selection.bound.model.kv_heads:  # of query heads, as windows are scored: all of them choose together
        scores = scores.mean(0, keepdim=True)
    return scores


def check_range(name: str, value: int, count: int) -> None:
    """Raise InputError for a number that is not one of ``count``, counted from 0."""
    if not 0 <= value < count:
        raise InputError(f"{name} {value} is not there: give one from 0 to {count - 1}")


class Competition(NamedTuple):
    """What one head of a layer chose from, in places of the ``S`` tokens that it held.

    Attributes
    ----------
    scores: of the tokens that compete, ``[C]``; the others come after them.
    stays, protected, shared: ``[S]``, which tokens are in the cache, which of all ``keep=`` protects, which all layers keep.
    winners: ``[C]``, which stay by their own score alone. threshold: the lowest score of these, None without any.
    sinks: first tokens that always stay.
    """

    scores: Tensor
    stays: Tensor
    protected: Tensor
    shared: Tensor
    winners: Tensor
    threshold: float | None
    sinks: int


def competition(selection: PromptSelection | AutoSelection, scores: Tensor, kept: Tensor) -> Competition:
    """Of one head's ``scores`` ``[C]`` and ``kept`` places ``[n]``, -1 in front of them; on the device of ``kept``."""
    selector, tokens = selection.bound.parts.selector, selection.bound.prompt.tokens
    recent = selector.recent_tokens(len(scores), len(kept))
    competing = min(len(scores), tokens - recent)
    scores = scores[:competing]
    stays = torch.zeros(tokens, dtype=torch.bool, device=kept.device)
    stays[kept[kept >= 0].long()] = True
    shared, protected = torch.zeros_like(stays), torch.zeros_like(stays)
    if selection.common is not None:
        shared[selection.common[0, 0].long().to(kept.device)] = True
    for start, end in selection.bound.prompt.keep:
        protected[start:end] = True
    # Those that only their score, or their span, can keep.
    free = ~shared[:competing]
    free[: selector.sinks] = False
    winners = stays[:competing] & free
    if selection.bound.policy.keeps_spans:  # of which so many would have stayed by their own scores
        order = scores.masked_fill(~free, -torch.inf).sort(descending=True, stable=True).indices
        best = torch.zeros_like(winners)
        best[order[: int(winners.sum())]] = True
        winners = winners & best
    threshold = float(scores[winners].min()) if bool(winners.any()) else None
    return Competition(scores, stays, protected, shared, winners, threshold, selector.sinks)


def _fate(head: Competition, place: int) -> tuple[bool, Reason, float | None, int | None, float | None, int]:
    """What an :class:`Explanation` says from ``kept`` on; :func:`winnowkv.cache.kept.reasons_of` says it of all places."""
    competing, stays = len(head.scores), bool(head.stays[place])
    if stays and bool(head.protected[place]):
        return stays, "protected", None, None, head.threshold, competing
    if place >= competing:
        return stays, "recent window" if stays else "evicted", None, None, head.threshold, competing
    reason: Reason = "evicted"
    if stays and place < head.sinks:
        reason = "sink"
    elif stays and bool(head.shared[place]):
        reason = "shared by all layers"
    elif stays:
        reason = "score" if bool(head.winners[place]) else "its span"
    score = head.scores[place]
    rank = 1 + int((head.scores > score).sum()) + int((head.scores[:place] == score).sum())
    return stays, reason, float(score), rank, head.threshold, competing


def found_choices(choices: Choices | None, keep_scores: bool) -> Choices:
    """The choices of a cache. Raises CacheError if its scores are not kept, or nothing was chosen yet."""
    if not keep_scores:
        raise CacheError("explain() needs the importance scores: make the cache with keep_scores=True and read a prompt")
    if choices is None:
        raise CacheError(
            "explain() needs a prompt, and none was read into this cache yet, or nothing was chosen of it: read one first"
        )
    return choices
