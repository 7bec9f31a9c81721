"""The curve of a calibration profile: how it is fitted, and the share of the mass that it asks for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

import winnowkv as wk
from winnowkv.models.curve import Curve, fit_curve

SHARES = st.floats(0, 1)


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=30))
def test_a_fitted_curve_ascends_and_ends_whole(measured: list[tuple[float, float]]) -> None:
    curve = fit_curve(measured, 3)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(curve.points))
    assert curve.points[-1] == (1.0, 1.0)
    # In least squares the mean of the fit is the mean of what was measured.
    assert min(y for _, y in measured) - 1e-9 <= curve.points[0][1] <= max(y for _, y in measured) + 1e-9


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=12), st.floats(0.01, 0.99))
@example([(0.8032301256954291, 0.0), *[(0.8032301256954291, 1.0)] * 3], 0.5)
@example([(0.9999999999999999, 0.0)], 0.25)
def test_the_needed_mass_is_the_least_that_is_expected_to_reach_the_target(
    measured: list[tuple[float, float]], target: float
) -> None:
    curve = fit_curve(measured, 3)
    needed = curve.needed(target)
    assert curve.expected(needed) >= target - 1e-9
    if needed > 1e-6:
        assert curve.expected(needed * 0.999) <= target + 1e-9


def test_a_fitted_curve_equals_a_worked_example() -> None:
    curve = fit_curve([(0.2, 0.5), (0.4, 0.9), (0.6, 0.7), (0.8, 1.0)], 4)
    assert curve.points == ((0.2, 0.5), (0.5, 0.8), (0.8, 1.0), (1.0, 1.0))
    assert curve.expected(0.35) == pytest.approx(0.65)
    assert curve.needed(0.9) == pytest.approx(0.65)


@pytest.mark.parametrize("points", [(), ((0.5, 0.5), (0.4, 0.6)), ((0.5, 0.5), (0.6, 0.4)), ((0.5, 1.5),)])
def test_a_curve_that_does_not_ascend_is_refused(points: Any) -> None:
    with pytest.raises(wk.ProfileError, match="must ascend"):
        Curve(points, 3)
