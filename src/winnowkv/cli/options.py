"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from winnowkv.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.budget import Asked

T = TypeVar("T")

Model = Annotated[str, typer.Option("--model", help="'embedded', 'gemma3-270m', a folder, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Task = Annotated[
    str | None, typer.Option("--task", help="'localization' (QA, retrieval) or 'aggregation', for policies that ask.")
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Use the model's chat template. Default: where it has one.", show_default=False),
]
Factorial = Annotated[
    bool, typer.Option("--factorial", help="Run the ablations of compresskv and windowkv in place of a list of policies.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder for results; a run that stopped goes on where it was.")]


def numbers(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    """A comma-separated list of numbers. Raises InputError naming the option and the value."""
    values = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            values.append(kind(part))
        except ValueError:
            raise InputError(f"{option}: {part!r} is not a number; write a list like 1000,3000") from None
    if not values:
        raise InputError(f"{option} is empty; write a list like 1000,3000")
    return list(dict.fromkeys(values))


def budgets(text: str) -> list[Asked]:
    """A comma-separated list of budgets, as they were asked. Raises BudgetError for a bad one."""
    from winnowkv.budget import Budget

    each = dict.fromkeys(Budget.of(part) for part in filter(None, (part.strip() for part in text.split(","))))
    if not each:
        raise InputError("--budgets is empty; write a list like 0.12,128")
    return [budget.asked for budget in each]


def load_model(name: str, *, random: bool = False) -> tuple[PreTrainedModel, Any]:
    """Load quietly: the library's own progress bars would break ours and standard output. ``random``: its shape only."""
    import transformers

    from winnowkv.models.load import load, load_random

    transformers.utils.logging.disable_progress_bar()
    return load_random(name) if random else load(name)
