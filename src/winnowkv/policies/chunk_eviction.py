"""What goes between the chunks of a long prompt: spans that the text's own queries would not attend to from its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnowkv.models.info import ModelInfo
from winnowkv.policies.expected import Expected, ExpectedScorer
from winnowkv.policies.parts import ChunkEviction
from winnowkv.scoring.select import top_spans, with_recent, with_sinks
from winnowkv.scoring.spans import span_reduce
from winnowkv.types import Scores

CHUNK_SPAN = 16  # tokens of a span that goes or stays between chunks
CHUNK_SPAN_TOP = 8  # of its tokens, how many a span is scored by


@dataclass(frozen=True)
class ExpectedSpans(ChunkEviction):
    """Spans of consecutive tokens by the attention of the text's own queries, moved to its end (:class:`Expected`)."""

    model: ModelInfo
    options: Expected = field(default_factory=Expected)

    @property
    def samples(self) -> int:  # type: ignore[override]
        """As many as :class:`Expected` looks at."""
        return self.options.samples

    @property
    def least(self) -> int:  # type: ignore[override]
        """Sinks and recent window."""
        return self.options.sinks + self.options.observe

    def scorer(self, held: int) -> ExpectedScorer:
        """The scorer of :class:`Expected` over what is held."""
        return self.options.scorer_of(self.model, held, min(self.options.observe, held))

    def select(self, scores: Scores, held: Tensor, entries: int) -> Tensor:
        """Sinks, the best spans, what does not compete."""
        return best_spans(scores, held, self.options.sinks, entries)


def best_spans(scores: Scores, held: Tensor, sinks: int, entries: int) -> Tensor:
    """Which ``entries`` of those held stay, ascending: sinks, best spans by ``scores`` ``[1, 1, C]``, all after ``C``.

    A span is :data:`CHUNK_SPAN` tokens of the text, as far as they are still there; the sinks are one.
    """
    context = scores.shape[-1]
    recent = len(held) - context
    owner = torch.where(held < sinks, -1, held // CHUNK_SPAN)[:context].unique_consecutive(return_inverse=True)[1]
    tokens = with_sinks(scores, sinks)
    best = top_spans(span_reduce(tokens, owner, CHUNK_SPAN_TOP), tokens, owner, entries - recent)
    return with_recent(best, len(held), recent)[0, 0]
