"""What ``budget="auto"`` promised, and what came of it on other prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from website.figures.style import BLUE, GREY, INK, MIDDLE, SMALL, canvas, caption, dress, save
from website.records import Record
from winnowkv.errors import InputError

RECORDS = ("auto-budget",)
LOW, HIGH = 0.75, 1.0


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw it. Raises InputError if the record is missing or its table is of another form."""
    record = records["auto-budget"]
    figure = canvas(4.0, 5.0)
    panel = figure.add_axes((0.15, 0.22, 0.78, 0.74))
    dress(panel, "promised share of the full cache's tokens", "realised on other prompts")
    panel.plot([LOW, HIGH], [LOW, HIGH], color=GREY, linewidth=1)
    panel.text(0.965, 0.945, "as promised", fontsize=SMALL, color=GREY, rotation=43, ha="center", va="center")
    for target, mean, low, high, kept in read(record):
        panel.errorbar([target], [mean], yerr=[[mean - low], [high - mean]], fmt="o", color=BLUE, markersize=7, capsize=3)
        panel.annotate(
            f"{kept} kept", (target, mean), xytext=(-9, 0), textcoords="offset points", ha="right", va="center",
            fontsize=SMALL, color=INK,
        )  # fmt: skip
    ticks = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    for axis in (panel.set_xticks, panel.set_yticks):
        axis(ticks, [f"{100 * tick:.0f}%" for tick in ticks])
    panel.tick_params(labelsize=MIDDLE)
    panel.set(xlim=(LOW, HIGH), ylim=(LOW, HIGH))
    caption(figure, record, more="mean over prompts with its 95% interval, and the kept share of the bytes")
    return save(figure, folder, "auto_promise")


def read(record: Record) -> list[tuple[float, float, float, float, str]]:
    """Target, realised share with its interval, and kept bytes as text, of each row of the record's table."""
    found = []
    for row in record.get("tables.realised.rows"):
        numbers = re.findall(r"[\d.]+", f"{row[0]} {row[1]}")
        if len(numbers) != 4:
            raise InputError(f"record auto-budget: row {row} is not a target, a share and its interval")
        target, mean, low, high = map(float, numbers)
        found.append((target, mean / 100, low / 100, high / 100, str(row[2])))
    return found
