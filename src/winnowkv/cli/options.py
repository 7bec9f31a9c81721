"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.errors import InputError, ModelNotFoundError

if TYPE_CHECKING:
    from winnowkv.budget import Asked

T = TypeVar("T")

POLICIES_HELP = "Comma-separated policies; options after colons, snapkv:observe=16"
BUDGETS_HELP = "Comma-separated: entries per layer and KV head (128), or kept fractions of the prompt (0.12)"
DEFAULT_BUDGETS = str(DEFAULT_BUDGET)
DEFAULT_POLICY = "winnow"  # of every door: compress(), CompactCache, Engine, the command line
TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}
DEFAULT_STORE = "winnow-out/contexts"
DTYPES = ("bfloat16", "float16", "float32")
TASK_HELP = "'localization' (QA, retrieval) or 'aggregation' (summaries, few-shot, code), for policies that score by task."


def model_name(name: str | None) -> str | None:
    """A model's name as given. Raises ModelNotFoundError for a path at which nothing is."""
    path_like = name is not None and (name[:1] in ("/", ".", "~") or name.count("/") > 1)
    if name == "" or (name is not None and path_like and not Path(name).exists()):
        raise ModelNotFoundError(f"model {name!r} does not exist: give 'embedded', a folder, or a hub id")
    return name


def task_name(name: str | None) -> str | None:
    """A task's name as given. Raises PolicyError for an unknown one."""
    if name is not None:
        from winnowkv.prompt.task import TaskProfile

        TaskProfile.of(name)
    return name


def quality_name(name: str | None) -> str | None:
    """A level's name as given. Raises PolicyError for an unknown one."""
    if name is not None:
        from winnowkv.policies.quality import check_quality

        check_quality(name)
    return name


def with_quality(specs: Sequence[str], quality: str | None) -> list[str]:
    """Policy specs with the options of a level, which the lines of results then hold. Raises PolicyError if they contradict."""
    if quality is None:
        return list(specs)
    from winnowkv.policies.quality import spec_of_quality

    return [spec_of_quality(spec, quality) for spec in specs]


def dtype_of(name: str | None) -> str | None:
    """A dtype's name as given. Raises InputError for an unknown one."""
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype {name!r} is unknown: it is one of {', '.join(DTYPES)}")
    return name


def device_of(name: str | None) -> str | None:
    """A device's name as given. Raises InputError for one that is unknown or not there."""
    if name is None:
        return None
    import torch

    kind, colon, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in counts or (colon and not index.isdecimal()):
        raise InputError(f"--device {name!r} is unknown: it is one of {', '.join(counts)}, or one of several, such as cuda:1")
    if int(index or 0) >= counts[kind]:
        there = [one for one, count in counts.items() if count]
        raise InputError(f"--device {name!r} is not there: this machine has {', '.join(there)}")
    return name


def fraction_list(text: str, option: str) -> list[float]:
    """Parse depths: numbers from 0 to 1. Raises InputError that names the option and the value."""
    found = numbers(text, float, option)
    for value in found:
        if not 0 <= value <= 1:
            raise InputError(f"{option}: {value} is outside 0 (start of the text) to 1 (its end)")
    return found


Model = Annotated[str, typer.Option("--model", callback=model_name, help="'embedded', 'gemma3-270m', a folder, or a hub id.")]
Device = Annotated[
    str | None,
    typer.Option("--device", callback=device_of, help="cpu, cuda, cuda:1 or mps. Default: the first that is there."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", callback=dtype_of, help=f"{', '.join(DTYPES)}. Default: bfloat16 if the device has it, else float32."
    ),
]
PromptText = Annotated[str | None, typer.Argument(help="The prompt. Without it, --file or standard input is read.")]
PromptFile = Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")]
PromptBudget = Annotated[
    str, typer.Option(help="Kept fraction of the prompt (0.12), entries kept per layer and KV head (512), or auto:0.95.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Store = Annotated[str, typer.Option("--store", envvar="WINNOW_STORE", help="Folder or URL of the contexts.")]
Task = Annotated[
    str | None, typer.Option("--task", callback=task_name, help=f"{TASK_HELP} Default: classified.", show_default=False)
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


Quality = Annotated[
    str | None,
    typer.Option(
        "--quality",
        callback=quality_name,
        help="lean, balanced or best: options of every policy that evicts; better answers for more memory and time at the "
        "start. Default: as the policies say.",
        show_default=False,
    ),
]


def numbers(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    """Parse a comma-separated list of numbers. Raises InputError that names the option and the value."""
    values = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            values.append(kind(part))
        except InputError:
            raise
        except ValueError:
            raise InputError(f"{option}: {part!r} is not a number; write a list like 1000,3000") from None
    if not values:
        raise InputError(f"{option} is empty; write a list like 1000,3000")
    return list(dict.fromkeys(values))


def token_count(text: str, option: str) -> int:
    """Parse a number of tokens: ``32k`` or ``4096``. Raises InputError that names the option and the value."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([km]?)", text.strip(), re.IGNORECASE)
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
