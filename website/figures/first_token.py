"""Time to the first token of a question on a stored document, beside the whole text sent again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from website.figures.style import BLACK, BLUE, GREY, INK, MIDDLE, SKY, canvas, caption, dress, save
from website.records import Record

RECORDS = ("serve-contexts",)
WHOLE = {"whole text": "whole text sent again", "whole text, full cache": "whole text sent again,\nfull cache"}
WAYS = {
    "context, portable": "stored, portable",
    "context, unequal": "stored, unequal",
    "context, hinted": "stored with the question\nas its hint",
}
TICKS = (0.01, 0.1, 1, 10, 100)


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw it. Raises InputError if the record is missing."""
    record = records["serve-contexts"]
    bars = read(record)
    figure = canvas(0.42 * len(bars) + 1.25)
    high = figure.get_figheight()
    panel = figure.add_axes((0.275, 0.88 / high, 0.69, 1 - 0.98 / high))
    dress(panel, "seconds to the first token")
    panel.set_xscale("log")
    panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    panel.set_xticks([], minor=True)
    low = 0.02
    panel.set_xlim(low, 3.5 * max(seconds for _, seconds, _ in bars))
    panel.grid(visible=False, axis="y")
    slowest = bars[0][1]
    for place, (_, seconds, colour) in enumerate(bars):
        panel.barh(-place, seconds - low, left=low, height=0.62, color=colour)
        times = f"  ({slowest / seconds:,.0f} times shorter)" if colour != GREY else ""
        panel.text(1.08 * seconds, -place, f"{digits(seconds)} s{times}", va="center", fontsize=MIDDLE, color=BLACK)
    panel.set_yticks([-place for place in range(len(bars))], [name for name, _, _ in bars])
    panel.tick_params(axis="y", length=0, labelsize=MIDDLE, colors=INK)
    seen = record.get("stored.0.seen")
    caption(figure, record, more=f"winnow serve, one client over loopback, a text of {seen:,} tokens; logarithmic axis")
    return save(figure, folder, "first_token")


def digits(seconds: float) -> str:
    """Two digits: 47, 0.20, 0.083."""
    return f"{seconds:#.2g}".removesuffix(".")


def read(record: Record) -> list[tuple[str, float, str]]:
    """Name, seconds and colour of each bar: the text sent again, then each context in memory and from its file."""
    bars = []
    for asked in record.get("asked"):
        if asked["way"] in WHOLE:
            bars.append((WHOLE[asked["way"]], asked["first"], GREY))
            continue
        name = WAYS.get(asked["way"], asked["way"])
        bars.append((f"{name}, in memory", asked["first"], BLUE))
        if asked["cold"] is not None:
            bars.append((f"{name}, from its file", asked["cold"], SKY))
    return bars
