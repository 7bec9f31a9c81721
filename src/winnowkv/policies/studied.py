"""What a study makes of another policy: what it found out takes the place of scores, and one top-k that of budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.compose import WrappedScorer, Wrapper, from_inner
from winnowkv.policies.kvzip import study_choice
from winnowkv.policies.parts import LayerStates, Parts, PromptInfo, Selector
from winnowkv.types import Queries, Scores


@dataclass(frozen=True, kw_only=True)
class StudiedPolicy(Wrapper):
    """A policy while a text is studied (cache/study.py); no policy to ask for.

    Where the inner policy keeps each head's best tokens, all tokens but its sinks compete by the study alone, in one top-k over
    all layers and heads as in KVzip, or in each head by itself if the inner policy has ``equal=true``: its own scores beside
    the study's, and a window at the text's end, were measured worse (docs/documents.md). Any other way to select (spans,
    budgets of heads, tokens that all layers keep) stays as it is, by the policy's own scores pooled with the study's.
    """

    source: ClassVar[str] = "ours, docs/documents.md"
    scope: ClassVar[str] = "as the inner policy, budgets over layers and heads by a study of the text"

    name = from_inner("name")

    @property
    def selects(self) -> bool:
        """Whether the study selects, and not the inner policy."""
        return not (self.of.own_selector or self.of.keeps_spans)

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        """Heads may keep different numbers if the study selects."""
        return (self.selects and not self.of.equal) or self.of.per_head

    @property
    def keeps_equal(self) -> bool:  # type: ignore[override]
        """Where the study selects, with the option ``equal`` alone."""
        return self.of.keeps_equal and (self.of.equal or not self.of.evicts or not self.selects)

    def wrap(self, inner: Parts, prompt: PromptInfo) -> Parts:
        """All three parts, or none."""
        if not self.selects or type(inner.selector) is not Selector or inner.shared is not None:
            return inner
        allocator, selector = study_choice(prompt, inner.selector.sinks, equal=self.of.equal)
        return Parts(StudyScorer(prompt.tokens, 0, inner=inner.scorer), allocator, selector, hint=inner.hint)


@dataclass(frozen=True, kw_only=True)
class StudyScorer(WrappedScorer):
    """The study's scores; the inner scorer's queries stand in for the answer's where values are refitted."""

    def score(self, states: LayerStates) -> Scores:
        """``[1, Hkv, S]``."""
        assert states.studied is not None
        return states.studied.scores()

    def with_studied(self, scores: Scores, states: LayerStates) -> Scores:
        """They are the study's already."""
        return scores

    def leader(self, layer: int) -> int:
        """Each layer has scores of its own."""
        return layer

    def answer_queries(self, states: LayerStates) -> Queries:
        """As the inner scorer."""
        return self.inner.answer_queries(states)
