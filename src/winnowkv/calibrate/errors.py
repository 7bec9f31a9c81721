"""Eviction error of each layer: the change of its attention block's output when this layer alone keeps a small cache.

Source: CompressKV (arXiv 2508.02401): relative Frobenius error after the output projection, on decode steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from winnowkv.policies import BoundPolicy, LayerStates
from winnowkv.scoring.attention import causal_attention
from winnowkv.types import Indices, Keys, Queries

EPSILON = 1e-5  # as in the authors' repository


def attention_output(queries: Queries, keys: Keys, values: Tensor, scale: float, kept: Tensor | None) -> Float[Tensor, "q E"]:
    """Attention output of the newest ``q`` queries before the projection, float32, ``E = Hq * D``; of ``kept`` entries only."""
    if kept is not None:
        keys, values = keys[:, :, kept], values[:, :, kept]
    attention = causal_attention(queries, keys, scale)[0]
    output: Tensor = attention.unflatten(0, (keys.shape[1], -1)) @ values[0].float()[:, None]
    return output.flatten(0, 1).transpose(0, 1).flatten(1)


def relative_error(compact: Tensor, full: Tensor) -> float:
    """Frobenius norm of the difference over that of the full output."""
    return float((compact - full).norm() / (full.norm() + EPSILON))


def project(output: Tensor, projection: nn.Module) -> Tensor:
    """The attention output after the block's output projection, computed in its dtype and returned as float32."""
    weight = next(projection.parameters())
    projected: Tensor = projection(output[None].to(weight.dtype))
    return projected[0].float()


def layer_shares(errors: Iterable[tuple[str, Sequence[float]]]) -> list[float]:
    """Each layer's share of the error: normalised within every prompt set, then the mean over sets; the sum is 1."""
    sets: Mapping[str, list[Tensor]] = defaultdict(list)
    for name, row in errors:
        sets[name].append(torch.tensor(row, dtype=torch.float64))
    sums = [torch.stack(rows).mean(0) for rows in sets.values()]
    return torch.stack([row / row.sum() for row in sums]).mean(0).tolist()


class ErrorWatch:
    """A watcher that chooses a small cache for each layer at prefill and measures its error at every decode step.

    ``bound`` keeps its prompt's budget in every layer; generated tokens always stay. Hidden states come from the
    full cache, so that one layer's error does not reach another.
    """

    def __init__(self, bound: BoundPolicy, projections: Sequence[nn.Module]) -> None:
        self._bound, self._wanted = bound, bound.query_positions()
        self._projections = projections
        self._kept: list[Tensor] = []
        self.errors: list[list[float]] = [[] for _ in projections]

    def __call__(self, layer: int, queries: Queries, keys: Keys, values: Tensor, scale: float) -> None:
        """Watcher of a :class:`ProbedCache`."""
        if layer == len(self._kept):  # this is the prefill
            states = LayerStates(layer, queries[:, :, self._wanted], keys, values, scale)
            scores = self._bound.parts.scorer.score(states)
            positions: Indices = self._bound.parts.selector.select(layer, scores, self._bound.prompt.budget)
            self._kept.append(positions[0, 0])
            return
        decoded = torch.arange(self._bound.prompt.tokens, keys.shape[2], device=keys.device)
        columns = torch.cat([self._kept[layer], decoded])
        full, compact = (
            project(attention_output(queries, keys, values, scale, kept), self._projections[layer]) for kept in (None, columns)
        )
        self.errors[layer].append(relative_error(compact, full))
