"""The curve of ``budget="auto"``: what share of the full cache's tokens a kept share of the importance score gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from winnowkv.errors import ProfileError

Point = tuple[float, float]
MASS_DIGITS = 6  # of a fitted mass


@dataclass(frozen=True)
class Curve:
    """Expected agreement with the full cache by kept score mass, straight between its points.

    Attributes
    ----------
    points: ``(mass, agreement)``, both 0 to 1, ascending in both.
    prompts: how many prompts they were measured on.

    Raises
    ------
    ProfileError
        For no points, points that do not ascend within 0 to 1, or no prompts.
    """

    points: tuple[Point, ...]
    prompts: int

    def __post_init__(self) -> None:
        inside = all(0 <= value <= 1 for point in self.points for value in point)
        ascending = all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(self.points))
        if not self.points or not inside or not ascending:
            raise ProfileError("a curve's points must ascend in mass and agreement, both within 0 to 1")
        if self.prompts < 1:
            raise ProfileError(f"a curve of {self.prompts} prompts was not measured")

    def expected(self, mass: float) -> float:
        """The agreement at a kept mass; below the first point its own."""
        before = [point for point in self.points if point[0] <= mass]
        after = [point for point in self.points if point[0] > mass]
        if not before or not after:
            return before[-1][1] if before else after[0][1]
        (x0, y0), (x1, y1) = before[-1], after[0]
        return y0 + (y1 - y0) * (mass - x0) / (x1 - x0)

    def needed(self, target: float) -> float:
        """The smallest kept mass at which ``target`` is expected; above 1 if no eviction is expected to reach it."""
        if self.points[0][1] >= target:
            return 0.0
        for (x0, y0), (x1, y1) in pairwise(self.points):
            if y1 >= target:
                return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
        return 2.0


def fit_curve(measured: Sequence[Point], prompts: int) -> Curve:
    """The best ascending fit to ``(mass, agreement)`` in least squares (isotonic regression by pooling adjacent violators).

    Points of one pool become one, at their mean mass. Keeping all the mass gives everything.
    """
    pools: list[tuple[float, float, int]] = []
    for mass, agreement in sorted(measured):
        pools.append((mass, agreement, 1))
        while len(pools) > 1 and pools[-2][1] >= pools[-1][1]:
            (x0, y0, n0), (x1, y1, n1) = pools[-2:]
            pools[-2:] = [((x0 * n0 + x1 * n1) / (n0 + n1), (y0 * n0 + y1 * n1) / (n0 + n1), n0 + n1)]
    # A mean of equal masses may come out a rounding below them, and between masses a rounding apart nothing can be read off.
    masses = accumulate((round(min(mass, 1.0), MASS_DIGITS) for mass, _, _ in pools), max)
    points = [(mass, min(agreement, 1.0)) for mass, (_, agreement, _) in zip(masses, pools, strict=True)]
    return Curve((*points, (1.0, 1.0)), prompts)
