"""What a command printed, as a reader of 80 columns sees it: tables with their blocks, header, keys and rows."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len

RULE = "─"


@dataclass(frozen=True)
class Block:
    """One block of a table: the text above its rule, and the lines below it up to the first empty one of another kind."""

    header: str
    rows: list[str]


def blocks(out: str) -> list[Block]:
    """The blocks of all tables: a rule of dashes divides header and rows; blank lines of a section have blanks in them."""
    found, lines = [], out.splitlines()
    for at, line in enumerate(lines):
        if not line or set(line) != {RULE}:
            continue
        top = at
        while top and lines[top - 1].strip() and set(lines[top - 1]) != {RULE}:
            top -= 1
        end = at + 1
        while end < len(lines) and lines[end] and not lines[end].startswith(("--", "[", "files in", "page:", "means over")):
            end += 1
        found.append(Block("\n".join(lines[top:at]), [row for row in lines[at + 1 : end] if row.strip()]))
    return found


def too_wide(out: str, width: int = 80) -> list[str]:
    """Lines that do not fit."""
    return [line for line in out.splitlines() if cell_len(line) > width]
