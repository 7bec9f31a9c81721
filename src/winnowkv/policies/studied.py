"""What a study makes of another policy: what it found out takes the place of scores, and one top-k that of budgets.

Where every head must keep the same number, sentences that all heads keep may take a part of it (:class:`StudiedSentences`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from winnowkv.policies.compose import WrappedScorer, Wrapper, from_inner
from winnowkv.policies.kvzip import study_choice
from winnowkv.policies.parts import LayerStates, Parts, PromptInfo, Selector, SharedTokens
from winnowkv.policies.sentences import owners
from winnowkv.scoring.select import top_spans
from winnowkv.scoring.spans import span_reduce
from winnowkv.types import HeadScores, Indices, Queries, Scores

LONGEST_SENTENCE = 64  # tokens; longer ones are cut
SPAN_WIDTH = 16  # tokens of a span, if the sentences are not known


@dataclass(frozen=True, kw_only=True)
class StudiedPolicy(Wrapper):
    """A policy while a text is studied (cache/study.py); no policy to ask for.

    Where the inner policy keeps each head's best tokens, all tokens but its sinks compete by the study alone, in one top-k over
    all layers and heads as in KVzip: its own scores beside the study's, and a window at the text's end, were measured worse
    (docs/documents.md). If the inner policy has ``equal=true``, each head keeps its own best, beside :class:`StudiedSentences`
    that take the share ``sentences`` of the budget in every head. Any other way to select (spans, budgets of heads, tokens that
    all layers keep) stays as it is, by the policy's own scores pooled with the study's.
    """

    source: ClassVar[str] = "ours, docs/documents.md"
    scope: ClassVar[str] = "as the inner policy, budgets over layers and heads by a study of the text"

    sentences: float = 0.0

    name = from_inner("name")

    @property
    def selects(self) -> bool:
        """Whether the study selects, and not the inner policy."""
        return not (self.of.own_selector or self.of.keeps_spans)

    @property
    def shares_sentences(self) -> bool:
        """Whether all layers and heads keep the same sentences, whose ends it then asks for."""
        return self.selects and self.of.equal and self.sentences > 0

    @property
    def uses_structure(self) -> bool:  # type: ignore[override]
        """If sentences are shared; else as the inner policy."""
        return self.shares_sentences or self.of.uses_structure

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
        shared = StudiedSentences.of(prompt, inner.selector.sinks, self.sentences) if self.shares_sentences else None
        return Parts(StudyScorer(prompt.tokens, 0, inner=inner.scorer), allocator, selector, shared, inner.hint)


@dataclass(frozen=True)
class StudiedSentences(SharedTokens):
    """Sentences that all layers and heads keep, by the most attention that their tokens get in a study.

    Heads that look things up attend to nearly every token of a text that is read again, one each. Where budgets are shared
    between heads they get most of it; if each keeps the same number, each keeps other tokens, and no fact is left whole. The
    maximum over the queries, mean over the layers' heads and over a sentence, is high where it differs from what is around it.

    Parameters
    ----------
    ends: ascending positions just past each sentence. longest: most tokens of a span.
    sinks: first tokens, which always stay. room: how many tokens the sentences get.
    """

    ends: tuple[int, ...]
    longest: int
    sinks: int
    room: int

    @classmethod
    def of(cls, prompt: PromptInfo, sinks: int, share: float) -> StudiedSentences:
        """Of a text, for a share of its budget; spans of :data:`SPAN_WIDTH` tokens if its sentences are not known."""
        structure, room = prompt.task.structure, max(min(int(share * prompt.budget), prompt.budget - sinks), 0)
        if structure is None or structure.tokens != prompt.tokens:
            return cls((), SPAN_WIDTH, sinks, room)
        return cls(structure.ends, LONGEST_SENTENCE, sinks, room)

    def query_positions(self) -> Tensor:
        """None: the study's own queries vote."""
        return torch.arange(0)

    def vote(self, states: LayerStates) -> HeadScores:
        """The most attention that a query of the study pays to each token, mean over the heads, ``[1, 1, S]``."""
        assert states.studied is not None
        return states.studied.most.mean(1, keepdim=True)

    def choose(self, votes: Sequence[HeadScores], earlier: Indices | None) -> Indices:
        """The best sentences, ``[1, 1, room]``; the last one that fits by half gives its best tokens.

        Nothing is evicted before all layers have voted, so that there is no ``earlier`` choice.
        """
        scores = torch.cat(list(votes), 1).mean(1, keepdim=True)
        owner = owners(scores.shape[-1], (self.sinks, *self.ends), self.longest, scores.device)
        spans = span_reduce(scores, owner, scores.shape[-1])
        standing = scores.clone()
        standing[..., : self.sinks] = -1.0  # they stay anyway
        return top_spans(spans, standing, owner, min(self.room, scores.shape[-1] - self.sinks))


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
