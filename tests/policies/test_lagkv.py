"""LagKV against arXiv 2504.04704, section 3, as loops.

Deliberate difference: if the budget does not hold the last partition and what fills none, the latest of them stay.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from support.policies import KV_HEADS, kept_rows, run

LAYERS = 2


def shares(part: list[list[float]], following: list[list[float]]) -> list[float]:
    """Spread of each token's channels, scaled by minimum and maximum of the next partition; its share of the partition's."""
    channels = range(len(part[0]))
    least = [min(token[d] for token in following) for d in channels]
    most = [max(token[d] for token in following) for d in channels]
    spreads = [statistics.stdev((token[d] - least[d]) / (most[d] - least[d]) for d in channels) for token in part]
    total = sum(math.exp(spread) for spread in spreads)
    return [math.exp(spread) / total for spread in spreads]


def partition_scores(keys: Tensor, values: Tensor, sinks: int, lag: int) -> list[list[float]]:
    """Sum of both shares for each token of each partition that has a next one; ``[S, D]``."""
    parts = [range(begin, begin + lag) for begin in range(sinks, len(keys) - 2 * lag + 1, lag)]
    scores = []
    for part in parts:
        after = range(part.stop, part.stop + lag)
        each = [shares(x[part.start : part.stop].tolist(), x[after.start : after.stop].tolist()) for x in (keys, values)]
        scores.append([a + b for a, b in zip(*each, strict=True)])
    return scores


def reference(keys: Tensor, values: Tensor, sinks: int, window: int, lag: int, budget: int) -> list[int]:
    """Positions that stay."""
    tokens, scores = len(keys), partition_scores(keys, values, sinks, lag)
    end = sinks + lag * len(scores)
    always = [*range(sinks), *range(tokens - window, tokens)]
    newest = [at for at in range(tokens - 1, end - 1, -1) if at not in always]
    by_rank = []
    for number, part in enumerate(scores):
        for place, score in enumerate(part):
            rank = sum(other < score for other in part)
            by_rank.append((-rank, sinks + number * lag + place))
    order = newest + [at for _, at in sorted(by_rank) if at not in always]
    return sorted(always + order[: budget - len(always)])


@pytest.mark.parametrize(
    ("tokens", "sinks", "window", "lag", "budget"),
    [
        (60, 4, 0, 10, 34),  # 4 partitions, one that only says its range, 6 that fill none
        (60, 4, 3, 10, 34),
        (64, 0, 0, 16, 40),
        (64, 1, 5, 7, 30),
        (60, 4, 0, 10, 12),  # the budget does not hold the last partition
        (30, 4, 0, 14, 12),  # no partition has a next one
        (30, 4, 2, 40, 12),
        (13, 0, 0, 2, 6),
    ],
)
def test_kept_tokens_are_those_of_the_reference(tokens: int, sinks: int, window: int, lag: int, budget: int) -> None:
    selection, layers = run(f"lagkv:sinks={sinks}:observe={window}:lag={lag}", tokens, LAYERS, budget)
    for states, rows in zip(layers, kept_rows(selection), strict=True):
        assert states.queries.shape[2] == 0  # no attention is read
        for head in range(KV_HEADS):
            keys, values = states.keys[0, head].double(), states.values[0, head].double()
            assert rows[head] == reference(keys, values, sinks, window, lag, budget)


def test_tokens_compete_within_their_partition() -> None:
    """However different the partitions are, each keeps as many; the last one and the rest stay whole."""
    tokens, sinks, lag, each = 66, 4, 10, 3
    selection, layers = run(f"lagkv:sinks={sinks}:lag={lag}", tokens, 1, sinks + 12 + 5 * each)
    assert len(layers) == 1
    for row in kept_rows(selection)[0]:
        assert [sum(begin <= at < begin + lag for at in row) for begin in range(4, 54, lag)] == [each] * 5
        assert row[:sinks] == [0, 1, 2, 3]
        assert row[-12:] == list(range(54, 66))


def test_both_keys_and_values_count() -> None:
    selection, (states,) = run("lagkv:sinks=0:lag=10", 40, 1, 25)
    rows = kept_rows(selection)[0]
    for only in (states.keys, states.values):
        assert rows[0] != reference(only[0, 0].double(), only[0, 0].double(), 0, 0, 10, 25)


def test_channels_that_do_not_vary_make_no_infinite_score() -> None:
    from winnowkv.scoring.values import lagged_spread

    states = torch.zeros(1, 1, 20, 4)
    states[0, 0, :10, 0] = torch.arange(10.0)
    assert torch.isfinite(lagged_spread(states, 10)).all()
