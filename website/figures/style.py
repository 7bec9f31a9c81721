"""One look for all pictures: sizes, colours, markers, labels at the ends of lines, the caption, and the files.

Colours are Okabe and Ito's, which readers with any common kind of colour blindness tell apart; every line has a marker and
dashes of its own, too. Pictures are 800 pixels wide on a page (:data:`WIDTH` inches), on white, so that they can be read on a
dark page as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from website.records import Record

WIDTH = 8.0  # inches; shown at 800 pixels, a font of 10 points is 14 pixels high
DPI, COLOURS = 180, 256  # of the PNG
SMALL, MIDDLE, LARGE = 8.0, 9.5, 11.0  # font sizes in points

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY, PALE, INK = "#8c8c8c", "#c9c9c9", "#333333"

MODELS = {"embedded": "SmolLM2-135M-Instruct"}
HALO = [withStroke(linewidth=2.5, foreground="white")]  # of a text that lies on lines


@dataclass(frozen=True)
class Look:
    """How a line is drawn."""

    colour: str
    marker: str
    dashes: str = "-"
    width: float = 1.6

    @property
    def fields(self) -> dict[str, Any]:
        """Matplotlib's names of it."""
        return {
            "color": self.colour, "marker": self.marker, "linestyle": self.dashes, "linewidth": self.width,
            "markersize": 4 + self.width,
        }  # fmt: skip


@dataclass(frozen=True)
class End:
    """A line's label: the point that it stands beside, in data units, and its text."""

    x: float
    y: float
    text: str
    colour: str = INK
    bold: bool = False


def canvas(height: float, width: float = WIDTH) -> Figure:
    """A white figure of this size in inches, drawn without a display."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(panel: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Name the axes, draw a pale grid, leave out the upper and the right edge."""
    panel.set_xlabel(x, fontsize=MIDDLE, color=INK)
    panel.set_ylabel(y, fontsize=MIDDLE, color=INK)
    panel.set_title(title, fontsize=LARGE, color=BLACK, loc="left")
    panel.grid(color="#e6e6e6", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=MIDDLE, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)


def shares(panel: Axes, low: float, high: float = 1.0) -> None:
    """A y axis in percent, from ``low`` to ``high``, with a tick every 10 or 20 points."""
    step = 10 if high - low < 0.65 else 20
    ticks = [tick for tick in range(0, 101, step) if 100 * low - 1e-9 <= tick <= 100 * high + 1e-9]
    panel.set_yticks([tick / 100 for tick in ticks], [f"{tick}%" for tick in ticks])
    panel.set_ylim(low, high + 0.07 * (high - low))  # room for a label above the highest point


def kept_axis(panel: Axes, ticks: Sequence[float], low: float, high: float) -> None:
    """A logarithmic x axis of kept shares with these ticks, in percent."""
    panel.set_xscale("log")
    panel.set_xticks(list(ticks), [f"{100 * tick:g}%" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlim(low, high)


def label_ends(panel: Axes, ends: Sequence[End], size: float = MIDDLE, away: float = 7.0) -> None:
    """Write each label to the right of its point, ``away`` points from the rightmost one; close ones are moved apart.

    A label that was moved has a thin line to its point. The axes' limits and place must be final.
    """
    if not ends:
        return
    transform, dots = panel.transData, panel.figure.dpi / 72  # pixels a point
    room = 1.3 * size * dots
    right = max(transform.transform((end.x, end.y))[0] for end in ends) + away * dots
    ordered = sorted(ends, key=lambda end: end.y)
    wanted = [transform.transform((end.x, end.y))[1] for end in ordered]
    bounds = panel.get_window_extent()
    leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
    for end, height in zip(ordered, spread(wanted, room, bounds.y0, bounds.y1), strict=True):
        at = transform.transform((end.x, end.y))
        panel.annotate(
            end.text, xy=(end.x, end.y), xytext=((right - at[0]) / dots, (height - at[1]) / dots),
            textcoords="offset points", va="center", ha="left", fontsize=size, color=dark(end.colour),
            fontweight="bold" if end.bold else "normal", annotation_clip=False,
            arrowprops=leader if abs(height - at[1]) > room / 3 else None,
        )  # fmt: skip


def spread(wanted: Sequence[float], room: float, low: float, high: float) -> list[float]:
    """Ascending places moved apart to at least ``room``, as near to where they were wanted as that allows.

    Places that touch form a block around its members' mean; blocks stay between ``low`` and ``high`` while they fit.
    """

    def begin(block: Sequence[float]) -> float:
        length = room * (len(block) - 1)
        return max(low, min(sum(block) / len(block) - length / 2, high - length))

    blocks: list[list[float]] = []
    for place in wanted:
        blocks.append([place])
        while len(blocks) > 1 and begin(blocks[-1]) < begin(blocks[-2]) + room * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    return [begin(block) + room * number for block in blocks for number in range(len(block))]


def dark(colour: str) -> str:
    """A colour dark enough for text on white: mixed with black."""
    return "#" + "".join(f"{round(255 * 0.72 * part):02x}" for part in to_rgb(colour))


def caption(figure: Figure, *records: Record, more: str = "") -> None:
    """What was measured, where and when, small at the bottom: model, machine, date of each record, and ``more``."""
    said = list(dict.fromkeys(about(record) for record in records))
    figure.text(0.012, 0.012, "\n".join(filter(None, [more, *said])), fontsize=SMALL, color="#666666", va="bottom")


def about(record: Record) -> str:
    """Model, machine and date of a record."""
    content = record.content
    result, machine = content.get("result", {}), content.get("machine", {})
    model = str(result.get("model", "embedded")) if isinstance(result, dict) else "embedded"
    name = MODELS.get(model, model)
    if isinstance(result, dict) and result.get("dtype"):
        name += f" in {result['dtype']}"
    where = str(machine.get("accelerator") or machine.get("processor", ""))
    if machine.get("threads"):
        where += f", {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return " · ".join(filter(None, (name, where, str(content.get("date", "")))))


def save(figure: Figure, folder: Path, name: str, *, svg: bool = True) -> list[Path]:
    """Write the picture as PNG of few colours, and as SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    figure.savefig(held := io.BytesIO(), format="png", dpi=DPI, metadata={"Software": None})
    Image.open(held).convert("RGB").quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE).save(file, optimize=True)
    if not svg:
        return [file]
    with rc_context({"svg.hashsalt": "winnowkv", "svg.fonttype": "path"}):
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    return [file.with_suffix(".svg"), file]
