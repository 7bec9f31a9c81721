"""The cascade of CAKE: the layers seen so far share the whole budget and little more, so that a layer only ever shrinks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from winnowkv.policies.base import Prompt
from winnowkv.types import Entries, Scores

SLACK = 2  # so much of the budget, its half, the layers seen may hold more before all of them shrink


class Cascade:
    """What policies of arXiv 2503.12491's cascade have in common, in front of :class:`Policy`; each splits by its own rule."""

    @abstractmethod
    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """What the layers seen so far share of the whole budget."""

    def bound(self, prompt: Prompt) -> int:
        """Entries over all layers that the layers seen may hold while prefill runs: half more than the budget."""
        return prompt.total + prompt.total // SLACK

    def peak_entries(self, prompt: Prompt) -> int:
        """What the layers seen may hold, and the layer that is being read."""
        return min(self.bound(prompt), (prompt.layers - 1) * prompt.tokens) + prompt.tokens

    def ceilings(self, prompt: Prompt) -> list[int]:
        """The first layer may hold everything that the budget allows."""
        return [prompt.tokens] * prompt.layers

    def revise(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """The newest layer shrinks to its share of the whole budget; the others, too, once they and it would pass the bound.

        Shrinking all of them after each layer would copy the whole budget as often as there are layers, for the same end.
        """
        shares = self.allocate(scores, held, prompt)
        waiting = [*(int(entries) for entries in held[:-1]), shares[-1]]
        return waiting if sum(waiting) <= self.bound(prompt) else shares
