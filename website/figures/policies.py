"""Every policy by itself: agreement with the full cache against the kept bytes, a small panel each, the others in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes

from website.figures.audits import BALANCED, BEST, LEAN, Audit, read
from website.figures.style import BLACK, BLUE, INK, MIDDLE, PALE, RED, SMALL, Look, canvas, caption, dress, kept_axis, save
from website.records import Record

RECORDS = ("policies-summaries", "policies-questions")
LOOKS = {"policies-summaries": Look(BLUE, "o", "-", 1.6), "policies-questions": Look(RED, "s", "--", 1.6)}
TITLES = {"policies-summaries": "summaries", "policies-questions": "answers to questions"}
COLUMNS = 6
TICKS, SHARES = (0.06, 0.12, 0.25, 0.5), (0.4, 0.6, 0.8, 1.0)


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw it. Raises InputError if a record is missing."""
    audits = {name: read(records[name]) for name in RECORDS}
    names = ordered(audits)
    rows = math.ceil(len(names) / COLUMNS)
    figure = canvas(1.35 * rows + 1.3)
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    below = 0.93 / figure.get_figheight()
    figure.subplots_adjust(left=0.085, right=0.99, top=1 - 0.42 / figure.get_figheight(), bottom=below, wspace=0.1, hspace=0.34)
    least = min(point.low for audit in audits.values() for points in audit.lines.values() for point in points)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for number, (panel, name) in enumerate(zip(panels.flat, names, strict=False)):
        dress(panel)
        panel.set_title(name, fontsize=SMALL + 0.5, loc="left", color=BLACK, pad=3)
        kept_axis(panel, TICKS, 0.05, 0.62)
        panel.set_yticks(SHARES, [f"{100 * share:.0f}%" for share in SHARES])
        panel.set_ylim(int(10 * least) / 10, 1.03)
        panel.tick_params(labelsize=SMALL, labelbottom=number + COLUMNS >= len(names))
        for record, audit in audits.items():
            draw(panel, audit, name, LOOKS[record])
    key(figure.add_axes((0.085, 1 - 0.25 / figure.get_figheight(), 0.9, 0.22 / figure.get_figheight())), audits)
    figure.text(
        0.53, below - 0.36 / figure.get_figheight(), "kept of the cache's bytes", fontsize=MIDDLE, ha="center", color=INK
    )
    figure.text(0.008, 0.55, "same token as the full cache", fontsize=MIDDLE, rotation=90, va="center", color=INK)
    caption(figure, *(records[name] for name in RECORDS), more="bands and bars: 95% intervals; grey: all other policies")
    return save(figure, folder, "policies", svg=False)  # a thousand grey lines: half a megabyte as SVG


def ordered(audits: Mapping[str, Audit]) -> list[str]:
    """Our levels, then the published policies, the best on average over both sides first, then quantization."""
    shares: dict[str, list[float]] = {}
    for audit in audits.values():
        for name, points in audit.lines.items():
            shares.setdefault(name, []).append(sum(point.mean for point in points) / len(points))
    ours = [name for name in (LEAN, BALANCED, BEST) if name in shares]
    single = [name for name in shares if all(len(audit.lines.get(name, ())) < 2 for audit in audits.values())]
    theirs = [name for name in shares if name not in (*ours, *single)]
    return [*ours, *sorted(theirs, key=lambda name: -sum(shares[name]) / len(shares[name])), *single]


def draw(panel: Axes, audit: Audit, name: str, look: Look) -> None:
    """One policy on one side: its line with the interval as a band, a bar for a single point; all others in grey."""
    for other, points in audit.lines.items():
        if other != name:
            panel.plot([p.kept for p in points], [p.mean for p in points], color=PALE, linewidth=0.4, alpha=0.7, zorder=1)
    points = audit.lines.get(name, [])
    at, means = [point.kept for point in points], [point.mean for point in points]
    low, high = [point.low for point in points], [point.high for point in points]
    if len(points) > 1:
        panel.fill_between(at, low, high, color=look.colour, alpha=0.18, linewidth=0, zorder=2)
    else:
        panel.vlines(at, low, high, color=look.colour, linewidth=1.2, alpha=0.5, zorder=2)
    panel.plot(at, means, zorder=3, **{**look.fields, "markersize": 3.4})


def key(panel: Axes, audits: Mapping[str, Audit]) -> None:
    """The two sides and what counts on them, in one line above the panels."""
    panel.set_axis_off()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    for number, (record, audit) in enumerate(audits.items()):
        left = 0.5 * number
        panel.plot([left, left + 0.04], [0.5, 0.5], **LOOKS[record].fields)
        said = f"{TITLES[record]}: {audit.prompts} prompts, {audit.counted}"
        panel.text(left + 0.052, 0.5, said, fontsize=SMALL, va="center", color=INK)
