"""``winnow bench``: seconds and bytes of compressed caches next to transformers' own, and whether the targets are met."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.cli.options import Chat, Json, Model, Out, budgets as read_budgets, load_model, numbers
from winnowkv.cli.plan import read_tokens
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import table_console
from winnowkv.memory.sizes import read_size
from winnowkv.prompt.chat import uses_chat

Spread = dict[str, float]


def bench(
    policies: Annotated[str, typer.Option(help="Comma-separated; options after colons.")] = "winnow,snapkv",
    budgets: Annotated[str, typer.Option(help="Comma-separated: entries (128) or kept fractions (0.12).")] = "0.12",
    contexts: Annotated[str, typer.Option(help="Prompt tokens: 4096, or 4k (k is 1024).")] = "1k,2k,4k,8k",
    batches: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of prefills at each context.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each cache, in turns.")] = 40,
    kv_memory: Annotated[str, typer.Option(help="Keys and values that an engine may hold: 256MiB, 1GiB.")] = "256MiB",
    serve_context: Annotated[str, typer.Option(help="Prompt tokens of the requests that are to fit in it.")] = "4k",
    new_tokens: Annotated[int, typer.Option(help="New tokens of each of them.")] = 128,
    requests: Annotated[
        int, typer.Option(min=0, help="Short requests in a row, to see whether memory grows; 0 leaves it out.")
    ] = 500,
    compile: Annotated[bool, typer.Option("--compile", help="Measure compiled decode steps, too.")] = False,
    model: Model = "embedded",
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Only the config of --model, a config.json will do: speed without a download."),
    ] = False,
    chat: Chat = None,
    haystack: Annotated[
        Path | None, typer.Option(help="Text that prompts are made of: a file or a folder. Default: the package's essays.")
    ] = None,
    out: Out = Path("winnow-out/bench"),
    as_json: Json = False,
) -> None:
    """Measure prefill, compression, decoding, throughput and memory, each next to plain transformers in the same process.

    What a ratio compares is timed in turns; numbers are medians, ratios medians of pairs. A prompt that would leave new tokens
    no positions in the model is shortened by as many. Writes to --out results.jsonl (a line a measurement), bench.json,
    decode.png (ms a token against the context) and throughput.png (tokens a second against KV memory). A run that was
    stopped goes on where it was: finished measurements are never taken twice.
    """
    from winnowkv.policies import split_policies

    measure(
        model=model,
        random_weights=random_weights,
        chat=chat,
        haystack=haystack,
        out=out,
        as_json=as_json,
        policies=list(dict.fromkeys(split_policies(policies))),
        budgets=read_budgets(budgets),
        contexts=numbers(contexts, read_tokens, "--contexts"),
        batches=numbers(batches, int, "--batches"),
        rounds=rounds,
        steps=steps,
        kv_memory=read_size(kv_memory, "--kv-memory"),
        serve_context=numbers(serve_context, read_tokens, "--serve-context")[0],
        new_tokens=new_tokens,
        requests=requests,
        compile=compile,
    )


def measure(
    *,
    model: str,
    random_weights: bool,
    chat: bool | None,
    haystack: Path | None,
    out: Path,
    as_json: bool,
    policies: Sequence[str],
    budgets: Sequence[Any],
    **asked: Any,
) -> dict[str, Any]:
    """Run a bench behind a progress bar and show its tables (or its JSON); returns the summary."""
    from rich.console import Console

    from winnowkv.evaluate.bench import bench as runner
    from winnowkv.evaluate.bench.bars import write_summary
    from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack
    from winnowkv.evaluate.settings import settings

    test = runner.Bench(settings(policies, budgets), **asked)  # unknown policies are told before the model takes its time
    text = read_haystack(haystack)
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model, random=random_weights)
    if random_weights:
        model += ", random weights"
    builder = PromptBuilder(tokenizer, text, chat=uses_chat(chat, tokenizer))
    test.check(loaded, builder)
    store = runner.open_store(out, loaded, model, builder, test)
    try:
        with resumable(console, store, "cells", len(test.cells())) as advance:
            runner.run(test, loaded, tokenizer, builder, text, store, advance)
    finally:
        summary = write_summary(test, store, model)
        store.close()
    if as_json:
        json.dump(summary, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        show(summary, out)
    return summary


def show(summary: dict[str, Any], out: Path) -> None:
    """Every kind of measurement as a table, the targets as lines, and where the files are."""
    console, where = table_console(), summary["machine"]
    print(f"{summary['model']} on {where['accelerator'] or where['processor']}, {where['threads']} threads; files in {out}")
    for table in (prefill_table(summary), decode_table(summary), serve_table(summary)):
        if table.row_count:
            console.print(table)
    for line in [line for name in ("decode", "serve", "growth") for line in summary[name]]:
        for reason in reasons(line):
            print(f"-- left out at {line.get('context', 'short prompts')}, {line['policy']}: {reason}")
    for note in summary["notes"]:
        print(f"-- {note}")
    for target in summary["bars"]:
        print(bar_text(target))


def bar_text(target: dict[str, Any]) -> str:
    """A target as one line: name, value, what it should be, and whether it is."""
    if target["met"] is None:
        return f"{target['name']}: not measured (target {target['target']})"
    return f"{target['name']}: {target['value']:.3f} (target {target['target']}): {'met' if target['met'] else 'not met'}"


def reasons(line: dict[str, Any]) -> list[str]:
    """Why parts of a measurement, or all of it, were left out."""
    skipped = line.get("skipped") or []
    return [skipped] if isinstance(skipped, str) else [f"{name}: {skipped[name]}" for name in skipped]


def prefill_table(summary: dict[str, Any]) -> Any:
    """Reading and compressing a prompt, against reading it."""
    columns = (
        "prefill\ns",
        "over plain\n(quartiles)",
        "least - most",
        "compression\ns",
        "KV MiB\nkept / full",
        "peak MiB\nours / plain",
    )
    table = new_table("Prefill, median of pairs with plain transformers", ("policy", "budget", "tokens"), columns)
    for line in summary["prefill"]:
        ratio = line["over_plain"]
        table.add_row(
            line["policy"], str(line["budget"]), str(line["prompt_tokens"]), f"{line['prefill_s']['median']:.3f}",
            quartiles(ratio), f"{ratio['least']:.2f} - {ratio['most']:.2f}",
            f"{line['compress_s']['median']:.4f}", f"{mib(line['kept_bytes'])} / {mib(line['full_bytes'])}",
            f"{mib(line['peak_memory'])} / {mib(line['plain_peak_memory'])}",
        )  # fmt: skip
    return table


def decode_table(summary: dict[str, Any]) -> Any:
    """Decode steps of every cache, a row each."""
    columns = ("batch", "ms a step\n(quartiles)", "ours over it", "tokens/s", "KV MiB")
    table = new_table("Decode, steps in turns", ("policy", "budget", "tokens", "cache"), columns)
    for line in summary["decode"]:
        for name, took in line.get("ms", {}).items():
            over = line["over"].get(name)
            table.add_row(
                line["policy"], str(line["budget"]), str(line["prompt_tokens"]), name, str(line["batch"]), quartiles(took, 1),
                "" if over is None else quartiles(over), f"{line['tokens_s'][name]:.1f}", mib(line["kv_bytes"][name]),
            )  # fmt: skip
        table.add_section()
    return table


def serve_table(summary: dict[str, Any]) -> Any:
    """What an engine serves in a given KV memory, against the full cache."""
    columns = ("KV memory\nMiB", "requests\nours / full", "tokens/s\nours", "tokens/s\nfull", "speed-up\n(quartiles)")
    table = new_table("Decode in a given KV memory", ("policy", "budget", "tokens", "steps"), columns)
    for line in summary["serve"]:
        pace = [f"{line[name]['median']:.1f}" if name in line else "-" for name in ("tokens_s", "plain_tokens_s")]
        table.add_row(
            line["policy"], str(line["budget"]), str(line["prompt_tokens"]), "compiled" if line["compiled"] else "eager",
            mib(line["kv_memory"]), f"{line.get('fits', '-')} / {line['plain_fits']}", *pace,
            quartiles(line["speedup"], 2) if "speedup" in line else "-",
        )  # fmt: skip
    return table


def new_table(title: str, left: Iterable[str], right: Iterable[str]) -> Any:
    """An empty table with text columns and number columns."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def quartiles(values: Spread, digits: int = 3) -> str:
    """A median with its quartiles."""
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f} - {values['high']:.{digits}f})"


def mib(size: int | None) -> str:
    """Bytes in MiB; a dash where nobody knows."""
    from winnowkv.report import MIB

    return "-" if size is None else f"{size / MIB:.1f}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)
