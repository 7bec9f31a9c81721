"""README's first picture: how much of an answer stays the full cache's, against the kept bytes, on summaries and questions.

The levels of ``winnow``, the best published rules of each side and quantization are named; all others are thin and grey
(``policies.py`` shows each of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes

from website.audit_groups import HELD_MORE
from website.figures.audits import BALANCED, BEST, LEAN, Audit, read
from website.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HALO,
    INK,
    MIDDLE,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    End,
    Look,
    canvas,
    caption,
    dark,
    dress,
    kept_axis,
    label_ends,
    save,
    shares,
)
from website.records import Record

RECORDS = ("policies-summaries", "policies-questions")
TITLES = {"policies-summaries": "Summaries", "policies-questions": "Answers to questions"}
NAMED = 2  # best published rules of each side
LOOKS = {
    BEST: Look(BLUE, "o", "-", 2.4), BALANCED: Look(RED, "^", "-", 2.4), LEAN: Look(GREEN, "s", "-", 2.4),
    "int8": Look(PURPLE, "X"), "int4": Look(PURPLE, "P"),
}  # fmt: skip
PUBLISHED = (Look(ORANGE, "D", "--", 1.4), Look(SKY, "v", "-.", 1.4), Look(BLACK, "*", ":", 1.4), Look(GREY, "h", "--", 1.4))
TICKS = (0.06, 0.12, 0.25, 0.5)
APART = 1.035  # factor by which lines at the same share stand apart, so that their intervals can be told apart


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw it. Raises InputError if a record is missing."""
    audits = {name: read(records[name]) for name in RECORDS}
    best = dict.fromkeys(name for audit in audits.values() for name in audit.published()[:NAMED])
    looks = {**LOOKS, **dict(zip(best, PUBLISHED, strict=False))}
    figure = canvas(4.5)
    for number, (name, audit) in enumerate(audits.items()):
        panel = figure.add_axes((0.088 + 0.5 * number, 0.225, 0.275, 0.69))
        label = "" if number else "same token as the full cache"
        dress(panel, "kept of the cache's bytes", label, TITLES[name])
        kept_axis(panel, TICKS, 0.049, 0.66)
        shares(panel, floor(audit, looks), 1.0)
        draw(panel, audit, looks)
    counted = " · ".join(f"{TITLES[name].lower()}: {audit.prompts} prompts, {audit.counted}" for name, audit in audits.items())
    caption(figure, *(records[name] for name in RECORDS), more=f"{counted}; bars: 95% intervals; grey: all other policies")
    return save(figure, folder, "agreement")


def floor(audit: Audit, looks: Mapping[str, Look]) -> float:
    """The lowest tenth that has room for all means, and for the named lines' intervals."""
    least = min(point.low if name in looks else point.mean for name, points in audit.lines.items() for point in points)
    return int(10 * least) / 10


def draw(panel: Axes, audit: Audit, looks: Mapping[str, Look]) -> None:
    """One side: grey lines first, then the named ones with intervals and labels."""
    named = [name for name in looks if name in audit.lines]
    for name, points in audit.lines.items():
        if name not in looks:
            panel.plot([point.kept for point in points], [point.mean for point in points], color=PALE, linewidth=0.8)
    ends = []
    for number, name in enumerate(named):
        points, look = audit.lines[name], looks[name]
        moved = APART ** (number - (len(named) - 1) / 2) if len(points) > 1 else 1.0
        at, means = [moved * point.kept for point in points], [point.mean for point in points]
        around = [[point.mean - point.low for point in points], [point.high - point.mean for point in points]]
        panel.errorbar(at, means, yerr=around, fmt="none", ecolor=look.colour, elinewidth=0.8, alpha=0.45, zorder=2)
        panel.plot(at, means, zorder=4 if look.width > 2 else 3, **look.fields)
        if len(points) > 1:
            ends.append(End(at[-1], means[-1], name, look.colour, look.width > 2))
        else:
            panel.annotate(
                name, (at[0], means[0]), xytext=(0, 7), textcoords="offset points", ha="center", va="bottom", fontsize=MIDDLE,
                color=dark(look.colour), path_effects=HALO, zorder=6,
            )  # fmt: skip
    label_ends(panel, ends, size=9.0)
    said = [f"{name} stores up to\n{audit.held[name]:.1f} times what it keeps" for name in named if stores_more(audit, name)]
    if audit.whole:
        said.append(
            f"{' and '.join(name.removeprefix('winnow, ') for name in audit.whole)} evict nothing\nin answers this short"
        )
    panel.text(0.03, 0.03, "\n".join(said), transform=panel.transAxes, fontsize=SMALL, color=INK, path_effects=HALO, zorder=6)


def stores_more(audit: Audit, name: str) -> bool:
    """Whether a policy's storage is so much larger than what it keeps that the picture has to say it."""
    return audit.held.get(name, 1.0) > HELD_MORE
