"""Retrieval scores of query heads, and the watcher that collects what they need while a model answers.

The semantic score is CompressKV's (arXiv 2508.02401): attention mass on the whole answer span, at the
steps whose generated token is in it. The traditional score (arXiv 2404.15574) counts copies: the entry
with the most attention is in the span and is the generated token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnowkv.scoring.attention import causal_attention
from winnowkv.types import Keys, Queries

Span = tuple[int, int]  # token positions, half open
Masses = Float[Tensor, "T L Hq"]
Positions = Int[Tensor, "T L Hq"]
HeadTable = Float[Tensor, "L Hq"]


def last_query_attention(queries: Queries, keys: Keys, scale: float) -> Float[Tensor, "Hq K"]:
    """Attention of the newest query over all held keys, float32."""
    return causal_attention(queries[:, :, -1:], keys, scale)[0, :, 0]


def semantic_scores(masses: Masses, generated: Sequence[int], answer: Collection[int]) -> tuple[HeadTable, int]:
    """Span mass summed over the steps whose token is one of the answer's, and the number of these steps.

    Unlike in the repository, a step counts once, however often its token is in the answer.
    """
    counted = [step for step, token in enumerate(generated) if token in answer]
    return masses[counted].sum(0), len(counted)


def traditional_scores(positions: Positions, generated: Sequence[int], prompt: Sequence[int], span: Span) -> HeadTable:
    """Share of the span's tokens that each head copied: its strongest entry is in the span and is the generated token."""
    begin, end = span
    tokens = torch.tensor(prompt)
    hits: dict[int, Tensor] = {}  # by token: as in the paper, a token counts once per head
    for step, token in enumerate(generated):
        inside = (positions[step] >= begin) & (positions[step] < end)
        hit = inside & (tokens[positions[step].clamp(begin, end - 1)] == token)
        hits[token] = hits[token] | hit if token in hits else hit
    return torch.stack(list(hits.values())).sum(0) / len(set(prompt[begin:end]))


class HeadWatch:
    """A watcher that records, per step and layer, every head's attention mass on a span and its strongest entry.

    A step is a forward pass: its last query is the one that generates the token.
    """

    def __init__(self, layers: int, span: Span) -> None:
        self._layers = layers
        self._span = span
        self._mass: list[Tensor] = []
        self._strongest: list[Tensor] = []

    def __call__(self, layer: int, queries: Queries, keys: Keys, values: Tensor, scale: float) -> None:
        """Watcher of a :class:`ProbedCache`."""
        attention = last_query_attention(queries, keys, scale)
        self._mass.append(attention[:, self._span[0] : self._span[1]].sum(-1).cpu())
        self._strongest.append(attention.argmax(-1).cpu())

    def evidence(self) -> tuple[Masses, Positions]:
        """Everything recorded: masses and positions of the strongest entries, ``[T, L, Hq]`` each."""
        return tuple(torch.stack(rows).unflatten(0, (-1, self._layers)) for rows in (self._mass, self._strongest))
