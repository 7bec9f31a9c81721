"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.budget import Asked

T = TypeVar("T")

POLICIES_HELP = "Comma-separated policies; options after colons, snapkv:observe=16"
BUDGETS_HELP = "Comma-separated: entries per layer and KV head (128), or kept fractions of the prompt (0.12)"
DEFAULT_BUDGETS = str(DEFAULT_BUDGET)
TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}

Model = Annotated[str, typer.Option("--model", help="'embedded', 'gemma3-270m', a folder, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="'localization' (QA, retrieval) or 'aggregation' (summaries, few-shot, code), for policies that score by task.",
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Use the model's chat template. Default: yes if it has one.", show_default=False),
]
Factorial = Annotated[
    bool, typer.Option("--factorial", help="Run the ablations of compresskv and windowkv instead of --policies.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder for results; an interrupted run continues there.")]
Policies = Annotated[str, typer.Option("--policies", help=f"{POLICIES_HELP}.")]
Budgets = Annotated[str, typer.Option("--budgets", help=f"{BUDGETS_HELP}.")]
MaxContext = Annotated[
    int | None,
    typer.Option(
        "--max-context", min=64, help="Most prompt tokens; longer prompts lose their middle. Default: the model's limit."
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with the tasks' rows. Default: the hub.")]
Haystack = Annotated[
    Path | None,
    typer.Option("--haystack", help="A text file, or a folder with .txt files in it. Default: the package's essays."),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="Calibration profile, or a folder of them, for policies that need one. Default: the package's own."
    ),
]


def numbers(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    """Parse a comma-separated list of numbers. Raises InputError that names the option and the value."""
    values = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            values.append(kind(part))
        except ValueError:
            raise InputError(f"{option}: {part!r} is not a number; write a list like 1000,3000") from None
    if not values:
        raise InputError(f"{option} is empty; write a list like 1000,3000")
    return list(dict.fromkeys(values))


def token_count(text: str, option: str) -> int:
    """Parse a number of tokens: ``32k`` or ``4096``. Raises InputError that names the option and the value."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip(), re.IGNORECASE)
    tokens = int(Fraction(match[1]) * TOKEN_UNITS[match[2].lower()]) if match else 0
    if tokens < 1:
        raise InputError(f"{option} {text!r} is no number of tokens: write it as 32768 or 32k")
    return tokens


def budgets(text: str) -> list[Asked]:
    """Parse a comma-separated list of budgets. Raises BudgetError for a bad one, InputError for an empty list."""
    from winnowkv.budget import Budget

    each = dict.fromkeys(Budget.of(part) for part in filter(None, (part.strip() for part in text.split(","))))
    if not each:
        raise InputError("--budgets is empty; write a list like 0.12,128")
    return [budget.asked for budget in each]


def load_model(name: str, *, random: bool = False) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer without the library's progress bars; ``random``: random weights of its shape."""
    import transformers

    from winnowkv.models.load import load, load_random

    transformers.utils.logging.disable_progress_bar()
    return load_random(name) if random else load(name)
