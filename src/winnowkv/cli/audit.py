"""``winnow audit``: what compression costs on the user's own prompts, no labels needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.cli.options import Budgets, Chat, Data, Json, MaxContext, Model, Out, Policies, budgets as read_budgets
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import table_console


def audit(
    prompts: Annotated[
        list[Path] | None, typer.Option(help='JSONL rows {"prompt": ...}, or a text file as one prompt. May be repeated.')
    ] = None,
    policies: Policies = "winnow,snapkv",
    budgets: Budgets = "0.12,0.25,0.5",
    keep: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Target for the recommendation: part of the full cache's tokens that must stay the same."
        ),
    ] = 0.99,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a continuation.")] = 64,
    model: Model = "embedded",
    max_context: MaxContext = None,
    chat: Chat = None,
    float32: Annotated[
        bool | None,
        typer.Option(
            "--float32/--no-float32",
            help="Compute in float32, so that rounding does not count as disagreement. Default: on the CPU.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks of `winnow eval` whose prompts are added.")] = "",
    data: Data = None,
    skip: Annotated[int, typer.Option(min=0, help="Skip this many prompts of each file and task.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most prompts of each file and task.")] = None,
    curves: Annotated[
        Path | None,
        typer.Option(help="Write the model's profile to this file, with curves for --budget auto measured here."),
    ] = None,
    out: Out = Path("winnow-out/audit"),
    as_json: Json = False,
) -> None:
    """Compare compressed caches with the full one on your own prompts, and name the cheapest that keeps its answers.

    Every compressed cache reads the full cache's greedy continuation. Measured are how often its token is the most
    likely one, the KL divergence of the probabilities, and whether free greedy decoding gives the same answer.
    Writes results.jsonl (a line for each prompt and setting) and summary.json to --out. An interrupted run continues
    where it stopped.
    """
    from winnowkv.evaluate.audit.audit import gather_prompts
    from winnowkv.evaluate.settings import settings
    from winnowkv.policies import split_policies

    names = [name for name in (part.strip() for part in tasks.split(",")) if name]
    found = gather_prompts(prompts or [], names, data, skip, limit)
    specs, asked = list(dict.fromkeys(split_policies(policies))), read_budgets(budgets)
    settings(specs, asked)  # reports unknown policies before the model is loaded
    if curves is not None:
        from winnowkv.evaluate.audit.curves import check_curves

        check_curves(specs, asked)
    measure(
        model=model,
        float32=float32,
        keep=keep,
        out=out,
        as_json=as_json,
        chat=chat,
        prompts=found,
        policies=specs,
        budgets=asked,
        max_new_tokens=max_new_tokens,
        max_context=max_context,
        curves=curves,
    )


def measure(
    *,
    model: str,
    float32: bool | None,
    keep: float,
    out: Path,
    as_json: bool,
    chat: bool | None,
    curves: Path | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Run an audit with a progress bar and print its table and recommendation (or its JSON); returns the summary."""
    from rich.console import Console

    from winnowkv.cli.options import load_model
    from winnowkv.evaluate.audit import audit as auditor
    from winnowkv.evaluate.audit.curves import write_curves
    from winnowkv.evaluate.audit.recommend import write_summary
    from winnowkv.evaluate.report.store import ResultStore
    from winnowkv.prompt.chat import uses_chat

    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model)
    served = loaded.dtype
    if float32 or (float32 is None and loaded.device.type == "cpu"):
        loaded.float()
    test = auditor.Audit(chat=uses_chat(chat, tokenizer), **asked)
    config = test.config(loaded, model, served)
    store = ResultStore(out, config, auditor.identity)
    try:
        with resumable(console, store, "prompts", len(test.expected())) as advance:
            auditor.run(test, loaded, tokenizer, store, advance, served=served)
    finally:
        summary = write_summary(store, test.expected(), keep, config)
        store.close()
    if as_json:
        json.dump(summary, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show(summary, out)
    if curves is not None:  # last: with too few prompts for a curve, the table is still printed
        write_curves(curves, loaded, store.lines, test.expected())
        if not as_json:
            print(f"-- curves for --budget auto:0.95:{curves} are in {curves}")
    return summary


def show(summary: dict[str, Any], out: Path) -> None:
    """Print the settings as a table, notes, and the recommendation."""
    from rich import box
    from rich.table import Table

    from winnowkv.evaluate.audit.recommend import mebibytes, name_of, percent, share_of

    console = table_console()
    machine = summary["machine"]
    table = Table(
        title=f"Audit against the full cache on {machine['processor']}, {machine['threads']} threads",
        caption=f"means over prompts, 95% interval in brackets; files in {out}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("setting", overflow="fold", min_width=24)
    for column in ("prompts", "same token", "KL\nnats/token", "KL, 99th\npercentile", "same answer", "KV MiB\nkept / full"):
        table.add_column(column, justify="right", no_wrap=True)

    for group in summary["groups"]:
        if not group["prompts"]:
            table.add_row(name_of(group), "0", *["-"] * 5)
            continue
        table.add_row(
            name_of(group),
            str(group["prompts"]),
            share_of(group).replace("95% interval ", ""),
            f"{group['kl_mean']['mean']:.3f}",
            f"{group['kl_p99']['mean']:.2f}",
            percent(group["exact_match"]["mean"]),
            " / ".join(mebibytes(group[name]) for name in ("kept_bytes", "full_bytes")),
        )
    console.print(table)
    for note in summary["notes"]:
        print(f"-- {note}")
    print(summary["recommendation"]["sentence"])


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(audit)
