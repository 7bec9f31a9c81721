"""Spans of a prompt that every policy keeps (``keep=``): they count in the budget, and do not compete.

The policy sees the whole prompt when it scores. Budgets are then split, and tokens chosen, as if the protected ones were not
there: what each layer and head keeps is what the policy chose of the others, and the protected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnowkv.errors import BudgetError, InputError
from winnowkv.policies.parts import Allocator, LayerStates, Parts, PromptInfo, Selector, SharedTokens
from winnowkv.prompt.structure import remaining
from winnowkv.types import Entries, HeadScores, Indices, Scores, Spans

if TYPE_CHECKING:
    from winnowkv.models.info import ModelInfo
    from winnowkv.policies.base import Policy


def read_spans(keep: Any) -> Spans:
    """Spans ``(start, end)`` of token positions, sorted, those that touch as one; empty ones left out.

    Raises InputError for anything else.
    """
    try:
        spans = [(start, end) for start, end in keep]
    except (TypeError, ValueError):
        raise InputError(f"keep={keep!r} must be spans of token positions: give keep=[(start, end)]") from None
    for start, end in spans:
        if not whole(start, end) or not 0 <= start <= end:
            raise InputError(
                f"keep: the span ({start!r}, {end!r}) is none: give whole numbers, 0 <= start <= end, counted in tokens from "
                "the prompt's first"
            )
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return tuple(merged)


def whole(*numbers: Any) -> bool:
    """Whether all are whole numbers."""
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def check_spans(keep: Spans, tokens: int) -> None:
    """Raise InputError for a span past the end of a prompt of so many tokens."""
    for start, end in keep:
        if end > tokens:
            raise InputError(f"keep: the span ({start}, {end}) ends after the prompt of {tokens} tokens: give spans inside it")


def positions(keep: Spans) -> Tensor:
    """The protected positions, ascending ``[K]``."""
    return torch.cat([torch.arange(0), *(torch.arange(start, end) for start, end in keep)])


def competing(keep: Spans, tokens: int, sinks: int) -> Tensor:
    """The positions that a policy chooses from, ascending: all but the protected ones. Sinks stay anyway, by its own rule."""
    free = torch.ones(tokens, dtype=torch.bool)
    free[positions(keep)] = False
    free[:sinks] = True
    return free.nonzero()[:, 0]


def rest(policy: Policy, prompt: PromptInfo) -> PromptInfo:
    """The prompt without what is protected, for which a policy allocates and selects; the prompt itself if nothing is.

    Raises InputError for a span past its end, BudgetError if its budget cannot hold the protected tokens.
    """
    if not prompt.keep:
        return prompt
    check_spans(prompt.keep, prompt.tokens)
    others = without_protected(policy, prompt)
    gone = prompt.tokens - others.tokens
    if prompt.budget < prompt.tokens and prompt.budget <= gone:
        raise BudgetError(
            f"a budget of {prompt.budget} entries (prompt of {prompt.tokens} tokens) cannot hold the {gone} protected by keep= "
            f"and what {policy.name} always keeps: raise the budget, or protect less"
        )
    return others


def without_protected(policy: Policy, prompt: PromptInfo) -> PromptInfo:
    """:func:`rest`, unchecked: its budget may be 0 or less."""
    if not prompt.keep:
        return prompt
    free = competing(prompt.keep, prompt.tokens, policy.sinks)
    structure = prompt.task.structure
    task = prompt.task if structure is None else replace(prompt.task, structure=remaining(structure, free, prompt.tokens))
    budget = prompt.budget - (prompt.tokens - len(free))
    return replace(prompt, tokens=len(free), budget=budget, task=task, keep=())


def protect(policy: Policy, model: ModelInfo, prompt: PromptInfo, others: PromptInfo) -> Parts:
    """The parts of a policy for a prompt some of whose tokens are protected; ``others`` is the :func:`rest` of it."""
    seen = policy.parts(model, replace(prompt, keep=()))
    chosen = policy.parts(model, others)
    free = competing(prompt.keep, prompt.tokens, policy.sinks)
    outside = torch.ones(prompt.tokens, dtype=torch.bool)
    outside[free] = False
    cut = Competitors(free, outside.nonzero()[:, 0], max(others.tokens - chosen.scorer.window, 0))
    selector = chosen.selector
    shared = None
    if seen.shared is not None and chosen.shared is not None:
        shared = SharedAround(seen.shared, chosen.shared, cut)
    return Parts(
        seen.scorer,
        AllocatorAround(prompt, chosen.allocator, cut),
        SelectorAround(prompt.tokens, seen.selector.window, selector.sinks, inside=selector, cut=cut),
        shared,
        chosen.hint,
    )


@dataclass(frozen=True)
class Competitors:
    """Which positions compete (``free``) and which are ``protected``, ascending; ``context`` of the free ones are scored."""

    free: Tensor
    protected: Tensor
    context: int

    @property
    def count(self) -> int:
        """Protected tokens."""
        return len(self.protected)

    def scores(self, scores: Tensor) -> Tensor:
        """Scores ``[1, H, C]`` of all context tokens as scores of the free ones, ``[1, H, context]``."""
        columns = self.free[: int((self.free < scores.shape[-1]).sum())][: self.context]
        found = scores.index_select(-1, columns.to(scores.device))
        if len(columns) == self.context or not len(columns):
            return found
        # A window that is larger with the protected tokens than without: what it covers is as good as the best.
        best = found.masked_fill(found.isinf(), 0).amax(-1, keepdim=True)
        return torch.cat([found, best.expand(*best.shape[:-1], self.context - len(columns))], -1)

    def text(self, places: Indices) -> Indices:
        """Prompt positions of places among the free ones; what is missing, -1, stays so."""
        free = self.free.to(places.device)
        return free[places.long().clamp(min=0)].masked_fill(places < 0, -1)

    def places(self, text: Indices) -> Indices:
        """Places among the free ones of prompt positions that are free."""
        return torch.searchsorted(self.free.to(text.device), text.long())


@dataclass(frozen=True)
class AllocatorAround(Allocator):
    """Every layer gets what ``inside`` gives it, and the protected tokens."""

    inside: Allocator
    cut: Competitors

    def prefill_limits(self) -> list[Entries]:
        """As the inner allocator."""
        return self._with(self.inside.prefill_limits())

    def shrink(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[Entries]:
        """As the inner allocator, by the scores of what competes."""
        return self._with(self.inside.shrink(*self._without(scores, held)))

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[Entries]:
        """As the inner allocator, by the scores of what competes."""
        return self._with(self.inside.allocate(*self._without(scores, held)))

    def peak_entries(self) -> int:
        """The inner allocator's, and the protected tokens of every layer."""
        return self.inside.peak_entries() + self.cut.count * self.prompt.layers

    def _with(self, limits: Sequence[Entries]) -> list[Entries]:
        return [limit + self.cut.count for limit in limits]

    def _without(self, scores: Sequence[Scores], held: Sequence[Entries]) -> tuple[list[Scores], list[Entries]]:
        return [self.cut.scores(each) for each in scores], [entries - self.cut.count for entries in held]


@dataclass(frozen=True, kw_only=True)
class SelectorAround(Selector):
    """The protected tokens, and what ``inside`` selects of the others."""

    inside: Selector
    cut: Competitors

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """As the inner selector, from what competes."""
        chosen = self.cut.text(self.inside.select(layer, self.cut.scores(scores), entries - self.cut.count))
        protected = self.cut.protected.to(chosen.device).expand(*chosen.shape[:-1], -1)
        return torch.cat([chosen, protected], -1).sort(-1).values

    def recent_tokens(self, context: int, entries: Entries) -> int:
        """From the first of the inner selector's recent tokens on."""
        recent = self.inside.recent_tokens(self.cut.context, entries - self.cut.count)
        return self.tokens - int(self.cut.free[-recent]) if recent else 0


@dataclass(frozen=True)
class SharedAround(SharedTokens):
    """``seen`` votes with the whole prompt in sight, ``inside`` chooses from what competes."""

    seen: SharedTokens
    inside: SharedTokens
    cut: Competitors

    def query_positions(self) -> Tensor:
        """As for the whole prompt."""
        return self.seen.query_positions()

    def vote(self, states: LayerStates) -> HeadScores:
        """As for the whole prompt."""
        return self.seen.vote(states)

    def choose(self, votes: Sequence[HeadScores], earlier: Indices | None) -> Indices:
        """By the votes on what competes."""
        before = None if earlier is None else self.cut.places(earlier)
        return self.cut.text(self.inside.choose([self.cut.scores(each) for each in votes], before))
