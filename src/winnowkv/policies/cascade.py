"""The cascade of CAKE: the layers seen so far share the whole budget, so that a layer only ever shrinks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from winnowkv.policies.base import Prompt
from winnowkv.types import Entries, Scores


class Cascade:
    """What policies of arXiv 2503.12491's cascade have in common, in front of :class:`Policy`; each splits by its own rule."""

    @abstractmethod
    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """What the layers seen so far share of the whole budget."""

    def peak_entries(self, prompt: Prompt) -> int:
        """The whole budget, shared by the layers seen, and the layer that is being read."""
        return prompt.total + prompt.tokens

    def ceilings(self, prompt: Prompt) -> list[int]:
        """The first layer may hold everything that the budget allows."""
        return [prompt.tokens] * prompt.layers

    def revise(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """After every layer the layers seen so far share the whole budget."""
        return self.allocate(scores, held, prompt)
