"""``winnow audit``: what compression costs on the user's own prompts, no labels needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.cli.options import (
    Budgets,
    Chat,
    Data,
    Json,
    MaxContext,
    Model,
    Out,
    Policies,
    Quality,
    budgets as read_budgets,
    with_quality,
)
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import Column, ResultTable, note, numbers, say


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
    after: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compare the tokens after so many by themselves, too. Default: the largest lookahead.",
            show_default=False,
        ),
    ] = None,
    quality: Quality = None,
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
    from winnowkv.cli.loading import check_file, check_policies
    from winnowkv.policies import split_policies

    specs, asked = with_quality(list(dict.fromkeys(split_policies(policies))), quality), read_budgets(budgets)
    check_policies(specs, asked)  # before transformers is imported, which takes seconds
    from winnowkv.evaluate.audit.audit import gather_prompts

    names = [name for name in (part.strip() for part in tasks.split(",")) if name]
    found = gather_prompts(prompts or [], names, data, skip, limit)
    if curves is not None:
        from winnowkv.evaluate.audit.curves import check_curves

        check_file(curves, "--curves")
        check_curves(specs, asked, len(found))
    measure(
        model=model,
        float32=float32,
        keep=keep,
        after=after,
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
    after: int | None,
    out: Path,
    as_json: bool,
    chat: bool | None,
    curves: Path | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Run an audit with a progress bar and print its table and recommendation (or its JSON); returns the summary."""
    from rich.console import Console

    from winnowkv.calibrate.missing import missing_profile
    from winnowkv.cli.loading import check_folder, load_model
    from winnowkv.evaluate.audit import audit as auditor
    from winnowkv.evaluate.audit.curves import find_base, write_curves
    from winnowkv.evaluate.audit.recommend import write_summary
    from winnowkv.evaluate.report.store import ResultStore
    from winnowkv.models.info import ModelInfo
    from winnowkv.prompt.chat import uses_chat

    def check(checked: Any) -> None:
        auditor.Audit(chat=False, **asked).check(checked)
        if curves is not None:
            find_base(curves, checked, asked["policies"])

    check_folder(out, {"command": "audit", "model": model, "max_new_tokens": asked["max_new_tokens"]})
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model, check)
    served = loaded.dtype
    if float32 or (float32 is None and loaded.device.type == "cpu"):
        loaded.float()
    test = auditor.Audit(chat=uses_chat(chat, tokenizer), **asked)
    config = test.config(loaded, model, served)
    store = ResultStore(out, config, auditor.identity)
    lacking = missing_profile(asked["policies"], ModelInfo.of(loaded), model)
    for sentence in lacking.sentences() if lacking else ():  # before the long run, which another profile would change
        console.print(sentence, markup=False, highlight=False)
    told = {**config, "missing_profile": lacking and lacking.to_dict()}
    try:
        with resumable(console, store, "prompts", len(test.expected())) as advance:
            auditor.run(test, loaded, tokenizer, store, advance, served=served)
    finally:
        summary = write_summary(store, test.expected(), keep, told, after)
        store.close()
    if as_json:
        json.dump(summary, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show(summary, out)
    if curves is not None:  # last: with too few prompts for a curve, the table is still printed
        write_curves(curves, loaded, store.lines, test.expected())
        if not as_json:
            note(f"curves for --budget auto:0.95:{curves} are in {curves}")
    return summary


def show(summary: dict[str, Any], out: Path) -> None:
    """Print the settings as a table, notes, and the recommendation."""
    from winnowkv.evaluate.audit.recommend import mebibytes, name_of, percent

    machine = summary["machine"]
    after = summary["after"]
    said = f"; after {after}: of the tokens after an answer's first {after}" if after else ""
    later = (f"same\nafter {after}", f"KL\nafter {after}") if after else ()
    columns = (
        "prompts", "same\ntoken", "95%\ninterval", "KL\nnats/token", "KL, 99th\npercentile", *later, "same\nanswer",
        "KV MiB\nkept / full",
    )  # fmt: skip
    table = ResultTable(
        [Column("setting", key=True, left=True, short=short_name), *numbers(columns)],
        title=f"Audit against the full cache on {machine['processor']}, {machine['threads']} threads",
        caption=f"means over prompts{said}; files in {out}",
    )
    for group in summary["groups"]:
        if not group["prompts"]:
            table.add(name_of(group), "0", *["-"] * (len(columns) - 1))
            continue
        share = group["agreement"]
        table.add(
            name_of(group),
            str(group["prompts"]),
            percent(share["mean"]),
            "-" if share["low"] is None else f"{percent(share['low'])} to {percent(share['high'])}",
            f"{group['kl_mean']['mean']:.3f}",
            f"{group['kl_p99']['mean']:.2f}",
            *(later_cells(group) if after else ()),
            percent(group["exact_match"]["mean"]),
            " / ".join(mebibytes(group[name]) for name in ("kept_bytes", "full_bytes")),
        )
    table.print()
    for sentence in summary["notes"]:
        note(sentence)
    say(summary["recommendation"]["sentence"], indent=0)


def later_cells(group: dict[str, Any]) -> list[str]:
    """Agreement and KL divergence after the lookahead; no answer may be so long."""
    from winnowkv.evaluate.audit.recommend import percent

    if not group["prompts_after"]:
        return ["-", "-"]
    return [percent(group["agreement_after"]["mean"]), f"{group['kl_after']['mean']:.3f}"]


def short_name(setting: str) -> str:
    """``snapkv at 12%`` for ``snapkv:observe=16 at 12%``."""
    spec, at, budget = setting.partition(" at ")
    return f"{spec.split(':')[0]}{at}{budget}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(audit)
