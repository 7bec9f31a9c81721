"""Allocators: sums are exact within floors and caps, and remainders go to the largest (law 2)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st

from winnowkv.errors import BudgetError
from winnowkv.scoring.allocate import apportion, arithmetic_groups, global_top_k, pyramid, uniform

unhurried = settings(deadline=None)  # a busy machine is no failure


@st.composite
def splits(draw: st.DrawFn, least_weight: int = 0) -> tuple[list[int], int, list[int], list[int]]:
    """Weights, a total, caps and floors that can be met."""
    count = draw(st.integers(1, 9))
    weights = draw(st.lists(st.integers(least_weight, 50), min_size=count, max_size=count))
    floors = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    room = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    caps = [floor + extra for floor, extra in zip(floors, room, strict=True)]
    return weights, draw(st.integers(sum(floors), sum(caps))), caps, floors


@unhurried
@given(splits())
def test_apportion_is_exact_within_floors_and_caps(split: tuple[list[int], int, list[int], list[int]]) -> None:
    weights, total, caps, floors = split
    shares = apportion(weights, total, caps, floors)
    assert sum(shares) == total
    assert all(low <= share <= high for low, share, high in zip(floors, shares, caps, strict=True))
    assert all(type(share) is int for share in shares)


def water_level(weights: list[int], total: int, caps: list[int], floors: list[int]) -> list[Fraction]:
    """The one split ``clip(level * weight, floor, cap)`` that sums to ``total``, by walking the break points."""

    def at(level: Fraction) -> list[Fraction]:
        return [min(max(level * w, Fraction(f)), Fraction(c)) for w, f, c in zip(weights, floors, caps, strict=True)]

    breaks = [Fraction(bound, w) for w, f, c in zip(weights, floors, caps, strict=True) for bound in (f, c)]
    points = sorted({Fraction(0), *breaks})
    for left, right in itertools.pairwise(points):
        low, high = sum(at(left)), sum(at(right))
        if low <= total <= high:
            return at(left + (right - left) * (total - low) / (high - low)) if high > low else at(left)
    return at(points[-1] if total else points[0])


@unhurried
@given(splits(least_weight=1))
def test_apportion_is_within_one_of_water_filling(split: tuple[list[int], int, list[int], list[int]]) -> None:
    weights, total, caps, floors = split
    exact = water_level(weights, total, caps, floors)
    assert sum(exact) == total
    for share, level in zip(apportion(weights, total, caps, floors), exact, strict=True):
        assert abs(share - level) < 1


def largest_remainder(weights: list[int], total: int) -> list[int]:
    """Hamilton's method, one entry at a time."""
    quotas = [Fraction(total * w, sum(weights)) for w in weights]
    shares = [math.floor(q) for q in quotas]
    while sum(shares) < total:
        best = max(range(len(weights)), key=lambda i: (quotas[i] - shares[i], -i))
        shares[best] += 1
        quotas[best] = Fraction(shares[best] - 1)  # has had its entry
    return shares


@unhurried
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any), st.integers(0, 400))
def test_apportion_without_limits_is_largest_remainder(weights: list[int], total: int) -> None:
    assert apportion(weights, total, [total] * len(weights)) == largest_remainder(weights, total)


@unhurried
@given(st.lists(st.integers(0, 60), min_size=2, max_size=9), st.integers(0, 300), st.integers(0, 60), st.integers(0, 5))
def test_apportion_never_gives_less_for_a_greater_weight(weights: list[int], total: int, cap: int, floor: int) -> None:
    count, cap = len(weights), max(cap, floor)
    total = min(max(total, floor * count), cap * count)
    shares = apportion(weights, total, [cap] * count, [floor] * count)
    for i in range(count):
        for j in range(count):
            if weights[i] > weights[j]:
                assert shares[i] >= shares[j]


def test_apportion_ties_go_to_the_earlier_layer_and_zero_weights_are_equal() -> None:
    assert apportion([1, 1, 1], 5, [9, 9, 9]) == [2, 2, 1]
    assert apportion([0, 0, 0], 4, [9, 9, 9]) == [2, 1, 1]
    assert apportion([0, 1, 0], 7, [9, 3, 9]) == [2, 3, 2]  # what the cap turns away goes to the others
    assert apportion([0.1, 0.2, 0.7], 10, [10] * 3) == [1, 2, 7]
    assert apportion([100, 1, 1], 30, [30] * 3, [5] * 3) == [20, 5, 5]


@pytest.mark.parametrize(
    ("total", "caps", "floors"),
    [(10, [3, 3, 3], None), (2, [3, 3, 3], [1, 1, 1]), (-1, [3, 3, 3], None), (9, [3, 3, 9], [4, 0, 0])],
)
def test_apportion_refuses_what_cannot_be_split(total: int, caps: list[int], floors: list[int] | None) -> None:
    with pytest.raises(BudgetError, match=rf"cannot split {total} entries"):
        apportion([1, 2, 3], total, caps, floors)


def test_apportion_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        apportion([1, 2, 3], 4, [3, 3])


@settings(deadline=None, max_examples=200)
@given(
    layers=st.integers(1, 40), group=st.integers(1, 45), mean=st.integers(0, 90), slope=st.floats(1, 60),
    room=st.integers(0, 120), floor=st.integers(0, 8),
)  # fmt: skip
def test_arithmetic_groups_are_exact(layers: int, group: int, mean: int, slope: float, room: int, floor: int) -> None:
    cap, floor = mean + room, min(floor, mean)
    budgets = arithmetic_groups(layers, group, mean, slope, cap, floor)
    assert len(budgets) == layers
    assert sum(budgets) == layers * mean
    assert budgets == sorted(budgets, reverse=True)
    assert floor <= min(budgets)
    assert max(budgets) <= cap
    for start in range(0, layers, group):  # a group's layers differ by rounding only
        members = budgets[start : start + group]
        assert max(members) - min(members) <= 1
    if group == 1:
        assert pyramid(layers, mean, slope, cap, floor) == budgets


@pytest.mark.parametrize(
    ("layers", "mean", "slope", "expected"),
    [(4, 120, 20, [234, 158, 82, 6]), (2, 10, 10, [19, 1]), (1, 7, 20, [7]), (5, 30, 1, [30] * 5), (3, 0, 20, [0] * 3)],
)
def test_pyramid_ends_and_steps(layers: int, mean: int, slope: float, expected: list[int]) -> None:
    """From ``2 * mean - mean / slope`` to ``mean / slope`` in equal steps."""
    assert pyramid(layers, mean, slope, cap=10**6) == expected


def test_arithmetic_groups_equal_worked_examples() -> None:
    assert arithmetic_groups(6, 2, 14, 14, cap=99) == [27, 27, 14, 14, 1, 1]
    assert arithmetic_groups(6, 2, 14, 14, cap=20) == [20, 20, 20, 20, 2, 2]
    assert arithmetic_groups(6, 2, 14, 14, cap=99, floor=4) == [25, 25, 13, 13, 4, 4]


@pytest.mark.parametrize("layers", [30, 27, 5])
def test_a_short_last_group_lies_on_the_same_line(layers: int) -> None:
    budgets = arithmetic_groups(layers, 4, 100, 14, cap=10**6)
    tops = budgets[::4]
    steps = [a - b for a, b in itertools.pairwise(tops)]
    assert max(steps) - min(steps) <= 2
    assert sum(budgets) == 100 * layers


def test_a_pyramid_that_cannot_fit_is_refused() -> None:
    with pytest.raises(BudgetError):
        pyramid(4, 50, 20, cap=49)


def test_uniform_budgets_are_equal() -> None:
    assert uniform(3, 7) == [7, 7, 7]


@unhurried
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 80), st.integers(0, 999), st.integers(1, 3))
def test_global_top_k_counts_each_layers_winners(sizes: list[int], k: int, seed: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes) * heads
    values = torch.randperm(total, generator=generator).float()  # no ties
    layers = [part.view(1, heads, -1) for part in values.split([size * heads for size in sizes])]
    owners = [layer for layer, size in enumerate(sizes) for _ in range(size * heads)]
    winners = sorted(range(total), key=lambda i: -values[i])[:k]
    naive = [sum(owners[i] == layer for i in winners) for layer in range(len(sizes))]
    assert global_top_k(layers, k) == naive
    assert sum(naive) == min(k, total)
