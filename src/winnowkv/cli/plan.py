"""``winnow plan``: how much memory keys and values need, and what fits, from a model's config alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnowkv.cli.options import (
    DTYPES,
    POLICIES_HELP,
    Budgets,
    Json,
    Quality,
    budgets as read_budgets,
    dtype_of,
    model_name,
    token_count,
    with_quality,
)
from winnowkv.cli.tables import Column, ResultTable, note, numbers
from winnowkv.errors import BudgetError, InputError, ProfileError
from winnowkv.memory.sizes import read_size

if TYPE_CHECKING:
    import torch

    from winnowkv.budget import Asked
    from winnowkv.memory.plan import Fit, MemoryPlan
    from winnowkv.policies import Policy

QUANTIZATIONS = ("none", "int8", "int4")
LOOKING_NOTE = (
    "a policy with lookahead, draft or refit holds the whole prompt, the lookahead's tokens and the queries that it chooses by "
    "until it has chosen, a draft its compact copy, too: that is its peak; one request looks while the others rest"
)
PEAK_NOTE = (
    "at its peak a request holds one whole layer, and of the layers before it what the policy may hold; prompts are read one "
    "at a time; activations and generated tokens come on top"
)


def plan(
    context: Annotated[str, typer.Option(help="Prompt tokens of a request: 32768, or 32k (1k is 1024).")],
    memory: Annotated[
        str,
        typer.Option(help="Memory of all devices together: 24GiB, 24GB, 512MiB, or a number of bytes."),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", callback=model_name, help="'embedded', a folder, a config.json, or a hub id; weights are not needed."
        ),
    ] = "embedded",
    batch: Annotated[int, typer.Option(min=1, help="Requests held at once.")] = 1,
    policies: Annotated[
        str | None,
        typer.Option(help=f"{POLICIES_HELP}. Default: all that evict. The full cache is always shown."),
    ] = None,
    budgets: Budgets = "0.12,0.25,0.5",
    quantize: Annotated[str, typer.Option(help="Store kept entries in int8 or int4. none: as the policies do.")] = "none",
    dtype: Annotated[
        str | None,
        typer.Option(
            callback=dtype_of,
            help=f"Dtype of weights, keys and values: {', '.join(DTYPES)}. Default: the config's, else bfloat16.",
        ),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Count the weights as part of the memory.")] = True,
    quality: Quality = None,
    as_json: Json = False,
) -> None:
    """Show how many bytes of keys and values requests need, which settings fit, and the largest batch and context.

    A request is its prompt; generated tokens and activations come on top. Prompts are read one at a time. While a
    prompt is read, the current layer holds all of it until its attention is computed; the layers before it hold what
    the policy's prefill limits allow: what they end with, or more for policies that decide later.
    With lookahead, draft or refit a request holds its whole prompt until it has chosen, and the lookahead's tokens.
    Sliding-window layers are never compressed.
    Policies that score by task are counted for localization. Policies with a budget for each head (adakv, headkv) pad
    the heads of a layer to the longest; that depends on the prompt and is not counted.

    winnow plan --model Qwen/Qwen2.5-7B-Instruct --context 32k --batch 8 --memory 24GiB
    """
    tokens, room, asked = token_count(context, "--context"), read_size(memory), read_budgets(budgets)
    if quantize not in QUANTIZATIONS:
        raise InputError(f"--quantize {quantize!r} is unknown: it is one of {', '.join(QUANTIZATIONS)}")
    from winnowkv.cli.loading import check_policies
    from winnowkv.policies import split_policies

    if quality is not None and policies is None:
        raise InputError(f"--quality {quality} needs the policies that it is for: give --policies winnow")
    specs = None if policies is None else with_quality(list(dict.fromkeys(split_policies(policies))), quality)
    check_policies(specs or [], asked)  # before transformers is imported, which takes seconds
    from winnowkv.calibrate.missing import missing_profile
    from winnowkv.memory.plan import MemoryPlan
    from winnowkv.memory.shape import read_shape
    from winnowkv.models.load import dtype_name, load_config

    config = load_config(model)
    number = choose_dtype(dtype, config)
    shape = read_shape(config, number.itemsize)
    made = MemoryPlan(shape, tokens, batch, room, weights_bytes(config, shape.parameters, number) if weights else 0)
    fits, notes = settings(made, specs, asked, None if quantize == "none" else quantize)
    lacking = missing_profile(specs or evicting(), shape.model_info, model)
    refuse_impossible(made, fits, dtype_name(number))
    if as_json:
        found = summary(made, fits, notes, model, dtype_name(number))
        json.dump({**found, "missing_profile": lacking and lacking.to_dict()}, sys.stdout, indent=2)
        print()
    else:
        notes += lacking.sentences() if lacking else []
        show(made, fits, notes, model, dtype_name(number))


def choose_dtype(asked: str | None, config: Any) -> torch.dtype:
    """The dtype of ``--dtype``, else the config's, else bfloat16. Raises InputError for an unknown one."""
    import torch

    if asked is not None and asked not in DTYPES:
        raise InputError(f"--dtype {asked!r} is unknown: it is one of {', '.join(DTYPES)}")
    if asked is not None:
        named: torch.dtype = getattr(torch, asked)
        return named
    stated: torch.dtype | None = config.dtype or config.get_text_config(decoder=True).dtype
    return stated or torch.bfloat16


def weights_bytes(config: Any, parameters: int, dtype: torch.dtype) -> int:
    """Bytes of a model's weights. Raises InputError if they are quantized: the config does not say how many bytes they take."""
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        raise InputError(
            f"the weights of this checkpoint are quantized ({method}), and its config does not say how many bytes they take: "
            "give --no-weights, and subtract them from --memory"
        )
    return parameters * dtype.itemsize


def settings(
    made: MemoryPlan, specs: Sequence[str] | None, budgets: Sequence[Asked], quantize: Any
) -> tuple[list[Fit], list[str]]:
    """The full cache and every policy at every budget, and notes on what was left out.

    Policies that the user named are never left out: raises BudgetError and ProfileError for them.
    """
    from winnowkv.policies import policy as make_policy
    from winnowkv.prompt.task import TaskProfile

    full, task = make_policy("full"), TaskProfile.of("localization")
    fits, left = [made.fit("full", full, None)], dict[str, list[str]]()
    wanted = specs or ["full", *evicting()]
    policies: dict[str, Policy] = {}
    for spec in wanted:
        try:
            policy = make_policy(spec)
            policy.check(made.shape.model_info, task)
        except ProfileError as error:
            if specs:
                raise
            left.setdefault(str(error), []).append(spec)
            continue
        policies[spec] = policy.stored_as(quantize) if quantize else policy
    fits += [made.fit(spec, one, None, task) for spec, one in policies.items() if not one.evicts and one != full]
    notes = [f"left out: {', '.join(who)}: {reason}" for reason, who in left.items()]
    too_small: dict[str, list[str]] = {}  # wrappers have the budgets of the policy that they change
    for budget in budgets:
        for spec, one in policies.items():
            try:
                if one.evicts:
                    fits.append(made.fit(spec, one, budget, task))
            except BudgetError as error:
                if specs:
                    raise
                too_small.setdefault(str(error), []).append(spec)
    for reason, who in too_small.items():
        notes.append(f"left out: {', '.join(who)}: {reason}" if len(who) > 1 else f"left out: {reason}")
    return fits, notes


def evicting() -> list[str]:
    """The names of all policies that evict something."""
    from winnowkv.policies import names, policy as make_policy

    return [name for name in names() if make_policy(name).evicts]


def refuse_impossible(made: MemoryPlan, fits: Sequence[Fit], dtype: str) -> None:
    """Raise InputError, with numbers that would work, if no setting fits."""
    if any(fit.fits for fit in fits):
        return
    least = min(fits, key=lambda fit: fit.needed_bytes)
    if made.weights >= made.memory:
        raise InputError(
            f"the weights alone take {size_text(made.weights)} ({made.shape.parameters} parameters in {dtype}), the memory is "
            f"{size_text(made.memory)}: give --memory {enough(least.needed_bytes)} for this request, or --no-weights if "
            "they are in other memory"
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
    """Bytes as text, in the largest binary unit that they fill."""
    letter, unit = unit_of(size)
    return f"{size / unit:.2f} {letter}iB" if letter else f"{size} B"


def enough(size: int) -> str:
    """A value of --memory that is enough for a size: two decimals, rounded up."""
    letter, unit = unit_of(size)
    return f"{math.ceil(100 * size / unit) / 100:.2f}{letter}iB" if letter else str(size)


def unit_of(size: int) -> tuple[str, int]:
    """The largest binary unit that a size fills, as its letter and its bytes."""
    return next(((letter, 1024**n) for n, letter in zip((4, 3, 2, 1), "TGMK", strict=True) if size >= 1024**n), ("", 1))


def token_bytes(made: MemoryPlan) -> int:
    """Bytes that a generated token adds to a request."""
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
    """Print the settings as a table, and notes."""
    shape = made.shape
    columns = ("entries", "KV of a\nrequest", "of\nfull", "at its\npeak", f"needed\nfor {made.batch}", "fits",
               "largest\nbatch", "largest\ncontext")  # fmt: skip
    policies = Column("policies", key=True, least=16, short=first_of)
    table = ResultTable(
        [Column("budget", key=True), policies, *numbers(columns)],
        f"{model} in {dtype}: {requests(made.batch)} of {made.context} tokens in {size_text(made.memory)}",
    )
    whole, rows = fits[0].kept_bytes + fits[0].sliding_bytes, grouped(fits)
    for (names, fit), following in zip(rows, [*rows[1:], None], strict=True):
        rest = fit.kept_bytes + fit.sliding_bytes
        table.add(
            "all" if fit.budget is None else str(fit.budget),
            ", ".join(names) + (f" in {fit.quantize}" if fit.quantize else ""),
            str(fit.entries),
            size_text(rest),
            f"{100 * rest / whole:.1f}%",
            size_text(fit.peak_bytes),
            size_text(fit.needed_bytes),
            "yes" if fit.fits else "no",
            str(fit.largest_batch),
            f"{fit.largest_context} (limit)" if fit.largest_context == shape.positions else str(fit.largest_context),
        )
        if following is not None and following[1].budget != fit.budget:
            table.section()
    table.print()
    if made.weights:
        note(f"{size_text(made.weights)} of weights are counted ({shape.parameters} parameters)")
    if slide := len(shape.layers) - len(shape.compressed):
        windows = " or ".join(map(str, sorted({layer.window for layer in shape.layers if layer.window})))
        note(f"{len(shape.compressed)} layers are compressed; {slide} keep all of a sliding window of {windows} tokens")
    if any(fit.looking_bytes for fit in fits):
        note(LOOKING_NOTE)
    note(f"{PEAK_NOTE}: {size_text(token_bytes(made))} a token and request")
    for sentence in notes:
        note(sentence)


def first_of(policies: str) -> str:
    """``adakv + 17`` for 18 policies."""
    first, *more = policies.split(", ")
    return f"{first.split(':')[0]} + {len(more)}" if more else first.split(":")[0]


def grouped(fits: Sequence[Fit]) -> list[tuple[list[str], Fit]]:
    """Rows of the table: policies that differ only in their peak are one row, with the highest peak."""
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
