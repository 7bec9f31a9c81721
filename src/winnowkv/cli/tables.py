"""Tables of results at the width of the terminal: key columns are always there and never shrink.

A table that is too wide for the terminal continues in blocks below, each beginning with the key columns; what is too long in
these is abbreviated, with a legend. Output that goes to a file or a pipe is as wide as COLUMNS says, else 80 columns.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

GAP = 2  # blanks between two columns
LEAST_KEY_WIDTH = 10  # a longer text of a key column may be abbreviated to so many columns
KEY_SHARE = 0.6  # of the terminal, which the key columns of a block may take before their texts are abbreviated


def before_options(text: str) -> str:
    """The short form of a spec: what stands before its options."""
    return text.split(":")[0]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Parameters
    ----------
    title: its lines are separated by line breaks.
    key: says what a row is about; stands in every block, and is never cut. short: makes the short form of a long key.
    least: the column holds text, which is folded to the room that is left, but at least to so many columns.
    left: the text is on the left; numbers are on the right.
    """

    title: str
    key: bool = False
    least: int | None = None
    left: bool = False
    short: Callable[[str], str] = before_options


@dataclass
class ResultTable:
    """Rows of texts under columns; ``sections`` holds the numbers of rows before which a section begins.

    Parameters
    ----------
    title, caption: above and below the table, None for none.
    """

    columns: Sequence[Column]
    title: str | None = None
    caption: str | None = None
    rows: list[list[str]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add(self, *cells: str) -> None:
        """Add a row, a text for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(list(cells))

    def section(self) -> None:
        """Begin a section with the next row."""
        self.sections.add(len(self.rows))

    def print(self) -> None:
        """Print the table, in as many blocks as the terminal's width asks for."""
        console = result_console()
        blocks, legend = fold(self, console.width)
        if self.title:
            console.print(self.title, style="bold")
        for number, block in enumerate(blocks):
            if number:
                console.print()
            console.print(drawn(block, console.width))
        for line in legend:
            say(line, indent=4)
        if self.caption:
            say(self.caption)


def result_console() -> Console:
    """A console on standard output, in plain text: no markup, nothing coloured for being a number."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def say(text: str, indent: int = 3) -> None:
    """Print a sentence, folded at the terminal's width between words; further lines are indented."""
    width = max(result_console().width, 20)
    for line in text.splitlines() or [""]:
        folded = textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
        print("\n".join(folded))


def note(text: str) -> None:
    """Print what the reader should know beside a table."""
    say(f"-- {text}")


def fold(table: ResultTable, width: int) -> tuple[list[ResultTable], list[str]]:
    """The blocks of a table in which every key is whole and no row is wider than ``width``, and the legend of short keys."""
    if least_width(table) <= width:
        return [fitted(table, width)], []
    table, legend = abbreviated(table, width)
    keys = [at for at, column in enumerate(table.columns) if column.key]
    blocks, chosen = [], list(keys)
    for at, column in enumerate(table.columns):
        if column.key:
            continue
        if len(chosen) > len(keys) and least_width(part(table, [*chosen, at])) > width:
            blocks.append(chosen)
            chosen = list(keys)
        chosen.append(at)
    return [fitted(part(table, block), width) for block in [*blocks, chosen]], legend


def abbreviated(table: ResultTable, width: int) -> tuple[ResultTable, list[str]]:
    """The same table with short keys in place of the longest ones, and what they stand for."""
    keys = [at for at, column in enumerate(table.columns) if column.key]
    columns = [
        replace(column, least=None, left=column.left or column.least is not None) if column.key else column
        for column in table.columns
    ]
    table = replace(table, columns=columns)
    room = int(width * KEY_SHARE)
    limit = max((columns_of(row[at]) for row in table.rows for at in keys), default=0)
    rows, legend = table.rows, list[str]()
    while limit > LEAST_KEY_WIDTH and key_width(replace(table, rows=rows), keys) > room:
        limit -= 1
        rows, legend = shortened(table, keys, limit)
    return replace(table, rows=rows), legend


def shortened(table: ResultTable, keys: Sequence[int], limit: int) -> tuple[list[list[str]], list[str]]:
    """The rows with short forms of keys that are wider than ``limit``, and the legend; equal keys have one number."""
    numbers: dict[str, str] = {}
    rows = [list(row) for row in table.rows]
    for row in rows:
        for at in keys:
            if columns_of(row[at]) > limit:
                mark = numbers.setdefault(row[at], f"[{len(numbers) + 1}]")
                short = table.columns[at].short(row[at])
                row[at] = f"{short[: max(limit - len(mark) - 1, 1)].rstrip()} {mark}"
    return rows, [f"{mark} {text}" for text, mark in numbers.items()]


def part(table: ResultTable, chosen: Sequence[int]) -> ResultTable:
    """Some of the columns."""
    columns, rows = [table.columns[at] for at in chosen], [[row[at] for at in chosen] for row in table.rows]
    return replace(table, columns=columns, rows=rows)


def fitted(table: ResultTable, width: int) -> ResultTable:
    """A table whose text columns are as wide as what is left for them: no wider than their texts, no narrower than said."""
    spare = width - least_width(table)
    columns = []
    for at, column in enumerate(table.columns):
        if column.least is not None:
            more = min(natural_width(table, at) - width_of(table, at), max(spare, 0))
            spare -= more
            column = replace(column, least=width_of(table, at) + more)
        columns.append(column)
    return replace(table, columns=columns)


def drawn(table: ResultTable, width: int) -> Any:
    """The table for rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, GAP - 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        width=None if least_width(table) <= width else width,
    )
    for at, column in enumerate(table.columns):
        left, size = column.least is not None or column.left, width_of(table, at)
        options: dict[str, Any] = {"justify": "left" if left else "right", "overflow": "fold", "no_wrap": column.least is None}
        made.add_column(Text(column.title), width=size, **options)
    for number, (row, following) in enumerate(pairwise([*table.rows, []]), 1):
        made.add_row(*map(Text, row), end_section=bool(following) and number in table.sections)
    return made


def least_width(table: ResultTable) -> int:
    """The columns of the terminal that a table takes at least."""
    return key_width(table, range(len(table.columns)))


def key_width(table: ResultTable, chosen: Sequence[int]) -> int:
    """What these columns take, with the gaps between them."""
    return sum(width_of(table, at) for at in chosen) + GAP * (len(chosen) - 1)


def width_of(table: ResultTable, at: int) -> int:
    """What one column takes, of a column of text the least."""
    natural, least = natural_width(table, at), table.columns[at].least
    return natural if least is None else min(natural, max(least, columns_of(table.columns[at].title)))


def natural_width(table: ResultTable, at: int) -> int:
    """What one column takes if nothing is folded."""
    return max(columns_of(text) for text in (table.columns[at].title, *(row[at] for row in table.rows)))


def columns_of(text: str) -> int:
    """Columns of the terminal that the widest line of a text takes."""
    from rich.cells import cell_len

    return max(map(cell_len, text.splitlines()), default=0)


def keys(*titles: str) -> list[Column]:
    """Key columns: the first holds names, the others what is beside them."""
    return [Column(title, key=True, left=at == 0) for at, title in enumerate(titles)]


def numbers(titles: Iterable[str]) -> list[Column]:
    """Columns of numbers."""
    return [Column(title) for title in titles]
