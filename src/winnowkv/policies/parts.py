"""The exchangeable parts of a policy for one prompt: scorer, allocator, selector, and what they know of prompt and layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnowkv.models.head_group import ALL_HEADS, HeadGroup
from winnowkv.prompt.task import TaskProfile
from winnowkv.scoring.allocate import uniform
from winnowkv.scoring.attention import heard_attention
from winnowkv.scoring.select import top_tokens, with_recent, with_sinks
from winnowkv.scoring.study import Evidence
from winnowkv.types import Entries, HeadScores, Indices, Keys, Projection, Queries, Scores, Spans, Values


@dataclass(frozen=True)
class PromptInfo:
    """What a policy knows of one request.

    Attributes
    ----------
    tokens: prompt tokens ``S``, padding not counted.
    layers: layers whose cache may be compressed (full-attention layers).
    budget: entries per layer and KV head, mean over layers; at most ``tokens``.
    task: what the prompt asks for and where its question and sentences are, as far as this is known.
    keep: spans that stay whatever they score (policies/protected.py).
    raised_from: entries that the budget, a fraction, would have been if it could hold what always stays; None if it is that.
    """

    tokens: int
    layers: int
    budget: int
    task: TaskProfile = field(default_factory=TaskProfile)
    keep: Spans = ()
    raised_from: int | None = None

    @property
    def total(self) -> int:
        """Entries per KV head over all layers."""
        return self.budget * self.layers


@dataclass(frozen=True)
class LayerStates:
    """What one layer computed of one request's prompt.

    Attributes
    ----------
    layer: its number among the compressed layers.
    queries: ``[1, Hq, W, D]`` after RoPE, those at the positions that the part asked for.
    keys, values: of the whole prompt, ``[1, Hkv, S, D]``, KV heads unexpanded.
    scale: what attention multiplies its logits by.
    projection: the layer's output projection ``[Hq, D, M]``, if the policy needs it.
    heard: queries ``[1, Hq, k, D]`` of tokens after the prompt, None if there are none; ``weight``: theirs, beside the
        prompt's own.
    studied: what was found out about a text by a study of it, None if there was none; it takes the place of ``heard``.
    heads: the processes that share the layer's heads, if the model runs with tensor parallelism. ``Hq`` and ``Hkv`` are then
        those of this process for a part that :attr:`Scorer.shares_heads`, those of the model for any other.
    """

    layer: int
    queries: Queries
    keys: Keys
    values: Values
    scale: float
    projection: Projection | None = None
    heads: HeadGroup = ALL_HEADS
    heard: Queries | None = None
    weight: float = 0.0
    studied: Evidence | None = None

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.keys.shape[1]

    def of_all_heads(self) -> LayerStates:
        """The states of all heads, fetched from the processes that have them."""
        if self.heads.size == 1:
            return self
        queries, keys, values = (self.heads.whole(states) for states in (self.queries, self.keys, self.values))
        projection = None if self.projection is None else self.heads.whole(self.projection, 0)
        heard = None if self.heard is None else self.heads.whole(self.heard)
        return LayerStates(self.layer, queries, keys, values, self.scale, projection, heard=heard, weight=self.weight)


@dataclass(frozen=True)
class Scorer:
    """How important each context token of a layer is.

    Parameters
    ----------
    tokens: prompt tokens ``S``.
    window: the last tokens that do not compete; the ``C = S - window`` before them are scored.

    Class attributes
    ----------------
    nearby_queries: whether a query near a position that was asked for serves as well, as for samples of a text.
    shares_heads: with tensor parallelism, whether :meth:`score` works on the heads of this process and gets at the others by
        ``states.heads``. If not, it is given the states of all heads, which costs each process their transfer and all the work.
    """

    tokens: int
    window: int = 0
    nearby_queries: ClassVar[bool] = False
    shares_heads: ClassVar[bool] = False

    def query_positions(self) -> Tensor:
        """Ascending prompt positions of the queries that :meth:`score` wants; the observation window by default."""
        return torch.arange(max(self.tokens - self.window, 0), self.tokens)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "score" in vars(cls) and "shares_heads" not in vars(cls):
            cls.shares_heads = False  # what a base class says of its score() does not hold for another one

    def score(self, states: LayerStates) -> Scores:
        """Importance of each context token, ``[1, H, C]``: finite, not negative, higher is kept; of all heads, everywhere."""
        raise TypeError(f"{type(self).__name__} does not define score()")

    def score_all(self, states: LayerStates) -> Scores:
        """:meth:`score`, with what it needs of the heads of other processes, and what was heard after the prompt."""
        given = states if self.shares_heads else states.of_all_heads()
        scores = self.score(given)
        if given.studied is not None:
            return self.with_studied(scores, given)
        return scores if given.heard is None else self.with_heard(scores, given)

    def with_heard(self, scores: Scores, states: LayerStates) -> Scores:
        """The policy's own scores, and the attention of ``states.heard``, by ``states.weight``; ``[1, H, C]``.

        Of the heard queries a token scores the root mean square of their attention. Both sides are brought to the same sum over
        the layer, which stays that of the policy's own: budgets of layers are still by these.
        """
        assert states.heard is not None
        by_query = scores.shape[1] > states.kv_heads * states.heads.size
        heads = states.heard.shape[1] if by_query else states.kv_heads
        attention = heard_attention(states.heard, states.keys, states.scale, scores.shape[-1], heads, states.heads)
        if scores.shape[1] == 1:
            attention = attention.mean(1, keepdim=True)
        total = scores.sum()
        share = states.weight * total / attention.sum().clamp(min=1e-30)
        return scores * (1 - states.weight) + attention * share

    def with_studied(self, scores: Scores, states: LayerStates) -> Scores:
        """The policy's own scores pooled with those of a study, ``[1, H, C]``."""
        assert states.studied is not None
        return states.studied.pooled(scores, states.weight)

    def answer_queries(self, states: LayerStates) -> Queries:
        """Of ``states.queries`` those that stand in for the answer's, as if they came after the prompt; for refit."""
        return states.queries

    def leader(self, layer: int) -> int:
        """The layer whose scores and selection this layer uses; itself if nothing is shared."""
        return layer

    def move(self, queries: Queries, by: Tensor) -> Queries:
        """Queries ``[1, Hq, k, D]`` as if they stood ``by`` ``[k]`` positions later; for scorers that move queries themselves.

        Asked when a prompt lost tokens between chunks: positions among what is left are not those of the text.
        """
        return queries


@dataclass(frozen=True)
class QueryFreeScorer(Scorer):
    """A scorer that reads keys and values alone."""

    def query_positions(self) -> Tensor:
        """None."""
        return torch.arange(0)


@dataclass(frozen=True)
class Allocator:
    """How many entries each layer gets: here every layer the same, at once.

    Entries count per KV head, mean over the heads of a layer, sinks and recent window included.
    """

    prompt: PromptInfo

    def prefill_limits(self) -> Sequence[Entries]:
        """Entries that each layer may hold while the prompt is read; for one-shot policies what it ends with."""
        return uniform(self.prompt.layers, self.prompt.budget)

    def shrink(self, scores: Sequence[Scores], held: Sequence[Entries]) -> Sequence[Entries]:
        """New limits of the layers read so far, never above what they hold; by default nothing changes."""
        return list(held)

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> Sequence[Entries]:
        """What every layer ends with, once all are read; the sum is ``prompt.total``. One-shot policies are there already."""
        return list(held)

    def peak_entries(self) -> int:
        """Entries per KV head over all layers that are never passed while the prompt is read."""
        return self.prompt.layers * self.prompt.tokens


@dataclass(frozen=True)
class Selector:
    """Which tokens of a layer stay: here the best of each head, sinks and the last ``window`` tokens always.

    Parameters
    ----------
    tokens: prompt tokens ``S``.
    window: the last tokens that do not compete. sinks: first tokens that always stay.
    recent: how many of the window stay; None: all of it.
    inner: of a wrapper's selector, the one that it takes the place of and whose recent tokens stay; else None.
    """

    tokens: int
    window: int = 0
    sinks: int = 0
    recent: int | None = None
    inner: Selector | None = None

    def select(self, layer: int, scores: Scores, entries: Entries) -> Indices:
        """Positions that stay, ascending, ``[1, H, n]``, sinks and recent window included.

        ``entries`` for each head of ``scores``; a selector with budgets per head splits ``entries`` times the number of heads
        between them and pads the shorter ones in front with -1.
        """
        recent = self.recent_tokens(scores.shape[-1], entries)
        context = top_tokens(with_sinks(scores, self.sinks), int(entries) - recent)
        return with_recent(context, self.tokens, recent)

    def recent_tokens(self, context: int, entries: Entries) -> int:
        """How many of the last tokens stay whatever they score, if a head keeps so many ``entries``.

        More than ``recent`` if the ``context`` tokens that compete cannot fill them.
        """
        if self.inner is not None:
            return self.inner.recent_tokens(context, entries)
        recent = self.window if self.recent is None else self.recent
        return max(recent, int(entries) - context)


class SharedTokens(ABC):
    """Tokens that all layers keep together: each layer votes, and the votes of the layers read so far choose."""

    shares_heads: ClassVar[bool] = False  # as of Scorer, for vote()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "vote" in vars(cls) and "shares_heads" not in vars(cls):
            cls.shares_heads = False

    @abstractmethod
    def query_positions(self) -> Tensor:
        """Ascending prompt positions of the queries that :meth:`vote` wants."""

    @abstractmethod
    def vote(self, states: LayerStates) -> HeadScores:
        """What this layer says of each context token, ``[1, h, C]`` for any number ``h`` of heads; in every process."""

    def vote_all(self, states: LayerStates) -> HeadScores:
        """:meth:`vote`, with what it needs of the heads of other processes."""
        return self.vote(states if self.shares_heads else states.of_all_heads())

    @abstractmethod
    def choose(self, votes: Sequence[HeadScores], earlier: Indices | None) -> Indices:
        """Context positions that every layer read so far keeps, ``[1, 1, n]``, a part of those chosen ``earlier``."""


@dataclass(frozen=True)
class Parts:
    """The exchangeable parts of a policy for one prompt.

    ``hint`` is one line for the report on what would make the policy better.
    """

    scorer: Scorer
    allocator: Allocator
    selector: Selector
    shared: SharedTokens | None = None
    hint: str | None = None


class ChunkEviction(ABC):
    """Which entries of all layers stay between two chunks. All layers keep the same ones."""

    samples: int  # queries of the text that are kept for later chunks
    least: int  # entries that always stay

    @abstractmethod
    def scorer(self, held: int) -> Scorer:
        """Scores what a layer holds, ``held`` entries, as if that were a prompt."""

    @abstractmethod
    def select(self, scores: Scores, held: Tensor, entries: int) -> Tensor:
        """Which ``entries`` of those ``held`` (text positions, ascending) stay, ascending ``[n]``.

        ``scores`` ``[1, 1, C]`` are the layers' scores, summed; what is held after ``C`` always stays.
        """
