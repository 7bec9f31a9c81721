"""Charts of a report as SVG text inside the page: no picture files, no fonts, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Dark enough on white, and distinct for the colour-blind; with the markers, 40 series differ.
COLOURS = ("#0b63a5", "#c2410c", "#0f7b53", "#a21caf", "#7a5c00", "#0e7490", "#b91c1c", "#4b5563")
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # circle
    "M-4-4h8v8h-8z",  # square
    "M0-5.2L5 4H-5z",  # triangle
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",  # diamond
    "M0 5.2L5-4H-5z",  # triangle pointing down
)
WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 14, 44
POINT_SPACING, MAX_GROUP_WIDTH = 8.0, 80.0  # between points with the same x, and of a whole group of them


@dataclass(frozen=True)
class Point:
    """One measurement: its coordinates, its interval (None if there is none), and its tooltip."""

    x: float
    y: float
    low: float | None
    high: float | None
    title: str


@dataclass(frozen=True)
class Series:
    """Points of one policy, drawn in one colour and joined by a line."""

    name: str
    points: Sequence[Point]


def colour(index: int) -> str:
    """The colour of a series."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int, x: float = 0, y: float = 0) -> str:
    """The marker of a series as an SVG path at ``x``, ``y``."""
    return f'<path d="{MARKERS[index % len(MARKERS)]}" transform="translate({x:.1f} {y:.1f})" fill="{colour(index)}"/>'


def scatter(series: Sequence[Series], x_label: str, show_x: Callable[[float], str]) -> str:
    """Scores (0..100) against a quantity on a logarithmic axis, with 95% intervals.

    Points of about the same x are moved a little apart, in the series' order, so that none hides another.
    """
    points = [point for one in series for point in one.points]
    low, high = min(p.x for p in points) / 1.25, max(p.x for p in points) * 1.25
    top = ceiling([p.y if p.high is None else p.high for p in points])

    def at_x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (0.06 + 0.88 * math.log(value / low) / math.log(high / low))

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="score against {escape(x_label)}">']
    for tick in (top * share / 4 for share in range(5)):
        y = at_y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in log_ticks(low, high):
        parts.append(f'<path class="grid" d="M{at_x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at_x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{show_x(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    shown_at = iter(spread([at_x(point.x) for point in points]))
    for index, one in enumerate(series):
        places = sorted(((next(shown_at), point) for point in one.points), key=lambda place: place[1].x)
        if len(places) > 1:
            path = "L".join(f"{x:.1f} {at_y(p.y):.1f}" for x, p in places)
            parts.append(f'<path class="join" d="M{path}" stroke="{colour(index)}"/>')
        for x, point in places:
            whisker = ""
            if point.low is not None and point.high is not None:
                line = f"M{x:.1f} {at_y(point.low):.1f}V{at_y(point.high):.1f}"
                whisker = f'<path class="whisker" d="{line}" stroke="{colour(index)}"/>'
            parts.append(f"<g><title>{escape(point.title)}</title>{whisker}{marker(index, x, at_y(point.y))}</g>")
    return "".join([*parts, "</svg>"])


def bar(value: float, low: float | None, high: float | None, top: float, index: int) -> str:
    """A horizontal bar from 0 to ``value`` with its interval, on an axis that ends at ``top``."""
    scale = 100 / top
    whisker = ""
    if low is not None and high is not None:
        whisker = f'<path class="whisker" d="M{low * scale:.2f} 5H{high * scale:.2f}" vector-effect="non-scaling-stroke"/>'
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{value * scale:.2f}" height="10" fill="{colour(index)}"/>{whisker}</svg>'
    )


def spread(places: Sequence[float]) -> list[float]:
    """The places, with those closer than a marker moved side by side, in the order given."""
    moved = list(places)
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        if groups and places[index] - places[groups[-1][0]] < POINT_SPACING:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        apart = min(POINT_SPACING, MAX_GROUP_WIDTH / len(group))
        for rank, index in enumerate(sorted(group)):
            moved[index] += apart * (rank - (len(group) - 1) / 2)
    return moved


def ceiling(values: Sequence[float]) -> float:
    """The end of an axis that starts at 0: the next of 4, 8, 12, 20, 40, 60, 80, 100, all of which four steps divide."""
    most = max(values, default=0.0)
    return next((float(end) for end in (4, 8, 12, 20, 40, 60, 80) if most <= end), 100.0)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends: fewer steps per power of ten in a wide range, more in a narrow one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(1 + i / 10 for i in range(90))):
        inside = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(inside) >= 3:
            break
    return inside[:: math.ceil(len(inside) / 7)]
