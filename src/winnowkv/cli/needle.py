"""``winnow needle``: the needle-in-a-haystack test over policies, budgets, lengths and depths."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.cli.options import Chat, Factorial, Json, Model, Out, budgets as read_budgets, numbers


def needle(
    model: Model = "embedded",
    policies: Annotated[str, typer.Option(help="Comma-separated; options after colons.")] = "full,snapkv,windowkv",
    budgets: Annotated[str, typer.Option(help="Comma-separated: entries (128) or kept fractions (0.12).")] = "0.12,128",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, template and question included.")] = "3000",
    depths: Annotated[str, typer.Option(help="Where the needle hides: 0 the start of the text, 1 its end.")] = "0.1,0.5,0.9",
    needles: Annotated[
        Path | None, typer.Option(help="JSONL with needle, question, answer. Default: eight of the package.")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(help="A text file or a folder of .txt. Default: the package's essays.")
    ] = None,
    task: Annotated[
        str, typer.Option("--task", help="'localization' or 'aggregation', for policies that ask.")
    ] = "localization",
    chat: Chat = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 24,
    factorial: Factorial = False,
    profile: Annotated[
        Path | None, typer.Option(help="Calibration profile for policies that need one. Default: the package's own.")
    ] = None,
    out: Out = Path("winnow-out/needle"),
    as_json: Json = False,
) -> None:
    """Hide a sentence in a long text and see which policies still find it.

    Writes results.jsonl (a line a measurement), summary.json and needle.png (depth x policy) to --out. A run
    that was stopped goes on where it was: finished lines are never computed twice.
    """
    from winnowkv.evaluate.prompts import read_haystack, read_needles

    measure(
        model=model,
        chat=chat,
        out=out,
        as_json=as_json,
        haystack=read_haystack(haystack),
        policies=asked_policies(policies, factorial, profile),
        budgets=read_budgets(budgets),
        lengths=numbers(lengths, int, "--lengths"),
        depths=numbers(depths, float, "--depths"),
        needles=read_needles(needles),
        task=task,
        max_new_tokens=max_new_tokens,
    )


def asked_policies(text: str, factorial: bool, profile: Path | None = None) -> list[str]:
    """The policies to run: those of the list, or the ablations; with the profile where they need one and name none."""
    from winnowkv.evaluate.factorial import all_specs
    from winnowkv.policies import policy_class, split_policies

    specs = all_specs() if factorial else list(dict.fromkeys(split_policies(text)))
    if profile is None:
        return specs
    needing = {spec for spec in specs if policy_class(spec.split(":")[0]).by_profile and ":profile=" not in spec}
    return [f"{spec}:profile={profile}" if spec in needing else spec for spec in specs]


def measure(
    *, model: str, chat: bool | None, out: Path, as_json: bool, haystack: str, policies: list[str], **asked: Any
) -> dict[str, Any]:
    """Run a needle test behind a progress bar and show its table (or its JSON); returns the summary."""
    from winnowkv.cli.options import load_model, wants_chat
    from winnowkv.evaluate import needle as test_runner
    from winnowkv.evaluate.prompts import PromptBuilder

    test = test_runner.NeedleTest(policies=policies, **asked)
    test.resolved()  # unknown policies are told before the model takes its time to load
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model)
    builder = PromptBuilder(tokenizer, haystack, chat=wants_chat(chat, tokenizer))
    test.check(loaded, builder)
    store = test_runner.open_store(out, loaded, model, builder, haystack, test)
    if store.lines:
        console.print(f"{len(store.lines)} measurements are in {out} already; remove the folder to measure them again")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("needles", total=test.steps())
            test_runner.run(
                test, loaded, tokenizer, builder, store, lambda what: progress.update(bar, advance=1, description=what)
            )
    except KeyboardInterrupt:
        console.print(
            f"interrupted: {len(store.lines)} finished lines are in {store.file}; the same command goes on from there"
        )
        raise
    finally:
        summary = test_runner.write_summary(test, store)
        store.close()
    if as_json:
        json.dump(summary, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show(summary, out)
        show_effects(summary["effects"])
    return summary


def show(summary: dict[str, Any], out: Path) -> None:
    """The result as a table, and where the files are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from winnowkv.report import MIB

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no edge to fold at
    where = summary["machine"]
    table = Table(
        title=f"Needle test on {where['processor']}, {where['threads']} threads",
        caption=f"files in {out}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", overflow="fold", min_width=9)
    for column in ("budget", "tokens", "found", "KV MiB\nkept / full", "prefill\ns", "decode\nms/token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("an example answer", overflow="fold", min_width=16)
    seen_whole = set()
    for group in summary["groups"]:
        everything = group["kept_bytes"] == group["full_bytes"]
        if everything and (group["policy"], group["length"]) in seen_whole:
            continue  # what evicts nothing is the same at every budget
        if everything:
            seen_whole.add((group["policy"], group["length"]))
        pace = group["decode_ms_per_token"]
        table.add_row(
            group["policy"],
            "all" if everything else str(group["budget"]),
            str(group["length"]),
            f"{100 * group['accuracy']:.0f}%",
            f"{group['kept_bytes'] / MIB:.1f} / {group['full_bytes'] / MIB:.1f}",
            f"{group['prefill_s']:.2f}",
            "-" if pace is None else f"{pace:.1f}",
            " ".join(group["example"]["output"].split()),
        )
    console.print(table)


def show_effects(effects: list[dict[str, Any]]) -> None:
    """What each design choice is worth by itself, where ablations were run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not effects:
        return
    table = Table(title="Found at each level, mean over all other choices", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("policy", "choice", "budget", "found"):
        table.add_column(column, overflow="fold")
    for row in effects:
        found = "  ".join(f"{level} {100 * accuracy:.0f}%" for level, accuracy in row["accuracy"].items())
        table.add_row(row["policy"], row["factor"], str(row["budget"]), found)
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(needle)
