"""Needles found by length of the prompt and depth in it, a map for each policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from website.figures.style import BLACK, INK, MIDDLE, SMALL, canvas, caption, save
from website.records import Record
from winnowkv.budget import budget_text
from winnowkv.errors import InputError

RECORDS = ("needles",)
COLUMNS = 3
SHADES = LinearSegmentedColormap.from_list("found", ["#f4f4f4", "#9ecae1", "#0b559f"])  # light is lost, dark is found
Group = dict[str, Any]


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw it. Raises InputError if the record is missing or has no group."""
    record = records["needles"]
    groups: list[Group] = record.get("groups")
    policies = list(dict.fromkeys(group["policy"] for group in groups))
    if not policies:
        raise InputError("record needles has no groups: let winnow needle finish")
    rows, columns = math.ceil(len(policies) / COLUMNS), min(COLUMNS, len(policies))
    figure = canvas(1.95 * rows + 0.95)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    high = figure.get_figheight()
    figure.subplots_adjust(left=0.105, right=0.985, top=1 - 0.32 / high, bottom=0.92 / high, wspace=0.08, hspace=0.3)
    for panel in panels.flat[len(policies) :]:
        panel.set_axis_off()
    for panel, policy in zip(panels.flat, policies, strict=False):
        draw(panel, [group for group in groups if group["policy"] == policy])
    figure.text(0.545, 0.48 / high, "prompt tokens", fontsize=MIDDLE, ha="center", color=INK)
    figure.text(0.012, 0.55, "depth of the needle in the text", fontsize=MIDDLE, rotation=90, va="center", color=INK)
    needles = cases_of(groups[0])
    caption(figure, record, more=f"numbers: how many of {needles} needles the answer names, a prompt each")
    return save(figure, folder, "needle_map")


def cases_of(group: Group) -> int:
    """How many needles stand at each depth."""
    return int(group["cases"]) // len(group["by_depth"]["correct"])


def draw(panel: Axes, groups: Sequence[Group]) -> None:
    """The map of one policy, with its sum above it."""
    lengths = [group["length"] for group in groups]
    depths = [float(depth) for depth in groups[0]["by_depth"]["correct"]]
    cells = [[group["by_depth"]["correct"][key] for group in groups] for key in groups[0]["by_depth"]["correct"]]
    panel.imshow(cells, vmin=0, vmax=1, cmap=SHADES, aspect="auto")
    for row, shares in enumerate(cells):
        for column, share in enumerate(shares):
            found = round(share * cases_of(groups[column]))
            colour = "white" if share > 0.6 else BLACK
            panel.text(column, row, str(found), ha="center", va="center", fontsize=MIDDLE, color=colour)
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    panel.set_yticks(range(len(depths)), [words(depth) for depth in depths])
    panel.set_xticks([column - 0.5 for column in range(1, len(lengths))], minor=True)
    panel.set_yticks([row - 0.5 for row in range(1, len(depths))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5)
    panel.tick_params(labelsize=SMALL, colors=INK, length=0, which="both")
    panel.spines[:].set_visible(False)
    found = sum(round(group["accuracy"] * group["cases"]) for group in groups)
    kept = f" at {budget_text(groups[0]['budget'])}" if groups[0]["evicts"] else ""
    said = f"{'full cache' if groups[0]['policy'] == 'full' else groups[0]['policy']}{kept}"
    panel.set_title(f"{said}: {found} of {sum(group['cases'] for group in groups)}", fontsize=MIDDLE, loc="left", pad=4)


def words(depth: float) -> str:
    """A depth as a reader says it."""
    return {0.0: "start", 1.0: "end"}.get(depth, f"{100 * depth:g}%")
