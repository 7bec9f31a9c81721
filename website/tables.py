"""Tables of README and docs, made of records: one function a table, by the name that pages use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from website.records import Record
from winnowkv.errors import InputError
from winnowkv.report import MIB

Records = Mapping[str, Record]
TABLES: dict[str, Callable[[Records], str]] = {}


def table(function: Callable[[Records], str]) -> Callable[[Records], str]:
    """Register a table under its function's name."""
    TABLES[function.__name__] = function
    return function


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(("| " + " | ".join(str(cell) for cell in line) + " |").replace("|  |", "| |") for line in lines)


def render(name: str, records: Records) -> str:
    """The table of that name, or the columns and rows that a record of that name holds. Raises InputError without either."""
    if name in TABLES:
        return TABLES[name](records)
    if name in records:
        return markdown(records[name].get("columns"), records[name].get("rows"))
    raise InputError(f"table {name!r} is neither in website/tables.py nor a record: {', '.join(sorted(TABLES))}")


@table
def level_costs(records: Records) -> str:
    """What the levels of quality cost, of ``benchmarks/levels.py``."""
    rows = records["levels"].get("rows")
    columns = ["level", "first token", "pause", "step before", "step after", "held at most", "held then"]
    return markdown(
        columns,
        (
            [
                row["level"], f"{row['first_token_s']:.2f} s", f"{row['pause_s']:.2f} s", f"{row['before_ms']:.0f} ms",
                f"{row['step_ms']:.0f} ms", f"{row['peak_bytes'] / MIB:.1f} MiB", f"{row['held_bytes'] / MIB:.1f} MiB",
            ]
            for row in rows
        ),
    )  # fmt: skip


from website import tables_choose as tables_choose  # noqa: E402 its tables register themselves, with what is above
