"""The cascade of CAKE: the layers seen so far share the whole budget and little more, so that a layer only ever shrinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from winnowkv.policies.parts import Allocator
from winnowkv.types import Entries, Scores

CASCADE_SLACK = 2  # the layers seen may hold one in so many entries of the budget more before all of them shrink


@dataclass(frozen=True)
class CascadeAllocator(Allocator):
    """What allocators of arXiv 2503.12491's cascade have in common; each splits by its own rule in :meth:`allocate`."""

    def bound(self) -> int:
        """Entries over all layers that the layers seen may hold while the prompt is read: half more than the budget."""
        return self.prompt.total + self.prompt.total // CASCADE_SLACK

    def peak_entries(self) -> int:
        """What the layers seen may hold, and the layer that is being read."""
        prompt = self.prompt
        return min(self.bound(), (prompt.layers - 1) * prompt.tokens) + prompt.tokens

    def prefill_limits(self) -> list[int]:
        """The first layer may hold everything that the budget allows."""
        return [self.prompt.tokens] * self.prompt.layers

    def shrink(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[int]:
        """The newest layer shrinks to its share of the whole budget; the others, too, once they and it would pass the bound.

        Shrinking all of them after each layer would copy the whole budget as often as there are layers, for the same end.
        """
        shares = [int(entries) for entries in self.allocate(scores, held)]
        waiting = [*(int(entries) for entries in held[:-1]), shares[-1]]
        return waiting if sum(waiting) <= self.bound() else shares
