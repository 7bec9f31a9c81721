"""KVzip: entries that the model attends to while it repeats the text; no question needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.parts import Allocator, LayerStates, PromptInfo, QueryFreeScorer, Selector
from winnowkv.scoring.allocate import global_top_k, uniform
from winnowkv.scoring.select import ragged_tokens, with_sinks
from winnowkv.types import Entries, Indices, Scores


@dataclass(frozen=True, kw_only=True)
class KVzip(TokenPolicy):
    """The most attention that an entry gets while the text is read again, by one top-k over all layers and heads.

    After the text comes an instruction to repeat it, and the text itself, 2,048 tokens at a time over the whole cache (arXiv
    2505.23416, section 3). Served by ``wk.read`` alone, since it needs the text once more.

    Formula
    -------
    ``score[i] = max over q and the group of A[q, i]``, over the queries of the text read again. With ``plus`` ``max over q and
    the group of A[q, i] * |W_O v[i]| / |x[q]|``, in which ``x[q]`` is the hidden state as attention enters it.

    Parameters
    ----------
    plus: weigh attention by what values add to the hidden state: KVzip+ (arXiv 2601.07891).
    equal: every head of every layer keeps the same number, its own best (ours).

    Departures
    ----------
    From the authors' code: the softmax is over the whole cache, and an entry may score from any part of the text read again;
    there each part is scored by itself, without the keys of the others.
    """

    name: ClassVar[str] = "kvzip"
    source: ClassVar[str] = "KVzip, arXiv 2505.23416; KVzip+, arXiv 2601.07891"
    scope: ClassVar[str] = "tokens per KV head, budgets over layers and heads, by the text read again"
    purpose: ClassVar[str] = "a text that is kept and asked later, read twice; only with wk.read"
    own_selector: ClassVar[bool] = True
    needs_study: ClassVar[bool] = True

    sinks: int = 4
    plus: bool = False
    equal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("observe", minimum=0, maximum=0)

    @property
    def weighs_values(self) -> bool:  # type: ignore[override]
        """With ``plus``."""
        return self.plus

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        """Without ``equal``."""
        return not self.equal

    @property
    def keeps_equal(self) -> bool:  # type: ignore[override]
        """With ``equal``."""
        return self.equal

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> AgainScorer:
        """By the study alone."""
        return AgainScorer(prompt.tokens)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """One top-k over all layers and heads; with ``equal`` the same for every layer."""
        return study_choice(prompt, self.sinks, equal=self.equal)[0]

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """And again over the heads of a layer, which gives each what it had in that; with ``equal`` the best of each head."""
        return study_choice(prompt, self.sinks, equal=self.equal)[1]


def study_choice(prompt: PromptInfo, sinks: int, *, equal: bool) -> tuple[Allocator, Selector]:
    """How a study's scores choose: by one top-k over all layers and heads, or the best of each head, ``equal`` everywhere.

    The ``sinks`` stay in every head; there is no window.
    """
    if equal:
        return WholeAllocator(prompt), Selector(prompt.tokens, 0, sinks)
    return StudyAllocator(prompt, sinks), TopHeads(prompt.tokens, 0, sinks)


@dataclass(frozen=True)
class AgainScorer(QueryFreeScorer):
    """The maximum of attention over the queries of the text read again."""

    def score(self, states: LayerStates) -> Scores:
        """``[1, Hkv, S]``."""
        assert states.studied is not None
        return states.studied.most

    def with_studied(self, scores: Scores, states: LayerStates) -> Scores:
        """They are the study's already."""
        return scores


@dataclass(frozen=True)
class WholeAllocator(Allocator):
    """Every layer the same, once the text was studied; everything is held until then."""

    def prefill_limits(self) -> list[int]:
        """Everything."""
        return [self.prompt.tokens] * self.prompt.layers

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> Sequence[Entries]:
        """The budget each."""
        return uniform(self.prompt.layers, self.prompt.budget)


@dataclass(frozen=True)
class StudyAllocator(WholeAllocator):
    """A layer keeps what it has of the best scores of all layers and heads; the ``sinks`` stay in each."""

    sinks: int

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[Entries]:
        """Mean entries over the heads of a layer, a fraction if they do not divide; the sum is exact."""
        heads = scores[0].shape[1]
        winners = global_top_k([with_sinks(layer, self.sinks) for layer in scores], self.prompt.total * heads)
        return [Fraction(count, heads) for count in winners]


@dataclass(frozen=True)
class TopHeads(Selector):
    """The best tokens over all heads of a layer, sinks in each; there is no window."""

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """As many of each head as are among the layer's best."""
        tokens = with_sinks(scores, self.sinks)
        return ragged_tokens(tokens, global_top_k(list(tokens.split(1, dim=1)), int(entries * scores.shape[1])))
