"""``winnow plan``: what keys and values need, and what of it fits, from a model's config alone."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnowkv.cli.options import Json, budgets as read_budgets
from winnowkv.cli.tables import table_console
from winnowkv.errors import BudgetError, InputError, ProfileError
from winnowkv.memory.sizes import read_size

if TYPE_CHECKING:
    import torch

    from winnowkv.budget import Asked
    from winnowkv.memory.plan import Fit, MemoryPlan
    from winnowkv.policies import Policy

TOKENS = {"": 1, "k": 2**10, "m": 2**20}
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATIONS = ("none", "int8", "int4")
WORST = (
    "at its worst a request holds one layer whole beside what the policy may hold of those before it; prompts are read one "
    "at a time; activations and generated tokens come on top"
)


def plan(
    context: Annotated[str, typer.Option(help="Prompt tokens of a request: 32768, or 32k (k is 1024).")],
    memory: Annotated[str, typer.Option(help="Memory of the device: 24GiB, 24GB, 512MiB, or plain bytes.")],
    model: Annotated[
        str, typer.Option("--model", help="'embedded', a folder, a config.json, or a hub id; weights are not needed.")
    ] = "embedded",
    batch: Annotated[int, typer.Option(min=1, help="Requests that are held at once.")] = 1,
    policies: Annotated[
        str | None,
        typer.Option(help="Comma-separated; options after colons. Default: all that evict. The full cache is always shown."),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Comma-separated: entries (256) or kept fractions (0.12).")] = "0.12,0.25,0.5",
    quantize: Annotated[
        str, typer.Option(help="Store what stays in fewer bits: int8 or int4. none: as the policies say.")
    ] = "none",
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Of weights, keys and values: {', '.join(DTYPES)}. Default: the config's, else bfloat16."),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Count the weights inside the memory.")] = True,
    as_json: Json = False,
) -> None:
    """Say how many bytes of keys and values requests need, which settings fit, and the largest that would.

    A request is its prompt: tokens that it generates come on top, and so do activations. Prompts are read one at a
    time, and while one is read each layer in its turn is whole until its attention is done; the layers before it hold
    what the policy lets them hold by then: what they end with, or more for policies that decide while they read.
    Layers that slide over a window are never compressed.
    Policies that score by task are taken for localization; those with budgets of single heads (adakv, headkv) pad the
    heads of a layer to the longest, which depends on the prompt and is not counted.

    winnow plan --model Qwen/Qwen2.5-7B-Instruct --context 32k --batch 8 --memory 24GiB
    """
    tokens, room, asked = read_tokens(context), read_size(memory), read_budgets(budgets)
    if quantize not in QUANTIZATIONS:
        raise InputError(f"--quantize {quantize!r} is unknown: it is one of {', '.join(QUANTIZATIONS)}")
    from winnowkv.memory.plan import MemoryPlan
    from winnowkv.memory.shape import read_shape
    from winnowkv.models.load import dtype_name, load_config
    from winnowkv.policies import policy as make_policy, split_policies

    specs = None if policies is None else list(dict.fromkeys(split_policies(policies)))
    for spec in specs or []:
        make_policy(spec)  # what is wrong with it is told before the model is looked for
    config = load_config(model)
    number = choose_dtype(dtype, config)
    shape = read_shape(config, number.itemsize)
    made = MemoryPlan(shape, tokens, batch, room, weights_bytes(config, shape.parameters, number) if weights else 0)
    fits, notes = settings(made, specs, asked, None if quantize == "none" else quantize)
    refuse_impossible(made, fits, dtype_name(number))
    if as_json:
        json.dump(summary(made, fits, notes, model, dtype_name(number)), sys.stdout, indent=2)
        print()
    else:
        show(made, fits, notes, model, dtype_name(number))


def read_tokens(text: str) -> int:
    """Tokens of ``32k`` or ``4096``. Raises InputError naming the value."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip(), re.IGNORECASE)
    tokens = int(Fraction(match[1]) * TOKENS[match[2].lower()]) if match else 0
    if tokens < 1:
        raise InputError(f"--context {text!r} is no number of tokens: write it as 32768 or 32k")
    return tokens


def choose_dtype(asked: str | None, config: Any) -> torch.dtype:
    """The dtype asked, else the config's, else bfloat16. Raises InputError for another."""
    import torch

    if asked is not None and asked not in DTYPES:
        raise InputError(f"--dtype {asked!r} is unknown: it is one of {', '.join(DTYPES)}")
    if asked is not None:
        return getattr(torch, asked)
    return config.dtype or config.get_text_config(decoder=True).dtype or torch.bfloat16


def weights_bytes(config: Any, parameters: int, dtype: torch.dtype) -> int:
    """Bytes of a model's weights. Raises InputError where its config stores them in another way, and does not say how many."""
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        raise InputError(
            f"the weights of this checkpoint are quantized ({method}), and its config does not say how many bytes that are: "
            "give --no-weights, and take them off --memory"
        )
    return parameters * dtype.itemsize


def settings(
    made: MemoryPlan, specs: Sequence[str] | None, budgets: Sequence[Asked], quantize: Any
) -> tuple[list[Fit], list[str]]:
    """The full cache, and every policy at every budget; and what was left out, with the reason.

    What the user named is never left out: raises BudgetError and ProfileError for it.
    """
    from winnowkv.policies import names, policy as make_policy, policy_class, resolve

    full = make_policy("full")
    fits, left = [made.fit("full", full, None)], dict[str, list[str]]()
    wanted = specs or ["full", *(name for name in names() if policy_class(name).evicts)]
    policies: dict[str, Policy] = {}
    for spec in wanted:
        try:
            (policy,) = resolve(spec, made.shape.fingerprint, "localization")
        except ProfileError as error:
            if specs:
                raise
            left.setdefault(str(error), []).append(spec)
            continue
        policies[spec] = replace(policy, quantize=quantize) if quantize else policy
    fits += [made.fit(spec, one, None) for spec, one in policies.items() if not one.evicts and one != full]
    notes = [f"left out: {', '.join(who)}: {reason}" for reason, who in left.items()]
    for budget in budgets:
        for spec, one in policies.items():
            try:
                if one.evicts:
                    fits.append(made.fit(spec, one, budget))
            except BudgetError as error:
                if specs:
                    raise
                notes.append(f"left out: {error}")
    return fits, notes


def refuse_impossible(made: MemoryPlan, fits: Sequence[Fit], dtype: str) -> None:
    """Raise InputError with the numbers that would work where no setting fits."""
    if any(fit.fits for fit in fits):
        return
    least = min(fits, key=lambda fit: fit.needed_bytes)
    if made.weights >= made.memory:
        raise InputError(
            f"the weights alone take {size_text(made.weights)} ({made.shape.parameters} parameters in {dtype}), the memory is "
            f"{size_text(made.memory)}: give --memory {enough(least.needed_bytes)} for this request, or --no-weights where "
            "they lie elsewhere"
        )
    most, longest = max(fit.largest_batch for fit in fits), max(fit.largest_context for fit in fits)
    name = least.policy if least.budget is None else f"{least.policy} at {least.budget}"
    ways = [f"--memory {enough(least.needed_bytes)}"]
    ways += [f"--batch {most}"] if most else []
    ways += [f"--context {longest}"] if longest else []
    raise InputError(
        f"{requests(made.batch)} of {made.context} tokens need{'s' if made.batch == 1 else ''} {size_text(least.needed_bytes)}"
        f"{' with the weights' if made.weights else ''} in the smallest setting ({name}), the memory is "
        f"{size_text(made.memory)}: give {' or '.join(ways)}"
    )


def size_text(size: int) -> str:
    """Bytes as one reads them, in the largest binary unit that they fill."""
    letter, unit = unit_of(size)
    return f"{size / unit:.2f} {letter}iB" if letter else f"{size} B"


def enough(size: int) -> str:
    """A value of --memory that holds so many bytes: two decimals, rounded up."""
    letter, unit = unit_of(size)
    return f"{math.ceil(100 * size / unit) / 100:.2f}{letter}iB" if letter else str(size)


def unit_of(size: int) -> tuple[str, int]:
    """The largest binary unit that a size fills, as its letter and its bytes."""
    return next(((letter, 1024**n) for n, letter in zip((4, 3, 2, 1), "TGMK", strict=True) if size >= 1024**n), ("", 1))


def token_bytes(made: MemoryPlan) -> int:
    """What a generated token adds to a request."""
    return made.shape.full_bytes(made.context + 1) - made.shape.full_bytes(made.context)


def summary(made: MemoryPlan, fits: Sequence[Fit], notes: Sequence[str], model: str, dtype: str) -> dict[str, Any]:
    """Everything as plain data; bytes are exact."""
    shape = made.shape
    return {
        "model": model, "dtype": dtype, "context": made.context, "batch": made.batch, "positions": shape.positions,
        "memory_bytes": made.memory, "parameters": shape.parameters, "weights_bytes": made.weights,
        "compressed_layers": len(shape.compressed), "sliding_layers": len(shape.layers) - len(shape.compressed),
        "token_bytes": token_bytes(made), "settings": [asdict(fit) for fit in fits], "notes": list(notes),
    }  # fmt: skip


def show(made: MemoryPlan, fits: Sequence[Fit], notes: Sequence[str], model: str, dtype: str) -> None:
    """The settings as a table, and what a reader must know."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shape, console = made.shape, table_console(130)
    table = Table(
        title=escape(f"{model} in {dtype}: {requests(made.batch)} of {made.context} tokens in {size_text(made.memory)}"),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("budget", justify="right")
    table.add_column("policies", overflow="fold", min_width=16)
    for column in ("entries", "KV of a\nrequest", "of\nfull", "at its\nworst", f"needed\nfor {made.batch}", "fits",
                   "largest\nbatch", "largest\ncontext"):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    whole, rows = fits[0].kept_bytes + fits[0].sliding_bytes, grouped(fits)
    for (names, fit), behind in zip(rows, [*rows[1:], None], strict=True):
        rest = fit.kept_bytes + fit.sliding_bytes
        table.add_row(
            "all" if fit.budget is None else str(fit.budget),
            escape(", ".join(names)) + (f" in {fit.quantize}" if fit.quantize else ""),
            str(fit.entries),
            size_text(rest),
            f"{100 * rest / whole:.1f}%",
            size_text(fit.peak_bytes),
            size_text(fit.needed_bytes),
            "yes" if fit.fits else "no",
            str(fit.largest_batch),
            f"{fit.largest_context} (limit)" if fit.largest_context == shape.positions else str(fit.largest_context),
            end_section=behind is not None and behind[1].budget != fit.budget,
        )
    console.print(table)
    if made.weights:
        print(f"-- {size_text(made.weights)} of weights are counted ({shape.parameters} parameters)")
    if slide := len(shape.layers) - len(shape.compressed):
        windows = " or ".join(map(str, sorted({layer.window for layer in shape.layers if layer.window})))
        print(f"-- {len(shape.compressed)} layers are compressed; {slide} slide over {windows} tokens, which they all keep")
    print(f"-- {WORST}: {size_text(token_bytes(made))} a token and request")
    for note in notes:
        print(f"-- {note}")


def grouped(fits: Sequence[Fit]) -> list[tuple[list[str], Fit]]:
    """Policies that differ in their worst moment only, and not in what fits, as one row with the most that one needs."""
    rows: dict[Fit, list[Fit]] = {}
    for fit in fits:
        rows.setdefault(replace(fit, policy="", peak_bytes=0, needed_bytes=0), []).append(fit)
    return [([fit.policy for fit in same], max(same, key=lambda fit: fit.peak_bytes)) for same in rows.values()]


def requests(batch: int) -> str:
    """A batch in words."""
    return "one request" if batch == 1 else f"{batch} requests"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)
