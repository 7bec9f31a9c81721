"""``winnow bench``: seconds and bytes of compressed caches next to transformers' own, and whether targets are met."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.cli.options import (
    DEFAULT_BUDGETS,
    Budgets,
    Chat,
    Haystack,
    Json,
    Model,
    Out,
    Policies,
    budgets as read_budgets,
    numbers,
    token_count,
)
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import ResultTable, keys, note, numbers as number_columns, say
from winnowkv.memory.sizes import read_size

Spread = dict[str, float]


def bench(
    policies: Policies = "winnow,snapkv",
    budgets: Budgets = DEFAULT_BUDGETS,
    contexts: Annotated[
        str, typer.Option(help="Comma-separated prompt lengths in tokens: 4096, or 4k (1k is 1024).")
    ] = "1k,2k,4k,8k",
    batches: Annotated[str, typer.Option(help="Comma-separated numbers of requests that decode together.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of prefills at each context.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps of each cache, in turns.")] = 40,
    kv_memory: Annotated[str, typer.Option(help="Bytes of keys and values that an engine may hold: 256MiB, 1GiB.")] = "256MiB",
    serve_context: Annotated[str, typer.Option(help="Prompt tokens of the requests in --kv-memory.")] = "4k",
    new_tokens: Annotated[int, typer.Option(help="New tokens of each request in --kv-memory.")] = 128,
    requests: Annotated[
        int, typer.Option(min=0, help="Short requests in a row, to see whether memory grows; 0 skips this.")
    ] = 500,
    compile: Annotated[bool, typer.Option("--compile", help="Also measure compiled decode steps.")] = False,
    model: Model = "embedded",
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Use random weights of --model's config (a config.json is enough): speed without a download.",
        ),
    ] = False,
    chat: Chat = None,
    haystack: Haystack = None,
    out: Out = Path("winnow-out/bench"),
    as_json: Json = False,
) -> None:
    """Measure prefill, compression, decoding, throughput and memory, each next to plain transformers in the same process.

    All parts of a ratio are timed in turns; numbers are medians, ratios are medians of pairs. A prompt is shortened if the
    model has no positions for it and its new tokens. Writes to --out results.jsonl (a line for each measurement),
    bench.json, decode.png (ms/token against the context) and throughput.png (tokens/s against KV memory). An interrupted
    run continues where it stopped: finished measurements are not repeated.
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
        contexts=numbers(contexts, partial(token_count, option="--contexts"), "--contexts"),
        batches=numbers(batches, int, "--batches"),
        rounds=rounds,
        steps=steps,
        kv_memory=read_size(kv_memory, "--kv-memory"),
        serve_context=token_count(serve_context, "--serve-context"),
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
    """Run a bench with a progress bar and print its tables (or its JSON); returns the summary."""
    from rich.console import Console

    from winnowkv.cli.loading import check_folder, check_policies, load_model, require

    check_policies(policies, budgets)  # before transformers is imported, which takes seconds
    from winnowkv.evaluate.bench import bench as runner
    from winnowkv.evaluate.bench.summary import write_summary
    from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack
    from winnowkv.evaluate.settings import settings
    from winnowkv.prompt.chat import uses_chat

    test = runner.Bench(settings(policies, budgets), **asked)
    text = read_haystack(haystack)
    require("winnow bench", "matplotlib")
    name = f"{model}, random weights" if random_weights else model
    check_folder(out, {"model": name, **{key: asked[key] for key in ("rounds", "steps", "new_tokens", "requests")}})
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model, test.check_model, random=random_weights)
    model = name
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
    """Print a table for each kind of measurement, the targets as lines, and the folder of the files."""
    machine = summary["machine"]
    say(f"{summary['model']} on {machine['accelerator'] or machine['processor']}, {machine['threads']} threads; files in {out}")
    for table in (prefill_table(summary), decode_table(summary), serve_table(summary)):
        if table.rows:
            table.print()
            print()
    for line in [line for name in ("decode", "serve", "growth") for line in summary[name]]:
        for reason in reasons(line):
            note(f"left out at {line.get('context', 'short prompts')}, {line['policy']}: {reason}")
    for sentence in summary["notes"]:
        note(sentence)
    for target in summary["bars"]:
        say(target_text(target))


def target_text(target: dict[str, Any]) -> str:
    """A target as one line: name, value, limit, and whether it is met."""
    if target["met"] is None:
        return f"{target['name']}: not measured (target {target['target']})"
    return f"{target['name']}: {target['value']:.3f} (target {target['target']}): {'met' if target['met'] else 'not met'}"


def reasons(line: dict[str, Any]) -> list[str]:
    """The reasons why a measurement, or parts of it, were left out."""
    skipped = line.get("skipped") or []
    return [skipped] if isinstance(skipped, str) else [f"{name}: {skipped[name]}" for name in skipped]


def prefill_table(summary: dict[str, Any]) -> ResultTable:
    """Table of reading and compressing a prompt, against transformers' prefill."""
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
        table.add(
            line["policy"], str(line["budget"]), str(line["prompt_tokens"]), f"{line['prefill_s']['median']:.3f}",
            quartiles(ratio), f"{ratio['least']:.2f} - {ratio['most']:.2f}",
            f"{line['compress_s']['median']:.4f}", f"{mib(line['kept_bytes'])} / {mib(line['full_bytes'])}",
            f"{mib(line['peak_memory'])} / {mib(line['plain_peak_memory'])}",
        )  # fmt: skip
    return table


def decode_table(summary: dict[str, Any]) -> ResultTable:
    """Table of decode steps, a row for each cache."""
    columns = ("ms/step\n(quartiles)", "ours over it", "tokens/s", "KV MiB")
    table = new_table("Decode, steps in turns", ("policy", "budget", "tokens", "batch", "cache"), columns)
    for line in summary["decode"]:
        for name, took in line.get("ms", {}).items():
            over = line["over"].get(name)
            table.add(
                line["policy"], str(line["budget"]), str(line["prompt_tokens"]), str(line["batch"]), name, quartiles(took, 1),
                "" if over is None else quartiles(over), f"{line['tokens_s'][name]:.1f}", mib(line["kv_bytes"][name]),
            )  # fmt: skip
        table.section()
    return table


def serve_table(summary: dict[str, Any]) -> ResultTable:
    """Table of what an engine serves in a given KV memory, against the full cache."""
    columns = ("KV memory\nMiB", "requests\nours / full", "tokens/s\nours", "tokens/s\nfull", "speed-up\n(quartiles)")
    table = new_table("Decode in a given KV memory", ("policy", "budget", "tokens", "steps"), columns)
    for line in summary["serve"]:
        pace = [f"{line[name]['median']:.1f}" if name in line else "-" for name in ("tokens_s", "plain_tokens_s")]
        table.add(
            line["policy"], str(line["budget"]), str(line["prompt_tokens"]), "compiled" if line["compiled"] else "eager",
            mib(line["kv_memory"]), f"{line.get('fits', '-')} / {line['plain_fits']}", *pace,
            quartiles(line["speedup"], 2) if "speedup" in line else "-",
        )  # fmt: skip
    return table


def new_table(title: str, left: Iterable[str], right: Iterable[str]) -> ResultTable:
    """An empty table with key columns and number columns."""
    return ResultTable([*keys(*left), *number_columns(right)], title)


def quartiles(values: Spread, digits: int = 3) -> str:
    """A median with its quartiles."""
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f} - {values['high']:.{digits}f})"


def mib(size: int | None) -> str:
    """Bytes in MiB; a dash if they are not known."""
    from winnowkv.report import MIB

    return "-" if size is None else f"{size / MIB:.1f}"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)
