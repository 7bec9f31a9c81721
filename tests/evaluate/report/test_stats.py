"""Intervals and paired comparisons against a plain loop, by simulation, and at the edges."""

import math

import numpy as np
import pytest

from winnowkv.evaluate.report import stats
from winnowkv.evaluate.report.stats import Paired, mean_interval, paired, small


def naive_interval(groups, seed, resamples):
    """The bootstrap as loops over resamples and rows; the percentiles are read from the sorted means."""
    draw = np.random.default_rng(seed)
    drawn = []
    for group in groups:
        means = []
        for _ in range(resamples):
            chosen = [group[int(i)] for i in draw.integers(len(group), size=len(group))]
            means.append(sum(chosen) / len(chosen))
        drawn.append(means)
    together = sorted(sum(means) / len(groups) for means in zip(*drawn, strict=True))

    def percentile(share):
        at = share * (resamples - 1)
        below = math.floor(at)
        above = min(below + 1, resamples - 1)
        return together[below] + (at - below) * (together[above] - together[below])

    return percentile(0.025), percentile(0.975)


@pytest.mark.parametrize("rows", [2, 5, 41])
@pytest.mark.parametrize("draws_at_once", [7, 2**22])
def test_intervals_equal_the_loop(monkeypatch, rows, draws_at_once):
    monkeypatch.setattr(stats, "DRAWS_AT_ONCE", draws_at_once)  # what is drawn at once must not change the result
    values = np.random.default_rng(rows).normal(0.4, 0.2, size=rows).tolist()
    center, low, high = mean_interval(values, seed=3, resamples=200)
    assert center == pytest.approx(sum(values) / rows)
    assert (low, high) == pytest.approx(naive_interval([values], 3, 200))


def test_strata_are_drawn_apart_and_weigh_the_same():
    values = [0.9, 0.1, 0.2, 0.3, 0.0, 0.2, 0.7]
    strata = ["a", "b", "b", "b", "b", "b", "a"]
    center, low, high = mean_interval(values, strata=strata, seed=5, resamples=300)
    assert center == pytest.approx((0.8 + 0.16) / 2)
    assert (low, high) == pytest.approx(naive_interval([[0.9, 0.7], [0.1, 0.2, 0.3, 0.0, 0.2]], 5, 300))


def test_paired_is_the_interval_of_the_differences():
    a = [0.5, 0.2, 0.9, 0.4, 0.0, 0.3]
    b = [0.5, 0.3, 0.1, 0.4, 0.2, 0.1]
    result = paired(a, b, seed=1, resamples=400)
    differences = [y - x for x, y in zip(a, b, strict=True)]
    assert (result.wins, result.ties, result.losses, result.rows, result.excluded) == (2, 2, 2, 6, 0)
    assert result.mean_difference == pytest.approx(sum(differences) / 6)
    assert (result.low, result.high) == pytest.approx(naive_interval([differences], 1, 400))


def test_rows_that_lack_a_number_are_excluded_in_pairs():
    whole = paired([0.1, 0.8, 0.5], [0.2, 0.3, 0.5])
    holes = paired([0.1, None, 0.8, float("nan"), 0.5, 0.4], [0.2, 0.9, 0.3, 0.1, 0.5, None])
    assert holes == Paired(whole.mean_difference, whole.low, whole.high, 1, 1, 1, 3, 3)


def test_excluded_rows_keep_their_strata_aligned():
    result = paired([0.0, None, 0.0, 0.0, 0.0], [1.0, 0.5, 1.0, 0.2, 0.4], strata=["a", "b", "a", "b", "b"])
    assert result.mean_difference == pytest.approx((1.0 + 0.3) / 2)


def test_an_interval_depends_on_its_seed_only():
    values = np.random.default_rng(9).random(20).tolist()
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        a = draw.normal(0.5, 0.2, size=40)
        b = a + draw.normal(0.05, 0.1, size=40)  # the rows' own spread is common to both: pairing takes it out
        result = paired(a.tolist(), b.tolist(), resamples=500)
        covered += result.low <= 0.05 <= result.high
    assert 0.90 <= covered / 400 <= 0.98


def test_pairing_is_sharper_than_two_intervals():
    draw = np.random.default_rng(12)
    a = draw.normal(0.5, 0.2, size=40)
    b = a + draw.normal(0.05, 0.02, size=40)
    together, alone = paired(a.tolist(), b.tolist()), mean_interval(b.tolist())
    assert together.high - together.low < (alone[2] - alone[1]) / 3


def test_no_row_and_a_single_row_give_no_interval():
    assert all(math.isnan(x) for x in mean_interval([]))
    assert all(math.isnan(x) for x in mean_interval([None, float("nan")]))
    center, low, high = mean_interval([0.25])
    assert center == 0.25
    assert math.isnan(low)
    assert math.isnan(high)
    center, low, high = mean_interval([0.5, 0.1, 0.3], strata=["a", "b", "b"])
    assert center == pytest.approx(0.35)
    assert math.isnan(low)
    assert math.isnan(high)


def test_equal_rows_have_an_interval_of_no_width():
    assert paired([0.3, 0.6], [0.3, 0.6]) == Paired(0.0, 0.0, 0.0, 0, 2, 0, 2, 0)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 and 1 values cannot be paired"):
        paired([0.1, 0.2], [0.1])


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (0, "only 0 rows: no interval can be given"),
        (1, "only 1 row: no interval can be given"),
        (5, "only 5 rows: the interval is a rough guide"),
        (29, "only 29 rows: the interval is a rough guide"),
        (30, None),
    ],
)
def test_small_sets_are_noted(rows, sentence):
    assert small(rows) == sentence
