"""What eviction costs a layer: how far its attention block's output moves when that layer alone keeps a small cache.

Source: CompressKV (arXiv 2508.02401): relative Frobenius error after the output projection, on decode steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from winnowkv.policies import Policy, Prompt
from winnowkv.scoring.attention import causal_attention
from winnowkv.types import Indices, Keys, Queries

EPSILON = 1e-5  # the repository's


def attention_output(queries: Queries, keys: Keys, values: Tensor, scale: float, kept: Tensor | None) -> Float[Tensor, "q E"]:
    """Output of the newest ``q`` queries before the projection, float32, ``E = Hq * D``; over ``kept`` columns only."""
    if kept is not None:
        keys, values = keys[:, :, kept], values[:, :, kept]
    attention = causal_attention(queries, keys, scale)[0]
    output = attention.unflatten(0, (keys.shape[1], -1)) @ values[0].float()[:, None]
    return output.flatten(0, 1).transpose(0, 1).flatten(1)


def relative_error(compact: Tensor, full: Tensor) -> float:
    """Frobenius norm of the difference over that of the full output."""
    return float((compact - full).norm() / (full.norm() + EPSILON))


def project(output: Tensor, projection: nn.Module) -> Tensor:
    """Through the block's own output projection, in its own type."""
    weight = next(projection.parameters())
    return projection(output[None].to(weight.dtype))[0].float()


def layer_shares(errors: Iterable[tuple[str, Sequence[float]]]) -> list[float]:
    """Each layer's share of the error: normalised within every prompt set, then the mean over sets; the sum is 1."""
    sets: Mapping[str, list[Tensor]] = defaultdict(list)
    for name, row in errors:
        sets[name].append(torch.tensor(row, dtype=torch.float64))
    sums = [torch.stack(rows).mean(0) for rows in sets.values()]
    return torch.stack([row / row.sum() for row in sums]).mean(0).tolist()


class ErrorWatch:
    """At prefill chooses each layer's small cache, at every decode step measures what it loses.

    ``policy`` chooses with ``entries`` in every layer; generated tokens always stay, and hidden
    states come from the full cache, so one layer's loss never reaches another.
    """

    def __init__(self, policy: Policy, entries: int, prompt: Prompt, projections: Sequence[nn.Module]) -> None:
        self._policy, self._entries, self._prompt = policy, entries, prompt
        self._projections = projections
        self._kept: list[Tensor] = []
        self.errors: list[list[float]] = [[] for _ in projections]

    def __call__(self, slot: int, queries: Queries, keys: Keys, values: Tensor, scale: float) -> None:
        """Watcher of a :class:`ProbedCache`."""
        if slot == len(self._kept):  # the prompt's turn
            scores = self._policy.score(slot, queries[:, :, -self._policy.observe :], keys, scale)
            positions: Indices = self._policy.select(slot, scores, self._entries, self._prompt)
            self._kept.append(positions[0, 0])
            return
        decoded = torch.arange(self._prompt.tokens, keys.shape[2], device=keys.device)
        columns = torch.cat([self._kept[slot], decoded])
        full, compact = (
            project(attention_output(queries, keys, values, scale, kept), self._projections[slot]) for kept in (None, columns)
        )
        self.errors[slot].append(relative_error(compact, full))
