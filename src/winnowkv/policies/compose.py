"""What wrappers are made of: policies that change one part of another one, ``of``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from winnowkv.errors import PolicyError
from winnowkv.files import shown
from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import Policy
from winnowkv.policies.decode_eviction import DecodeEviction
from winnowkv.policies.parts import ChunkEviction, Parts, PromptInfo, Scorer, Selector
from winnowkv.policies.snapkv import SnapKV
from winnowkv.prompt.task import TaskProfile
from winnowkv.types import Quantization, Queries


def from_inner(name: str) -> Any:
    """A property of a wrapper that is the inner policy's."""
    return property(lambda self: getattr(self.of, name))


@dataclass(frozen=True, kw_only=True)
class Wrapper(Policy, ABC):
    """A policy whose parts are those of another, ``of``, but for what a subclass exchanges in :meth:`wrap`.

    Sinks, observation window and storage are the inner policy's.
    """

    of: Policy = field(default_factory=SnapKV)

    sinks = from_inner("sinks")
    observe = from_inner("observe")
    quantize = from_inner("quantize")
    lookahead = from_inner("lookahead")
    draft = from_inner("draft")
    rounds = from_inner("rounds")
    heard = from_inner("heard")
    refit = from_inner("refit")
    evicts = from_inner("evicts")
    uses_task = from_inner("uses_task")
    uses_structure = from_inner("uses_structure")
    needs_profile = from_inner("needs_profile")
    wants_profile = from_inner("wants_profile")
    needs_projection = from_inner("needs_projection")
    needs_study = from_inner("needs_study")
    weighs_values = from_inner("weighs_values")
    per_head = from_inner("per_head")
    keeps_spans = from_inner("keeps_spans")
    own_selector = from_inner("own_selector")
    equal = from_inner("equal")

    @property
    def spec(self) -> str:
        """The wrapper's own options, then the inner policy."""
        return f"{super().spec}:of={self.of.spec}"

    def check(self, model: ModelInfo, task: TaskProfile | None) -> None:
        """As the inner policy."""
        self.of.check(model, task)

    def observation_window(self, prompt: PromptInfo) -> int:
        """As the inner policy."""
        return self.of.observation_window(prompt)

    def minimum_budget(self, prompt: PromptInfo) -> int:
        """As the inner policy."""
        return self.of.minimum_budget(prompt)

    def check_budget(self, prompt: PromptInfo) -> None:
        """As the inner policy."""
        self.of.check_budget(prompt)

    def parts(self, model: ModelInfo, prompt: PromptInfo) -> Parts:
        """The inner policy's, one or more of them exchanged."""
        return self.wrap(self.of.parts(model, prompt), prompt)

    @abstractmethod
    def wrap(self, inner: Parts, prompt: PromptInfo) -> Parts:
        """Exchange parts of the inner policy."""

    def stored_as(self, quantize: Quantization | None) -> Policy:
        """The inner policy is stored so."""
        return replace(self, of=self.of.stored_as(quantize))

    def lean(self) -> Policy:
        """The inner policy is lean."""
        return replace(self, of=self.of.lean())

    def chunk_eviction(self, model: ModelInfo) -> ChunkEviction | None:
        """As the inner policy."""
        return self.of.chunk_eviction(model)

    def decode_eviction(self) -> DecodeEviction:
        """As the inner policy."""
        return self.of.decode_eviction()


@dataclass(frozen=True, kw_only=True)
class SelectorWrapper(Wrapper):
    """A wrapper that selects tokens in its own way, by the inner policy's scores and budgets.

    Raises PolicyError for an inner policy that is about its selector, since that would be taken away from it.
    """

    own_selector: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.of.own_selector:
            raise PolicyError(
                f"{self.name}: of={shown(self.of.spec)} selects tokens in a way of its own, which {self.name} would replace: "
                f"wrap a policy that scores tokens, such as {self.name}:of=snapkv"
            )

    def wrap(self, inner: Parts, prompt: PromptInfo) -> Parts:
        """Its selector."""
        return replace(inner, selector=self.selector_over(inner.selector))

    @abstractmethod
    def selector_over(self, inner: Selector) -> Selector:
        """The selector that takes the place of the inner policy's, and keeps its sinks and recent tokens."""


@dataclass(frozen=True, kw_only=True)
class WrappedScorer(Scorer):
    """A scorer that changes the scores of another one, ``inner``, and asks for the same queries."""

    inner: Scorer

    @property
    def nearby_queries(self) -> bool:  # type: ignore[override]
        """As the inner scorer."""
        return self.inner.nearby_queries

    def query_positions(self) -> Tensor:
        """As the inner scorer."""
        return self.inner.query_positions()

    def leader(self, layer: int) -> int:
        """As the inner scorer."""
        return self.inner.leader(layer)

    def move(self, queries: Queries, by: Tensor) -> Queries:
        """As the inner scorer."""
        return self.inner.move(queries, by)


def innermost(policy: Policy) -> Policy:
    """The policy that a wrapper, or a wrapper of one, changes; any other is itself."""
    while isinstance(policy, Wrapper):
        policy = policy.of
    return policy
