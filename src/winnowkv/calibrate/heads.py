"""Which query heads retrieve: pure scores, and the watcher that gathers their evidence while a model answers.

Semantic retrieval heads are CompressKV's (arXiv 2508.02401): the attention mass on the whole
answer span at the steps whose generated token lies in it. Traditional ones (arXiv 2404.15574)
copy: the strongest entry lies in the span and is the token generated.
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
Places = Int[Tensor, "T L Hq"]
HeadTable = Float[Tensor, "L Hq"]


def last_query_attention(queries: Queries, keys: Keys, scale: float) -> Float[Tensor, "Hq K"]:
    """Attention of the newest query alone over everything held, float32."""
    return causal_attention(queries[:, :, -1:], keys, scale)[0, :, 0]


def semantic_scores(masses: Masses, generated: Sequence[int], answer: Collection[int]) -> tuple[HeadTable, int]:
    """Span mass summed over the steps whose token is one of the answer's, and the number of these steps.

    Departure from the repository: a step counts once, however often its token stands in the answer.
    """
    counted = [step for step, token in enumerate(generated) if token in answer]
    return masses[counted].sum(0), len(counted)


def traditional_scores(places: Places, generated: Sequence[int], prompt: Sequence[int], span: Span) -> HeadTable:
    """Share of the span's tokens that a head copied: its strongest entry is in the span and is the token generated."""
    begin, end = span
    tokens = torch.tensor(prompt)
    hits: dict[int, Tensor] = {}  # a set of copied tokens, as the paper defines it: a token counts once a head
    for step, token in enumerate(generated):
        inside = (places[step] >= begin) & (places[step] < end)
        hit = inside & (tokens[places[step].clamp(begin, end - 1)] == token)
        hits[token] = hits[token] | hit if token in hits else hit
    return torch.stack(list(hits.values())).sum(0) / len(set(prompt[begin:end]))


class HeadWatch:
    """Per step and layer: every head's attention mass on a span, and where its strongest entry lies.

    A step is a forward pass; what its last query attends to, and the token it generates, belong together.
    """

    def __init__(self, layers: int, span: Span) -> None:
        self._layers = layers
        self._span = span
        self._mass: list[Tensor] = []
        self._place: list[Tensor] = []

    def __call__(self, slot: int, queries: Queries, keys: Keys, values: Tensor, scale: float) -> None:
        """Watcher of a :class:`ProbedCache`."""
        attention = last_query_attention(queries, keys, scale)
        self._mass.append(attention[:, self._span[0] : self._span[1]].sum(-1).cpu())
        self._place.append(attention.argmax(-1).cpu())

    def evidence(self) -> tuple[Masses, Places]:
        """Everything gathered, ``[T, L, Hq]`` each."""
        return tuple(torch.stack(rows).unflatten(0, (-1, self._layers)) for rows in (self._mass, self._place))
