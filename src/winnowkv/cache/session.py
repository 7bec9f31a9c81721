"""One request's way through prefill: observe a layer, score it, shrink what its limit no longer covers.

The same plan runs live, inside the attention function, and again over recorded queries
and keys, so that one prefill can serve many policies: eviction changes nothing that
prefill computes, since a layer's attention is done before its entries go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from winnowkv.errors import PolicyError
from winnowkv.models.curve import Curve
from winnowkv.policies import Policy, Prompt
from winnowkv.types import Entries, HeadScores, Indices, Keys, Queries, Scores

STEP = 0.03  # AutoPlan narrows its budget down to so much


class PrefillPlan:
    """The state of one request while its prompt is read.

    Parameters
    ----------
    policy: eviction policy, its task decided (:meth:`Policy.for_task`).
    prompt: length, layers and budget of the request.

    Attributes
    ----------
    kept: per layer seen, the positions that stay, ``[1, H, n]``; None where everything stays.
    mass: share of the importance scores behind the sinks that stays, mean over layers and heads; 1 where everything stays.
    note: why nothing is evicted, or None.
    wanted: prompt positions of the queries that the policy wants to see of each layer.

    Raises
    ------
    BudgetError
        Where the budget cannot hold sinks and recent window.
    """

    def __init__(self, policy: Policy, prompt: Prompt) -> None:
        self.policy = policy
        self.prompt = prompt
        self.wanted = policy.wanted(prompt.tokens)
        self.kept: list[Indices | None] = []
        self.mass = 1.0
        self.note: str | None = None
        self._scores: list[Scores] = []
        self._limits: list[Entries] = []
        self._heard: list[HeadScores] = []
        self._common: Indices | None = None  # what wins in all layers, of a policy whose layers choose some together
        if not policy.evicts or prompt.budget >= prompt.tokens:
            self._ceilings = None
        elif prompt.tokens <= policy.observe:
            self._ceilings = None
            self.note = (
                f"the prompt of {prompt.tokens} tokens is no longer than the observation window of "
                f"{policy.observe}: everything is kept"
            )
        else:
            policy.check(prompt)
            self.note = policy.hint
            self._ceilings = [min(ceiling, prompt.tokens) for ceiling in policy.ceilings(prompt)]

    def observe(self, queries: Queries, keys: Keys, scale: float) -> dict[int, Indices]:
        """Take in the next layer and return ``{layer: positions that stay}`` for every layer that shrinks now.

        ``queries`` are those at ``policy.wanted(tokens)``, ``keys`` are of the whole prompt.
        """
        if self._ceilings is None:
            self.kept.append(None)
            return {}
        return self.take(*evidence(self.policy, len(self.kept), queries, keys, scale))

    def take(self, scores: Scores | None, heard: HeadScores | None) -> dict[int, Indices]:
        """:meth:`observe` where the next layer's :func:`evidence` is known."""
        assert self._ceilings is not None
        layer, tokens = len(self.kept), self.prompt.tokens
        self.kept.append(None)
        self._scores.append(self._scores[self.policy.leader(layer)] if scores is None else scores)
        if heard is not None:
            self._heard.append(heard)
        limits: Sequence[Entries] = [*self._limits, self._ceilings[layer]]
        last = layer == self.prompt.layers - 1
        limits = (self.policy.allocate if last else self.policy.revise)(self._scores, limits, self.prompt)
        if last and sum(limits) != self.prompt.total:
            raise PolicyError(
                f"{self.policy.name}: its layers end with {sum(limits)} entries, the budget is {self.prompt.total}"
            )
        falling = [i for i, (limit, held) in enumerate(zip(limits, [*self._limits, tokens], strict=True)) if limit < held]
        if falling and self._heard:
            self._common = self.policy.shared(self._heard, self.prompt, self._common)
        changed = {}
        for i in falling:
            changed[i] = self.kept[i] = self._select(i, limits[i])
        self._limits = list(limits)
        if last:
            self.mass = self._mass()
            self._scores.clear()
            self._heard.clear()
        return changed

    def _select(self, layer: int, limit: Entries) -> Indices:
        leader = self.policy.leader(layer)
        shared = self.kept[leader] if leader < layer else None
        if shared is not None and shared.shape[-1] == limit:
            return shared
        return self.policy.select(layer, self._standing(layer), limit, self.prompt)

    def _standing(self, layer: int) -> Scores:
        """A layer's scores; what all layers keep wins, and what the layer no longer holds loses."""
        scores, held = self._scores[layer], self.kept[layer]
        if self._common is None:
            return scores
        scores = scores.index_fill(-1, self._common[0, 0].long(), float("inf"))
        if held is None:
            return scores
        gone = torch.ones(*scores.shape[:2], self.prompt.tokens, dtype=torch.bool, device=scores.device)
        gone.scatter_(-1, held.long().expand(*scores.shape[:2], -1), False)
        return scores.masked_fill(gone[..., : scores.shape[-1]], -1.0)

    def _mass(self) -> float:
        shares = []
        for scores, kept in zip(self._scores, self.kept, strict=True):
            behind = scores[0, :, self.policy.sinks :].float()
            if kept is None or not behind.numel():
                shares.append(torch.ones((), device=scores.device))
                continue
            heads, place = max(len(behind), kept.shape[1]), kept[0].long()
            if self.policy.per_head:  # a missing entry, -1, goes into the column behind all
                place = place.remainder(self.prompt.tokens + 1)
            stays = torch.zeros(heads, self.prompt.tokens + 1, device=scores.device).scatter_(1, place.expand(heads, -1), 1.0)
            stays = stays[:, self.policy.sinks : self.policy.sinks + behind.shape[1]]
            total = behind.sum(-1)
            shares.append(((behind * stays).sum(-1) / total.clamp(min=1e-30)).where(total > 0, 1.0).mean())
        return float(torch.stack(shares).mean())


def evidence(policy: Policy, layer: int, queries: Queries, keys: Keys, scale: float) -> tuple[Scores | None, HeadScores | None]:
    """What one layer's ``policy.wanted`` queries and its keys tell a policy: scores, None for a follower, and what all hear."""
    scores = policy.score(layer, queries, keys, scale) if policy.leader(layer) >= layer else None
    return scores, policy.hear(layer, queries, keys, scale)


class AutoPlan:
    """A prompt's way where the budget is what its own scores ask for: all layers are held until the last one was read.

    Parameters
    ----------
    policy: eviction policy, its task decided.
    prompt: length and layers; the budget does not count.
    curve: what the policy is expected to give at a kept share of its scores.
    target: the share of the full cache's tokens to go for.
    """

    def __init__(self, policy: Policy, prompt: Prompt, curve: Curve, target: float) -> None:
        self.policy = policy
        self.prompt = prompt
        self.wanted = policy.wanted(prompt.tokens)
        self.mass, self.note = 1.0, policy.hint
        self.kept: Sequence[Indices | None] = []
        self._needed, self._target = curve.needed(target), target
        self._evidence: list[tuple[Scores | None, HeadScores | None]] = []

    def observe(self, queries: Queries, keys: Keys, scale: float) -> dict[int, Indices]:
        """As :meth:`PrefillPlan.observe`; nothing shrinks before the last layer."""
        self.kept = [*self.kept, None]
        least, most = max(self.policy.minimum_budget(), self.policy.sinks + self.policy.observe), self.prompt.tokens
        if most <= least or not self.policy.evicts:
            return {}
        self._evidence.append(evidence(self.policy, len(self.kept) - 1, queries, keys, scale))
        if len(self.kept) < self.prompt.layers:
            return {}
        best = None
        while least < most and most > least * (1 + STEP):
            entries = max(int((least * most) ** 0.5), least + 1)
            plan = self._with(entries)
            if plan.mass >= self._needed:
                best, most = plan, entries
            else:
                least = entries
        self._evidence.clear()
        if best is None:
            self.note = f"auto: no budget below the whole prompt is expected to give {self._target:.0%}: everything is kept"
            return {}
        self.kept, self.mass = best.kept, best.mass
        return {layer: kept for layer, kept in enumerate(best.kept) if kept is not None}

    def _with(self, entries: int) -> PrefillPlan:
        plan = PrefillPlan(self.policy, replace(self.prompt, budget=entries))
        for scores, heard in self._evidence:
            plan.take(scores, heard)
        return plan
