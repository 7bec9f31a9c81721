"""Selection against plain Python: exact numbers, ascending, ties to the lower index (law 2)."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings, strategies as st

from winnowkv.scoring.select import ragged_tokens, top_tokens, top_windows, with_recent, with_sinks
from winnowkv.scoring.spans import window_reduce

unhurried = settings(deadline=None)  # a busy machine is no failure

# Few distinct values, so that ties are common.
TIED = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1)


@unhurried
@given(TIED, st.data())
def test_top_tokens_takes_the_best_and_of_equals_the_earlier(values: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(0, len(values)))
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]
    assert top_tokens(tensor(values), n)[0, 0].tolist() == sorted(best)


def test_top_tokens_of_equals_are_the_first_ones_at_any_length() -> None:
    """``topk`` gives no such promise; long rows take other code paths than short ones."""
    for length in (5, 64, 1000, 20_000):
        assert top_tokens(torch.zeros(1, 2, length), 3)[0].tolist() == [[0, 1, 2]] * 2


@unhurried
@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, math.inf, -math.inf, math.nan]), min_size=1, max_size=40), st.data())
def test_top_tokens_is_a_stable_sort_without_the_sort(values: list[float], data: st.DataObject) -> None:
    """What is no number is the most, as for ``sort``; it ties with infinity, and then the earlier one wins."""
    n, scores = data.draw(st.integers(0, len(values))), torch.tensor(values).view(1, 1, -1)
    order = (
        scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).sort(dim=-1, descending=True, stable=True).indices
    )
    assert top_tokens(scores, n).tolist() == order[..., :n].sort(-1).values.tolist()


@unhurried
@given(TIED, TIED, st.data())
def test_ragged_tokens_takes_the_best_of_each_head(first: list[int], second: list[int], data: st.DataObject) -> None:
    tokens = min(len(first), len(second))
    rows = [first[:tokens], second[:tokens]]
    counts = [data.draw(st.integers(0, tokens)) for _ in rows]
    found = ragged_tokens(torch.tensor([rows], dtype=torch.float32), counts)[0].tolist()
    for row, count, mine in zip(rows, counts, found, strict=True):
        best = sorted(range(tokens), key=lambda i: (-row[i], i))[:count]
        assert mine == [-1] * (max(counts) - count) + sorted(best)


def test_top_tokens_selects_for_every_head_and_row() -> None:
    scores = torch.tensor([[[1.0, 3, 2], [9, 0, 1]], [[0, 0, 5], [4, 4, 4]]])
    assert top_tokens(scores, 2).tolist() == [[[1, 2], [0, 2]], [[0, 2], [0, 1]]]


def naive_windows(ranks: list[int], tokens: list[int], n: int, width: int) -> list[int]:
    """Window after window from the best down; the one that no longer fits gives its best tokens."""
    kept: list[int] = []
    for window in sorted(range(len(ranks)), key=lambda i: (-ranks[i], i)):
        members = list(range(window * width, min((window + 1) * width, len(tokens))))
        room = n - len(kept)
        if room < len(members):
            members = sorted(members, key=lambda i: (-tokens[i], i))[:room]
        kept += members
    return sorted(kept)


@unhurried
@given(TIED, st.integers(1, 9), st.data())
def test_top_windows_fills_to_exactly_n(values: list[int], width: int, data: st.DataObject) -> None:
    count = -(-len(values) // width)
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    n = data.draw(st.integers(0, len(values)))
    found = top_windows(tensor(ranks), tensor(values), n, width)[0, 0].tolist()
    assert found == naive_windows(ranks, values, n, width)
    assert len(found) == n


def test_top_windows_equal_a_worked_example() -> None:
    tokens = tensor([5, 0, 0, 1, 2, 1, 9, 9, 3, 7])  # the last window of width 4 is short
    windows = window_reduce(tokens, 4, 4)
    assert windows[0, 0].tolist() == [1.5, 5.25, 5.0]
    assert top_windows(windows, tokens, 4, 4)[0, 0].tolist() == [4, 5, 6, 7]
    assert top_windows(windows, tokens, 6, 4)[0, 0].tolist() == [4, 5, 6, 7, 8, 9]
    assert top_windows(windows, tokens, 8, 4)[0, 0].tolist() == [0, 3, 4, 5, 6, 7, 8, 9]


def test_top_windows_scores_each_head_by_itself() -> None:
    windows = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    assert top_windows(windows, torch.zeros(1, 2, 4), 2, 2).tolist() == [[[2, 3], [0, 1]]]
    assert top_windows(windows, torch.zeros(1, 1, 4), 2, 2).tolist() == [[[2, 3], [0, 1]]]  # one token score for all


@unhurried
@given(TIED, st.integers(1, 9))
def test_a_smaller_selection_lies_inside_a_larger_one(values: list[int], width: int) -> None:
    """Progressive policies shrink a layer several times, followers may hold one entry less than their leader."""
    scores = tensor(values)
    windows = window_reduce(scores, width, width)
    for n in range(len(values)):
        assert set(top_tokens(scores, n)[0, 0].tolist()) < set(top_tokens(scores, n + 1)[0, 0].tolist())
        small = top_windows(windows, scores, n, width)[0, 0].tolist()
        assert set(small) < set(top_windows(windows, scores, n + 1, width)[0, 0].tolist())


@unhurried
@given(TIED, st.integers(0, 6), st.data())
def test_sinks_win_against_everything(values: list[int], sinks: int, data: st.DataObject) -> None:
    sinks = min(sinks, len(values))
    scores = tensor(values)
    before = scores.clone()
    n = data.draw(st.integers(sinks, len(values)))
    kept = top_tokens(with_sinks(scores, sinks), n)[0, 0].tolist()
    assert kept[:sinks] == list(range(sinks))
    rest = sorted(range(sinks, len(values)), key=lambda i: (-values[i], i))[: n - sinks]
    assert kept[sinks:] == sorted(rest)
    assert torch.equal(scores, before)


def test_recent_positions_follow_the_context() -> None:
    context = torch.tensor([[[0, 3], [1, 2]]])
    assert with_recent(context, 10, 3).tolist() == [[[0, 3, 7, 8, 9], [1, 2, 7, 8, 9]]]
    assert with_recent(context, 10, 0).tolist() == context.tolist()
    assert with_recent(context[..., :0], 4, 4).tolist() == [[[0, 1, 2, 3]] * 2]
