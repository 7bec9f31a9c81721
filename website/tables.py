"""Tables of README and docs, made of records: one function a table, by the name that pages use.

The functions are in ``website/tables_*.py``. A table that was copied by hand needs none: its record holds columns and rows.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import website
from website.records import Record
from winnowkv.errors import InputError

Records = Mapping[str, Record]
TABLES: dict[str, Callable[[Records], str]] = {}


def table(function: Callable[[Records], str]) -> Callable[[Records], str]:
    """Register a table under its function's name."""
    TABLES[function.__name__] = function
    return function


@cache
def tables() -> Mapping[str, Callable[[Records], str]]:
    """All tables by name: those of every module ``website/tables_*.py``, which register theirs when they are imported."""
    for module in pkgutil.iter_modules(website.__path__):
        if module.name.startswith("tables_"):
            importlib.import_module(f"website.{module.name}")
    return TABLES


def markdown(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; an empty cell is one blank. Raises InputError for a row with another number of cells."""
    lines = [columns, *rows]
    for line in lines:
        if len(line) != len(columns):
            raise InputError(f"a table of {len(columns)} columns has a row of {len(line)} cells: {line}")
    texts = ["|" + "|".join(f" {cell} " if str(cell) else " " for cell in line) + "|" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(columns), *texts[1:]])


def render(name: str, records: Records) -> str:
    """The table of that name: a function's, a record's columns and rows, or for RECORD.NAME one of a record's tables.

    Raises InputError if there is none.
    """
    if name in tables():
        return tables()[name](records)
    record, _, part = name.rpartition(".")
    if name in records:
        return markdown(records[name].get("columns"), records[name].get("rows"))
    if record in records:
        return markdown(records[record].get(f"tables.{part}.columns"), records[record].get(f"tables.{part}.rows"))
    raise InputError(f"table {name!r} is neither in website/tables_*.py nor a record's: {', '.join(sorted(tables()))}")
