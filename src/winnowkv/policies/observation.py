"""Which tokens of a prompt look at the text: its question, where that is known, or the last ones, as in the papers.

In a chat the last tokens are the template's, and a window of 8 sees nothing else. So policies with an observation window look
from the question instead, which the prompt's structure names (:func:`winnowkv.read_structure`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from winnowkv.errors import PolicyError
from winnowkv.files import shown
from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import LayerStates, PromptInfo, Scorer, Selector
from winnowkv.prompt.structure import Structure


@dataclass(frozen=True)
class ObservationWindow:
    """The end of one prompt.

    Attributes
    ----------
    size: the last tokens, which do not compete with the text before them.
    tail: how many of these do not look, at their end: the chat template's after the question.
    recent: how many of the prompt's last tokens stay whatever the others score.
    """

    size: int
    tail: int
    recent: int


@dataclass(frozen=True, kw_only=True)
class WindowPolicy(TokenPolicy):
    """What policies with an observation window derive from.

    Parameters
    ----------
    observe: ``"question"``: the question looks, if the prompt's structure is known, without the chat template's tail; a
        number: the last so many tokens. None: the question, or with a ``preset`` the paper's number.
    preset: ``"paper"`` takes the paper's window.

    Class attributes
    ----------------
    published: the paper's window. It looks if no question is known, and is the least that a budget must have room for.
    fewest: queries that scores need.

    The question's tokens stay up to half of the budget, or up to ``published``, as far as there is room beside the sinks.

    Raises
    ------
    PolicyError
        For an option outside its bounds.
    """

    keeps_equal: ClassVar[bool] = True
    published: ClassVar[int]
    fewest: ClassVar[int] = 1

    observe: int | Literal["question"] | None = None  # type: ignore[assignment]
    preset: Literal["paper"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.observe, str) and self.observe != "question":
            raise PolicyError(f"{self.name}: observe={shown(self.observe)} must be question or a number of tokens")
        self.require("observe", minimum=self.fewest)

    def require(self, option: str, **bounds: float) -> None:
        """As of every policy; a word has no bounds."""
        if not isinstance(getattr(self, option), str):
            super().require(option, **bounds)  # type: ignore[arg-type]

    @property
    def uses_structure(self) -> bool:  # type: ignore[override]  # the options decide it
        """Whether the question looks."""
        return self.observe == "question" or (self.observe is None and self.preset is None)

    @property
    def looks_from(self) -> str:
        """Which tokens look, in words."""
        number = self.observe if isinstance(self.observe, int) else self.published
        last = "the last token" if number == 1 else f"the last {number} tokens"
        return f"the question, or {last} if it is not known" if self.uses_structure else last

    def published_window(self, prompt: PromptInfo) -> int:
        """The paper's window for a prompt."""
        return self.published

    def observation_window(self, prompt: PromptInfo) -> int:
        """Tokens that look if no question is known, as many as the smallest budget has room for."""
        return self.observe if isinstance(self.observe, int) else self.published_window(prompt)

    def asking(self, prompt: PromptInfo) -> Structure | None:
        """Where the question is that looks; None if none is asked for or known, or if it is longer than half of the prompt."""
        place = prompt.task.structure
        if place is None or place.tokens != prompt.tokens or not self.uses_structure:
            return None
        enough = place.question - place.tail >= self.fewest
        return place if enough and prompt.tokens - place.question >= max(place.question, self.sinks) else None

    def observed(self, prompt: PromptInfo) -> ObservationWindow:
        """The question, or the last tokens if none looks."""
        least, place = self.observation_window(prompt), self.asking(prompt)
        if place is None:
            return ObservationWindow(least, 0, least)
        recent = min(place.question, max(least, prompt.budget // 2), prompt.budget - self.sinks)
        return ObservationWindow(place.question, place.tail, recent)

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """The best of each head, sinks and recent tokens."""
        window = self.observed(prompt)
        return Selector(prompt.tokens, window.size, self.sinks, recent=window.recent)


@dataclass(frozen=True, kw_only=True)
class WindowScorer(Scorer):
    """A scorer that looks from an observation window, whose last ``tail`` tokens do not look."""

    tail: int = 0

    def query_positions(self) -> Tensor:
        """The window's, without its tail."""
        return torch.arange(max(self.tokens - self.window, 0), self.tokens - self.tail)

    def seen(self, states: LayerStates) -> LayerStates:
        """What the window sees: no keys and values after its last query. So its queries are the last of these states."""
        if not self.tail:
            return states
        seen = slice(0, self.tokens - self.tail)
        return replace(states, keys=states.keys[:, :, seen], values=states.values[:, :, seen])
