"""One request's way through prefill: observe a layer, score it, shrink what its limit no longer covers.

The same plan runs live, inside the attention function, and again over recorded queries
and keys, so that one prefill can serve many policies: eviction changes nothing that
prefill computes, since a layer's attention is done before its entries go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from winnowkv.errors import PolicyError
from winnowkv.policies import Policy, Prompt
from winnowkv.types import Entries, Indices, Keys, Queries, Scores


class PrefillPlan:
    """The state of one request while its prompt is read.

    Parameters
    ----------
    policy: eviction policy, its task decided (:meth:`Policy.for_task`).
    prompt: length, layers and budget of the request.

    Attributes
    ----------
    kept: per layer seen, the positions that stay, ``[1, H, n]``; None where everything stays.
    note: why nothing is evicted, or None.

    Raises
    ------
    BudgetError
        Where the budget cannot hold sinks and recent window.
    """

    def __init__(self, policy: Policy, prompt: Prompt) -> None:
        self.policy = policy
        self.prompt = prompt
        self.kept: list[Indices | None] = []
        self.note: str | None = None
        self._scores: list[Scores] = []
        self._limits: list[Entries] = []
        self._common: Indices | None = None  # what all layers keep, of a policy whose layers choose together
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
            self._ceilings = [min(ceiling, prompt.tokens) for ceiling in policy.ceilings(prompt)]

    def observe(self, queries: Queries, keys: Keys, scale: float) -> dict[int, Indices]:
        """Take in the next layer and return ``{layer: positions that stay}`` for every layer that shrinks now.

        ``queries`` are the last ``policy.reads(tokens)`` of the prompt, ``keys`` all of it.
        """
        layer, tokens = len(self.kept), self.prompt.tokens
        self.kept.append(None)
        if self._ceilings is None:
            return {}
        leader = self.policy.leader(layer)
        own = leader >= layer
        self._scores.append(self.policy.score(layer, queries, keys, scale) if own else self._scores[leader])
        limits: Sequence[Entries] = [*self._limits, self._ceilings[layer]]
        last = layer == self.prompt.layers - 1
        limits = (self.policy.allocate if last else self.policy.revise)(self._scores, limits, self.prompt)
        if last and sum(limits) != self.prompt.total:
            raise PolicyError(
                f"{self.policy.name}: its layers end with {sum(limits)} entries, the budget is {self.prompt.total}"
            )
        falling = [i for i, (limit, held) in enumerate(zip(limits, [*self._limits, tokens], strict=True)) if limit < held]
        together = self._together() if falling else None
        changed = {}
        for i in falling:
            choose = self._select(i, limits[i]) if together is None else self._choose(i, together, limits[i])
            changed[i] = self.kept[i] = choose
        self._limits = list(limits)
        if last:
            self._scores.clear()
        return changed

    def _together(self) -> Scores | None:
        """What all layers choose by, without what is gone already; None where each has its own choice."""
        scores = self.policy.shared(self._scores, self.prompt)
        if scores is None or self._common is None:
            return scores
        gone = torch.ones(self.prompt.tokens, dtype=torch.bool, device=scores.device)
        gone[self._common[0, 0].long()] = False
        return scores.masked_fill(gone[: scores.shape[-1]], -1.0)

    def _choose(self, layer: int, together: Scores, limit: Entries) -> Indices:
        if self._common is None or self._common.shape[-1] != limit:
            self._common = self.policy.select(layer, together, limit, self.prompt)
        return self._common

    def _select(self, layer: int, limit: Entries) -> Indices:
        leader = self.policy.leader(layer)
        shared = self.kept[leader] if leader < layer else None
        if shared is not None and shared.shape[-1] == limit:
            return shared
        return self.policy.select(layer, self._scores[layer], limit, self.prompt)
