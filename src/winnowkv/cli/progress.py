"""What a command shows while it works: the progress bar of a resumable run, with messages about finished lines, or one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from winnowkv.evaluate.report.store import ResultStore


def working(what: str) -> AbstractContextManager[Any]:
    """Show on a terminal, on standard error, what takes a while."""
    from rich.console import Console

    return Console(stderr=True).status(what)


@contextmanager
def resumable(console: Console, store: ResultStore, what: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show a progress bar over ``total`` steps of which ``done`` are done; yields the function to call after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if store.lines:
        console.print(f"{len(store.lines)} measurements are in {store.folder} already; remove the folder to measure them again")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(what, total=total, completed=done)
            yield lambda step: progress.update(bar, advance=1, description=step)
    except KeyboardInterrupt:
        console.print(
            f"interrupted: {len(store.lines)} finished lines are in {store.file}; the same command continues from there"
        )
        raise
