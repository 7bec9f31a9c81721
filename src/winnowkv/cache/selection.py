"""Which entries of one prompt stay: decided layer by layer while the prompt is read.

The same selection runs live, after a layer's attention, and again over recorded queries and keys, so that one prefill can serve
many policies: eviction changes nothing that prefill computes, since a layer's attention is done before its entries go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from winnowkv.errors import InputError, PolicyError
from winnowkv.policies import BoundPolicy, LayerStates
from winnowkv.types import Entries, HeadScores, Indices, Scores


class PromptSelection:
    """The state of one prompt while it is read: score, allocate, select.

    Parameters
    ----------
    bound: the policy for this prompt.
    keep_scores: keep the importance scores once the prompt is read, for :meth:`kept_mass` and to explain choices.

    Attributes
    ----------
    kept: per layer read, the positions that stay, ``[1, H, n]``; None if everything stays.
    scores: per layer read, the importance scores ``[1, H, C]``; empty if nothing is evicted, and at the end unless kept.
    common: what all layers keep together, ``[1, 1, n]``, None if nothing is shared.
    notes: what the user should know, in sentences.

    Layers meet on the device of the first one that was read: all of the above are there, wherever a layer is.
    """

    def __init__(self, bound: BoundPolicy, *, keep_scores: bool = False) -> None:
        self.bound, self.notes = bound, bound.notes
        self.kept: list[Indices | None] = []
        self.scores: list[Scores] = []
        self.common: Indices | None = None
        self._keep_scores = keep_scores
        self._limits: list[Entries] = []  # what each layer read so far may hold
        self._votes: list[HeadScores] = []
        self._sums: dict[int, Tensor] = {}  # by layer, of what its parts said: finite if every score of it is
        self._prefill_limits: list[Entries] = []
        if bound.evicts:
            self._prefill_limits = [min(limit, bound.prompt.tokens) for limit in bound.parts.allocator.prefill_limits()]

    def observe(self, states: LayerStates) -> dict[int, Indices]:
        """Take in the next layer and return ``{layer: positions that stay}`` for every layer that shrinks now.

        ``states.queries`` are those at ``bound.query_positions()``.
        """
        if not self.bound.evicts:
            self.kept.append(None)
            return {}
        return self.take(*evidence(self.bound, states))

    def take(self, scores: Scores | None, votes: HeadScores | None) -> dict[int, Indices]:
        """:meth:`observe` if the next layer's :func:`evidence` is known already.

        Raises InputError, at the last layer or where a part fails over them, if a layer's scores are not finite numbers.
        """
        layer = len(self.kept)
        said = [part.sum(dtype=torch.float32) for part in (scores, votes) if part is not None]
        if said:
            self._sums[layer] = torch.stack(said).sum()
        try:
            changed = self._take(layer, scores, votes)
        except Exception:
            self._check_finite()  # what a part could not work with is the better answer
            raise
        if layer == self.bound.prompt.layers - 1:  # once a prompt: the host waits for an accelerator here
            self._check_finite()
        return changed

    def _check_finite(self) -> None:
        if not self._sums:
            return
        sums = list(self._sums.values())
        finite = torch.stack([each.to(sums[0].device) for each in sums]).isfinite().tolist()
        if not all(finite):
            raise InputError(
                f"{self.bound.policy.name}: the importance scores of layer {list(self._sums)[finite.index(False)]} are not "
                "finite numbers, because the model's own numbers overflow or its weights are broken: load the model in "
                "bfloat16 or float32"
            )

    def _take(self, layer: int, scores: Scores | None, votes: HeadScores | None) -> dict[int, Indices]:
        parts, prompt = self.bound.parts, self.bound.prompt
        self.kept.append(None)
        self.scores.append(self.scores[parts.scorer.leader(layer)] if scores is None else scores.to(self._device(scores)))
        if votes is not None:
            self._votes.append(votes.to(self._device(votes)))
        limits: Sequence[Entries] = [*self._limits, self._prefill_limits[layer]]
        last = layer == prompt.layers - 1
        limits = (parts.allocator.allocate if last else parts.allocator.shrink)(self.scores, limits)
        if last and sum(limits) != prompt.total:
            name = self.bound.policy.name
            raise PolicyError(f"{name}: its layers end with {sum(limits)} entries, the budget is {prompt.total}")
        held = [*self._limits, prompt.tokens]
        shrinking = [at for at, (limit, now) in enumerate(zip(limits, held, strict=True)) if limit < now]
        if shrinking and self._votes and parts.shared is not None:
            self.common = parts.shared.choose(self._votes, self.common)
        changed = {}
        for at in shrinking:
            changed[at] = self.kept[at] = self._select(at, limits[at])
        self._limits = list(limits)
        if last:
            self._votes.clear()
            if not self._keep_scores:
                self.scores = []
        return changed

    def _device(self, found: Tensor) -> torch.device:
        """Where layers meet."""
        return self.scores[0].device if self.scores else found.device

    def _select(self, layer: int, limit: Entries) -> Indices:
        leader = self.bound.parts.scorer.leader(layer)
        shared = self.kept[leader] if leader < layer else None
        if shared is not None and shared.shape[-1] == limit:
            return shared
        return self.bound.parts.selector.select(layer, self._standing(layer), limit)

    def _standing(self, layer: int) -> Scores:
        """A layer's scores; what all layers keep wins, and what the layer no longer holds is below 0.

        That the layer no longer holds it must be said only if the best of fewer entries may be others: if what all layers keep
        changes, or the heads' parts of the layer do.
        """
        scores, held, tokens = self.scores[layer], self.kept[layer], self.bound.prompt.tokens
        if self.common is not None:
            scores = scores.index_fill(-1, self.common[0, 0].long(), float("inf"))
        if held is None or (self.common is None and not self.bound.policy.per_head):
            return scores
        gone = torch.ones(*scores.shape[:2], tokens + 1, dtype=torch.bool, device=scores.device)
        # A missing entry, -1, goes into the column after all others.
        gone.scatter_(-1, held.long().remainder(tokens + 1).expand(*scores.shape[:2], -1), False)
        return scores.masked_fill(gone[..., : scores.shape[-1]], -1.0)

    def kept_mass(self) -> float:
        """Share of the importance scores after the sinks that stays, mean over layers and heads; 1 if everything stays.

        Needs the scores: ask with ``keep_scores``.
        """
        sinks, tokens, shares = self.bound.parts.selector.sinks, self.bound.prompt.tokens, []
        for scores, kept in zip(self.scores, self.kept, strict=False):
            counted = scores[0, :, sinks:].float()
            if kept is None or not counted.numel():
                shares.append(torch.ones((), device=scores.device))
                continue
            heads, place = max(len(counted), kept.shape[1]), kept[0].long()
            if self.bound.policy.per_head:  # a missing entry, -1, goes into the column after all others
                place = place.remainder(tokens + 1)
            stays = torch.zeros(heads, tokens + 1, device=scores.device).scatter_(1, place.expand(heads, -1), 1.0)
            stays = stays[:, sinks : sinks + counted.shape[1]]
            total = counted.sum(-1)
            shares.append(((counted * stays).sum(-1) / total.clamp(min=1e-30)).where(total > 0, 1.0).mean())
        return float(torch.stack(shares).mean()) if shares else 1.0


def evidence(bound: BoundPolicy, states: LayerStates) -> tuple[Scores | None, HeadScores | None]:
    """What one layer tells a policy: its scores, None if the layer follows another one, and its vote on shared tokens.

    Both are of all heads of the model, and the same in every process that has some of them: so is what follows from them.
    """
    scorer, shared = bound.parts.scorer, bound.parts.shared
    voting = 0 if shared is None else len(shared.query_positions())
    scoring = states.queries.shape[2] - voting
    scores = None
    if scorer.leader(states.layer) >= states.layer:
        scores = scorer.score_all(replace(states, queries=states.queries[:, :, :scoring]))
    if shared is None:
        return scores, None
    return scores, shared.vote_all(replace(states, queries=states.queries[:, :, scoring:]))
