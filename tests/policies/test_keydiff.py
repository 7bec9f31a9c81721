"""KeyDiff against arXiv 2504.15364, section 3, as loops.

Deliberate difference: the paper evicts block by block while a prompt is read, here the whole prompt's keys choose once.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from support.policies import KV_HEADS, SIZE, best, bind, kept_rows, run
from winnowkv.policies import LayerStates

TOKENS, LAYERS, BUDGET = 40, 3, 12


def differences(keys: Tensor) -> list[float]:
    """One minus the cosine between each key ``[S, D]`` and the mean of all normalized keys."""
    rows = keys.double().tolist()
    units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    anchor = [sum(unit[d] for unit in units) / len(units) for d in range(len(rows[0]))]
    length = math.sqrt(sum(a * a for a in anchor))
    return [1 - sum(u * a for u, a in zip(unit, anchor, strict=True)) / length for unit in units]


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 3)])
def test_the_keys_that_differ_most_stay(sinks: int, window: int) -> None:
    selection, layers = run(f"keydiff:sinks={sinks}:observe={window}", TOKENS, LAYERS, BUDGET)
    for states, rows, scores in zip(layers, kept_rows(selection), selection.scores, strict=True):
        assert states.queries.shape[2] == 0  # no attention is read
        for head in range(KV_HEADS):
            expected = differences(states.keys[0, head])[: TOKENS - window]
            torch.testing.assert_close(scores[0, head].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
            ranked = [math.inf] * sinks + expected[sinks:]
            assert rows[head] == best(ranked, BUDGET - window) + list(range(TOKENS - window, TOKENS))


def test_the_length_of_a_key_does_not_matter() -> None:
    scorer = bind("keydiff", TOKENS, 1, BUDGET).parts.scorer
    keys = torch.randn(1, KV_HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(1, KV_HEADS, TOKENS, 1) + 0.1
    some, others = (scorer.score(LayerStates(0, keys[:, :, :0], each, keys, 1.0)) for each in (keys, keys * lengths))
    torch.testing.assert_close(some, others)


def test_one_key_against_the_others_is_the_first_to_stay() -> None:
    keys = torch.ones(1, 1, 9, SIZE)
    keys[0, 0, 5] = -1.0
    scores = bind("keydiff", 9, 1, 3).parts.scorer.score(LayerStates(0, keys[:, :, :0], keys, keys, 1.0))
    assert scores.argmax() == 5
    assert float(scores.max()) == pytest.approx(2.0)
    assert float(scores.min()) >= 0.0
