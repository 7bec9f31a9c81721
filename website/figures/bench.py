"""What the pictures of speed read from the record ``bench``: its tables of decode steps and of requests in a fixed memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from website.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, Look
from website.records import Record
from winnowkv.errors import InputError

WINNOW, COMPILED, PLAIN = "winnow, 12%", "winnow, compiled", "full cache"
STATIC, QUANTIZED = "full, static", "full, int4"
CACHES = {
    WINNOW: Look(BLUE, "o", "-", 2.4), COMPILED: Look(GREEN, "s", "-", 2.4), PLAIN: Look(BLACK, "D", "--"),
    STATIC: Look(GREY, "v", ":"), QUANTIZED: Look(PURPLE, "P", "-."),
}  # fmt: skip
# The columns of the table of steps that are drawn: cache and requests at once.
COLUMNS = {
    "decode step, `winnow`": (WINNOW, 1),
    "compiled": (COMPILED, 1),
    "its full cache: dynamic": (PLAIN, 1),
    "static": (STATIC, 1),
    "quantized (int4)": (QUANTIZED, 1),
    "eight requests: `winnow`": (WINNOW, 8),
    "dynamic": (PLAIN, 8),
}
# The rows of the table of requests in a fixed memory, with the name that the picture gives them.
ROWS = {
    "`wk.Engine`, `winnow` at 12%": "wk.Engine, winnow at 12%",
    "the same, compiled": "the same, compiled",
    "transformers, full cache": "transformers, full cache",
    "vLLM's CPU build, full cache": "vLLM's CPU build, full cache",
}
BARS = {
    "wk.Engine, winnow at 12%": Look(BLUE, "o", width=2.4),
    "the same, compiled": Look(GREEN, "s", width=2.4),
    "transformers, full cache": Look(BLACK, "D"),
    "vLLM's CPU build, full cache": Look(ORANGE, "^"),
}
ENTRY_BYTES = 30 * 3 * 64 * 2 * 2  # SmolLM2-135M: layers x KV heads x head size x (key, value) x bfloat16
KEPT = {WINNOW: 0.12, PLAIN: 1.0}


@dataclass(frozen=True)
class Step:
    """A decode step: which cache, how many requests at once, tokens of a prompt, milliseconds."""

    cache: str
    batch: int
    context: int
    ms: float


def read_steps(record: Record) -> list[Step]:
    """The table of decode steps. Raises InputError if the record has none, or one without the columns drawn."""
    columns, rows = table(record, "decode")
    if missing := [name for name in COLUMNS if name not in columns]:
        raise InputError(f"record {record.name}: the table of decode steps has no column {missing[0]!r}")
    return [
        Step(cache, batch, int(number(row[0])), number(row[columns.index(name)]))
        for row in rows
        for name, (cache, batch) in COLUMNS.items()
    ]


def read_engines(record: Record) -> dict[str, tuple[int, float]]:
    """Requests at once and tokens a second of each engine in a fixed memory. Raises InputError as above."""
    _, rows = table(record, "memory")
    found = {row[0]: (int(number(row[1])), number(row[2])) for row in rows}
    if missing := [name for name in ROWS if name not in found]:
        raise InputError(f"record {record.name}: the table of requests in a fixed memory has no row {missing[0]!r}")
    return {said: found[name] for name, said in ROWS.items()}


def table(record: Record, name: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of one of the record's tables."""
    return record.get(f"tables.{name}.columns"), record.get(f"tables.{name}.rows")


def number(cell: Any) -> float:
    """The number that a cell begins with: ``1,024 tokens`` is 1024. Raises InputError without one."""
    found = re.match(r"[\d,.]+", str(cell))
    if found is None:
        raise InputError(f"a cell {cell!r} of a table does not begin with a number")
    return float(found[0].replace(",", ""))


def memory(cache: str, context: int, batch: int) -> float:
    """MiB of keys and values of so many requests, computed from the model's shape."""
    return KEPT[cache] * context * batch * ENTRY_BYTES / 2**20
