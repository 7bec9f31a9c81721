"""``winnow report``: several runs of ``winnow eval`` merged into a table and one page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.cli.options import Json
from winnowkv.cli.tables import ResultTable, keys, note, numbers, say


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Result folders of winnow eval.")],
    out: Annotated[Path, typer.Option("--out", help="HTML page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Merge runs and compare every setting with the full cache, row by row.

    Protocols, models and dtypes stay separate: nothing is averaged or paired across them. A measurement that
    several runs hold is taken from the last.
    """
    from winnowkv.evaluate.report.merge import merge
    from winnowkv.evaluate.report.page import write_page
    from winnowkv.evaluate.report.summary import summarize

    lines, config = merge(runs)
    summary = summarize(lines, config)
    write_page(summary, lines, config, out)
    if as_json:
        json.dump(summary, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show(summary, out)


def show(summary: dict[str, Any], page: Path) -> None:
    """Print a table for each section with its notes, and the page's file name."""
    from winnowkv.evaluate.report.summary import OVER_TASKS, group_budget_text
    from winnowkv.report import MIB

    columns = ("score", "95% interval", "against\nfull", "95% interval", "W / T / L", "KV MiB\nkept / full")
    for section in summary["sections"]:
        counts = sorted({group["rows"] for group in section["groups"] if group["task"] == OVER_TASKS})
        rows = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        every = sum(task["rows"] for task in section["tasks"])
        rows += f" of {every}" if counts[0] < every else ""
        title = f"{section['protocol']}: {section['model']} in {section['dtype']}, {OVER_TASKS} ({rows} rows)"
        table = ResultTable([*keys("policy", "budget"), *numbers(columns)], title)
        for group in section["groups"]:
            if group["task"] != OVER_TASKS:
                continue
            pair = group["against_full"] or {"mean_difference": None, "low": None, "high": None}
            counts = [pair.get(name) for name in ("wins", "ties", "losses")]
            kept = group["kept_bytes"]
            table.add(
                group["policy"],
                group_budget_text(group),
                points(group["score"]),
                between(group),
                points(pair["mean_difference"], "+"),
                between(pair),
                "-" if counts[0] is None else " / ".join(map(str, counts)),
                "-" if kept is None else f"{kept / MIB:.1f} / {group['full_bytes'] / MIB:.1f}",
            )
        table.print()
        for sentence in section["notes"]:
            note(sentence)
    for sentence in summary["notes"]:
        note(sentence)
    say(f"page: {page}")


def points(value: float | None, sign: str = "") -> str:
    """A score in points of 100."""
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def between(group: dict[str, Any]) -> str:
    """A 95% interval in points of 100."""
    return "-" if group["low"] is None else f"{100 * group['low']:.1f} to {100 * group['high']:.1f}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)
