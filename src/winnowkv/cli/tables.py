"""The console that tables of results go to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def table_console(width: int = 120) -> Console:
    """Standard output, at least ``width`` columns wide where it is a file or a pipe, which has no edge to fold at."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console
