"""Confidence intervals of means and of paired differences: percentile bootstrap over rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW_ROWS = 30  # with fewer rows, a percentile interval is known to be too narrow
DRAWS_AT_ONCE = 2**22  # bounds the memory for any number of rows

Array = NDArray[np.float64]
Scores = Sequence[float | None]
Strata = Sequence[Hashable] | None


@dataclass(frozen=True)
class Paired:
    """``b`` against ``a`` on the same rows.

    Attributes
    ----------
    mean_difference: of ``b - a``, NaN without a row.
    low, high: its 95% interval, NaN if a stratum has a single row.
    wins, ties, losses: rows on which ``b`` is higher, equal, lower.
    rows: rows compared; excluded: rows that lack a number on either side.
    """

    mean_difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    rows: int
    excluded: int


def paired(a: Scores, b: Scores, *, strata: Strata = None, seed: int = 0, resamples: int = 10_000) -> Paired:
    """Compare ``b`` with ``a`` row by row; None and NaN exclude the row. ``strata`` as in :func:`mean_interval`.

    Raises ValueError for sequences of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired row by row")
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    center, low, high = mean_interval(difference.tolist(), strata=strata, seed=seed, resamples=resamples)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    rows = int((~np.isnan(difference)).sum())
    return Paired(center, low, high, wins, rows - wins - losses, losses, rows, len(difference) - rows)


def mean_interval(
    values: Scores, *, strata: Strata = None, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float]:
    """The mean and its 95% percentile bootstrap interval; None and NaN are left out.

    With ``strata`` (one label per value, such as the task) it is the mean of the strata's means, and rows are
    resampled within each stratum. The interval is NaN if a stratum has a single row.
    """
    groups = _groups(np.asarray(values, dtype=float), strata)
    if not groups:
        return float("nan"), float("nan"), float("nan")
    center = float(np.mean([group.mean() for group in groups]))
    if any(len(group) < 2 for group in groups):
        return center, float("nan"), float("nan")
    draw = np.random.default_rng(seed)
    means = np.mean([_resampled_means(group, resamples, draw) for group in groups], axis=0)
    low, high = np.percentile(means, (2.5, 97.5))
    return center, float(low), float(high)


def small(rows: int) -> str | None:
    """A warning about a set with so few rows; None if it is large enough."""
    if rows >= FEW_ROWS:
        return None
    if rows < 2:
        return f"only {rows} row{'' if rows == 1 else 's'}: no interval can be given"
    return f"only {rows} rows: the interval is a rough guide"


def _groups(values: Array, strata: Strata) -> list[Array]:
    there = ~np.isnan(values)
    if strata is None:
        return [values[there]] if there.any() else []
    members: dict[Hashable, list[float]] = {}
    for label, value, known in zip(strata, values, there, strict=True):
        if known:
            members.setdefault(label, []).append(float(value))
    return [np.array(group) for group in members.values()]


def _resampled_means(values: Array, resamples: int, draw: np.random.Generator) -> Array:
    count = len(values)
    step = max(DRAWS_AT_ONCE // count, 1)
    parts = [values[draw.integers(count, size=(min(step, resamples - start), count))].mean(axis=1)
             for start in range(0, resamples, step)]  # fmt: skip
    return np.concatenate(parts)
