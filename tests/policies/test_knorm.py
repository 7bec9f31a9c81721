"""Knorm against arXiv 2406.11430, section 3: the keys with the smallest L2 norm stay.

Deliberate difference: the paper leaves the first two layers whole, here all layers keep the budget.
"""

from __future__ import annotations

import math

import pytest
import torch

from support.policies import KV_HEADS, SIZE, bind, kept_rows, run
from winnowkv.policies import LayerStates

TOKENS, LAYERS, BUDGET = 40, 3, 12


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 3)])
def test_the_shortest_keys_stay(sinks: int, window: int) -> None:
    selection, layers = run(f"knorm:sinks={sinks}:observe={window}", TOKENS, LAYERS, BUDGET)
    for states, rows in zip(layers, kept_rows(selection), strict=True):
        assert states.queries.shape[2] == 0  # no attention is read
        for head in range(KV_HEADS):
            norms = [math.sqrt(sum(x * x for x in key)) for key in states.keys[0, head].tolist()]
            free = sorted(range(sinks, TOKENS - window), key=lambda at: norms[at])[: BUDGET - sinks - window]
            assert rows[head] == [*range(sinks), *sorted(free), *range(TOKENS - window, TOKENS)]


def test_scores_are_distances_to_the_longest_key() -> None:
    """Not negative, as all scores; the direction of a key does not matter."""
    keys = torch.zeros(1, 1, 4, SIZE)
    keys[0, 0, 0, 0], keys[0, 0, 1, 1], keys[0, 0, 2, 2], keys[0, 0, 3, 3] = 1.0, -5.0, 2.0, 3.0
    scores = bind("knorm", 4, 1, 2).parts.scorer.score(LayerStates(0, keys[:, :, :0], keys, keys, 1.0))
    assert scores.tolist() == [[[4.0, 0.0, 3.0, 2.0]]]
