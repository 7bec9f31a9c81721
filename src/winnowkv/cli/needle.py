"""``winnow needle``: the needle-in-a-haystack test over policies, budgets, lengths and depths."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.cli.options import (
    Budgets,
    Chat,
    Factorial,
    Haystack,
    Json,
    Model,
    Out,
    Policies,
    Profile,
    Quality,
    budgets as read_budgets,
    fraction_list,
    numbers,
    task_name,
    with_quality,
)
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import Column, ResultTable, keys, note, numbers as number_columns
from winnowkv.errors import InputError

NEW_TOKENS_PER_ANSWER = 24


def needle(
    model: Model = "embedded",
    policies: Policies = "full,winnow,snapkv",
    budgets: Budgets = "0.12,128",
    lengths: Annotated[
        str,
        typer.Option(
            help="Comma-separated prompt lengths in tokens, template and question included; 'max' is the model's limit."
        ),
    ] = "3000",
    depths: Annotated[str, typer.Option(help="Depths of the needle: 0 is the start of the text, 1 its end.")] = "0.1,0.5,0.9",
    variant: Annotated[
        str, typer.Option(help="'single', 'multi' (several needles in one question) or 'multi-hop' (a chain of facts).")
    ] = "single",
    count: Annotated[
        int | None, typer.Option(help="Needles in a prompt of --variant multi. Default: 3.", show_default=False)
    ] = None,
    needles: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with needle, question, answer (multi-hop: needles, question, answer). Default: the package's."
        ),
    ] = None,
    haystack: Haystack = None,
    task: Annotated[
        str,
        typer.Option("--task", callback=task_name, help="'localization' or 'aggregation', for policies that score by task."),
    ] = "localization",
    chat: Chat = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most new tokens of an answer. Default: 24, times the needles of --variant multi.", show_default=False
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Score shown in the pictures: correct, found, rouge1_f1 or rouge1_recall.")
    ] = "correct",
    time: Annotated[bool, typer.Option("--time", help="Decode every setting alone and report its ms/token; slower.")] = False,
    factorial: Factorial = False,
    quality: Quality = None,
    profile: Profile = None,
    out: Out = Path("winnow-out/needle"),
    as_json: Json = False,
) -> None:
    """Hide a sentence, or several, in a long text and see which policies still find it.

    Writes to --out results.jsonl (a line for each measurement), summary.json, needle.png (length x depth maps of each
    policy and budget) and needle_kept.png (scores against the kept fraction). An interrupted run continues where it
    stopped: finished lines are not repeated.
    """
    from winnowkv.cli.loading import check_policies
    from winnowkv.evaluate.needle.prompts import read_haystack, read_variant

    specs, asked = with_quality(asked_policies(policies, factorial, profile), quality), read_budgets(budgets)
    check_policies(specs, asked)  # before transformers is imported, which takes seconds
    hidden = read_variant(variant, needles, count)
    measure(
        model=model,
        chat=chat,
        out=out,
        as_json=as_json,
        haystack=read_haystack(haystack),
        policies=specs,
        budgets=asked,
        lengths=numbers(lengths, length, "--lengths"),
        depths=fraction_list(depths, "--depths"),
        needles=hidden,
        variant=variant,
        task=task,
        max_new_tokens=max_new_tokens or NEW_TOKENS_PER_ANSWER * len(hidden[0].answers),
        metric=metric,
        timed=time,
    )


def length(text: str) -> int | str:
    """Parse a length in tokens, or ``max``. Raises ValueError for other texts, InputError for less than 1."""
    if text != "max" and int(text) < 1:
        raise InputError(f"--lengths: {text} is too short: a prompt has at least 1 token")
    return text if text == "max" else int(text)


def asked_policies(text: str, factorial: bool, profile: Path | None = None) -> list[str]:
    """The policy specs to run, or the ablations; those that need a profile and name none get ``profile``."""
    from winnowkv.policies import policy as make_policy, split_policies

    if factorial:
        from winnowkv.evaluate.needle.factorial import all_specs

    specs = all_specs() if factorial else list(dict.fromkeys(split_policies(text)))
    if profile is None:
        return specs
    needing = {spec for spec in specs if make_policy(spec).needs_profile and ":profile=" not in spec}
    return [f"{spec}:profile={profile}" if spec in needing else spec for spec in specs]


def measure(
    *,
    model: str,
    chat: bool | None,
    out: Path,
    as_json: bool,
    haystack: str,
    policies: list[str],
    lengths: Sequence[int | str],
    metric: str,
    show: Callable[[dict[str, Any], Path], None] | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Run a needle test with a progress bar and print its table (or its JSON); returns the summary.

    ``show`` prints the summary in place of the tables of this command.
    """
    from winnowkv.cli.loading import check_folder, check_policies, load_model, require
    from winnowkv.evaluate.needle import needle as test_runner
    from winnowkv.evaluate.needle.prompts import PromptBuilder
    from winnowkv.prompt.chat import uses_chat

    test = test_runner.NeedleTest(policies=policies, lengths=[], **asked)
    check_policies(policies, test.budgets)
    test_runner.check_metric(metric)
    require("a needle test", "matplotlib", "rouge-score")
    check_folder(out, {"model": model, "task": test.task, "variant": test.variant, "max_new_tokens": test.max_new_tokens})

    def check(checked: Any) -> None:
        fitted = test_runner.fit_lengths(lengths, checked, test.max_new_tokens)
        replace(test, lengths=fitted).check_model(checked)

    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model, check)
    test = replace(test, lengths=test_runner.fit_lengths(lengths, loaded, test.max_new_tokens))
    builder = PromptBuilder(tokenizer, haystack, chat=uses_chat(chat, tokenizer))
    test.check(loaded, builder)
    store = test_runner.open_store(out, loaded, model, builder, haystack, test)
    try:
        with resumable(console, store, "needles", test.steps()) as advance:
            test_runner.run(test, loaded, tokenizer, builder, store, advance)
    finally:
        summary = test_runner.write_summary(test, store, metric)
        store.close()
    if as_json:
        json.dump(summary, sys.stdout, indent=2, ensure_ascii=False)
        print()
    elif show is not None:
        show(summary, out)
    else:
        show_table(summary, out)
        show_effects(summary["effects"])
    return summary


def show_table(summary: dict[str, Any], out: Path) -> None:
    """Print the result as a table, and the folder of the files."""
    from winnowkv.report import MIB

    machine = summary["machine"]
    left_out = f"{summary['failed']} measurements failed and are left out; " if summary["failed"] else ""
    columns = ("found", "ROUGE-1\nF1 / recall", "KV MiB\nkept / full", "prefill\ns", "decode\nms/token")
    table = ResultTable(
        [*keys("policy", "budget", "tokens"), *number_columns(columns), Column("example answer", least=16)],
        title=f"Needle test ({summary['variant']}) on {machine['processor']}, {machine['threads']} threads",
        caption=f"{left_out}files in {out}",
    )
    shown = set()
    for group in summary["groups"]:
        everything = not group["evicts"]
        if everything and (group["policy"], group["length"]) in shown:
            continue  # a policy that evicts nothing is the same at every budget
        shown.add((group["policy"], group["length"]))
        pace = group["decode_ms_per_token"]
        table.add(
            group["policy"],
            "all" if everything else str(group["budget"]),
            str(group["length"]),
            found_text(group, summary["variant"]),
            f"{group['rouge1_f1']:.2f} / {group['rouge1_recall']:.2f}",
            f"{group['kept_bytes'] / MIB:.1f} / {group['full_bytes'] / MIB:.1f}",
            f"{group['prefill_s']:.2f}",
            "-" if pace is None else f"{pace:.1f}",
            " ".join(group["example"]["output"].split()),
        )
    table.print()
    for sentence in whole_notes(summary["groups"]):
        note(sentence)


def whole_notes(groups: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each policy some of whose answers ended before anything was evicted."""
    whole: dict[str, int] = {}
    every: dict[str, int] = {}
    for group in groups:
        whole[group["policy"]] = whole.get(group["policy"], 0) + group.get("whole_answers", 0)
        every[group["policy"]] = every.get(group["policy"], 0) + group["cases"]
    return [
        f"{policy}: {count} of {every[policy]} answers ended before anything was evicted, and count with the whole cache"
        for policy, count in whole.items()
        if count
    ]


def found_text(group: dict[str, Any], variant: str) -> str:
    """Share of prompts answered completely; for several needles also the share of needles found."""
    part = f" ({100 * group['found']:.0f}% of needles)" if variant == "multi" else ""
    return f"{100 * group['accuracy']:.0f}%{part}"


def show_effects(effects: list[dict[str, Any]]) -> None:
    """Print the mean score at each level of each design choice, if ablations were run."""
    if not effects:
        return
    columns = [*keys("policy", "choice", "budget"), Column("found", least=24)]
    table = ResultTable(columns, "Found at each level, mean over all other choices")
    for row in effects:
        found = "  ".join(f"{level} {100 * accuracy:.0f}%" for level, accuracy in row["accuracy"].items())
        table.add(row["policy"], row["factor"], str(row["budget"]), found)
    table.print()


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(needle)
