"""The measurements of ``winnow bench`` on NVIDIA's kvpress and on vLLM's CPU build: prefill, decode, throughput in a KV memory.

It reads the results of ``winnow bench`` (``--bench``) and repeats them with the others: same prompts as token ids, model,
dtype, threads, batches, new tokens and bytes of keys and values. Each runs in an environment of its own (``make peers-speed``
creates them), by ``peers_speed_kvpress.py`` and ``peers_speed_vllm.py``. In kvpress's process, presses and the model without
a press are timed in turns; between processes only medians can be compared, so run it on a quiet machine.

vLLM keeps the full cache, and reads prompts between decode steps: only steps with the largest number of requests that ran
at once are counted. Its memory is given in bytes, in blocks of 128 tokens. Its first start compiles the model.

    python benchmarks/peers_speed.py [--bench winnow-out/bench] [--presses "SnapKVPress()" ...] [--sides kvpress,vllm] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import winnowkv as wk
from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError
from winnowkv.evaluate.bench.cells import MAX_MEMORY_SHARE, build
from winnowkv.evaluate.bench.clock import free_memory
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack
from winnowkv.evaluate.report.machine import machine, versions
from winnowkv.evaluate.report.store import ResultStore, read_config, write_json
from winnowkv.memory.shape import read_shape
from winnowkv.models.load import PACKAGED, model_folder
from winnowkv.report import MIB

PRESSES = ("SnapKVPress(window_size=32, kernel_size=7)", "ExpectedAttentionPress()", "KnormPress()")
SIDES = {side: Path(__file__).with_name(f"peers_speed_{side}.py") for side in ("kvpress", "vllm")}
VLLM_BLOCK_TOKENS = 128  # in vLLM's CPU cache
WAITING_REQUESTS = 2  # more than fit, so that the memory stays full
COLUMNS = ("work", "tokens", "requests", "who", "ms a step", "tokens/s", "prefill s", "over its own full cache")
IDENTITY_FIELDS = ("side", "kind", "press", "ratio", "context", "batch", "kv_memory")
Cell = dict[str, Any]


def identity(line: Cell) -> tuple[Any, ...]:
    """What identifies a measurement."""
    return tuple(line.get(name) for name in IDENTITY_FIELDS)


def cells_of(bench: Cell, config: Cell) -> list[Cell]:
    """The work of a bench without its policies: each context, batch and memory once."""
    shared = {"rounds": config["rounds"], "steps": config["steps"], "new_tokens": config["new_tokens"]}
    cells: dict[tuple[Any, ...], Cell] = {}
    for kind in ("prefill", "decode", "serve"):
        for line in bench[kind]:
            cell = {"kind": kind, "context": line["prompt_tokens"], **shared}
            if kind == "decode":
                cell["batch"] = line["batch"]
            if kind == "serve":
                cell |= {"kv_memory": line["kv_memory"], "plain_fits": line["plain_fits"]}
            cells[identity(cell)] = cell
    return list(cells.values())


def budget_of(bench: Cell) -> float | int:
    """The budget for the presses: the first one of the bench at which a policy evicted."""
    lines = [line for line in bench["prefill"] if line["kept_bytes"] < line["full_bytes"]]
    if not lines:
        raise InputError("no policy of this bench evicted anything: run winnow bench with --policies winnow,snapkv")
    return lines[0]["budget"]


def kvpress_jobs(cells: Sequence[Cell], presses: Sequence[str], budget: float | int) -> list[Cell]:
    """One job: every cell with every press, at the ratio that keeps as many entries as our budget."""
    found = []
    for cell in cells:
        kept = wk.Budget.of(budget).entries(cell["context"])
        ratio = 0.0 if kept >= cell["context"] else 1 - (kept + 0.25) / cell["context"]
        found += [{**cell, "press": press, "ratio": ratio} for press in presses]
    return [{"cells": found}]


def vllm_jobs(cells: Sequence[Cell], token_bytes: int, free: int | None) -> list[Cell]:
    """One job for all prefill and decode cells that fit in free memory, and one job for each KV memory."""
    jobs: list[Cell] = []
    roomy, most = [], 0
    for cell in cells:
        length, longest = (
            cell["context"] + cell["new_tokens"],
            -(-(cell["context"] + cell["new_tokens"]) // VLLM_BLOCK_TOKENS) * VLLM_BLOCK_TOKENS,
        )
        if cell["kind"] == "serve":
            batch = cell["plain_fits"] + WAITING_REQUESTS
            # vLLM refuses a memory that does not hold one whole request.
            if cell["plain_fits"]:
                sized = {"kv_bytes": cell["kv_memory"], "most_rows": batch, "longest": length}
                jobs.append({**sized, "cells": [{**cell, "batch": batch}]})
            continue
        needed = (cell.get("batch", 1) + 1) * longest * token_bytes
        if free is None or needed < MAX_MEMORY_SHARE * free / 2:
            roomy.append(cell)
            most = max(most, needed)
    if roomy:
        length = max(cell["context"] + cell["new_tokens"] for cell in roomy)
        rows = max(cell.get("batch", 1) for cell in roomy)
        jobs.insert(0, {"kv_bytes": most, "most_rows": rows, "longest": length, "cells": roomy})
    return jobs


def lines_of(side: str, python: Path, job: Cell, folder: Path) -> Iterator[Cell]:
    """Run one side and yield its output lines. Raises InputError if it exits with an error."""
    file, log = folder / f"{side}.json", folder / f"{side}.log"
    write_json(file, job)
    command = [str(python), str(SIDES[side]), str(file)]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}  # all sides read the same local files
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
        if process.wait():
            output = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["nothing"]
            reason = next((line for line in reversed(output) if "Error" in line), output[-1])
            raise InputError(f"{side}'s side ended with {process.returncode}: {reason.strip()} (the whole output is in {log})")
    finally:
        process.kill()
        process.wait()


def measure(side: str, python: Path, jobs: Sequence[Cell], shared: Cell, store: ResultStore, advance: Any) -> str | None:
    """Let a side measure what the store lacks; returns the error that ended it, None if there was none."""
    reason = None
    for job in jobs:
        todo = [cell for cell in job["cells"] if not store.has(identity({"side": side, **cell}))]
        for _ in range(len(job["cells"]) - len(todo)):
            advance(side)
        if not todo:
            continue
        try:
            answers = lines_of(side, python, {**job, **shared, "cells": todo}, store.folder)
            first = next(answers, {})
            for line in answers:
                store.add({"side": side, **line, "versions": first.get("versions")})
                advance(side)
        except InputError as error:  # another job may need less
            reason = reason or str(error)
    return reason


def rows_of(bench: Cell, lines: Iterable[Cell]) -> list[Cell]:
    """All rows of the table: ours and transformers' from the bench, the peers' from their lines."""
    rows = [*prefill_rows(bench["prefill"]), *decode_rows(bench["decode"]), *serve_rows(bench["serve"]), *peer_rows(lines)]
    # Transformers was timed with each of our settings: one row of it is enough.
    once = {(row["kind"], row["tokens"], row.get("memory"), row["requests"], row["who"]): row for row in rows}
    kinds = ("prefill", "decode", "serve")
    return sorted(
        once.values(), key=lambda row: (kinds.index(row["kind"]), row["tokens"], row["requests"] * (row["kind"] == "decode"))
    )


def prefill_rows(lines: Iterable[Cell]) -> Iterator[Cell]:
    """Seconds of a prompt, ours and transformers'."""
    for line in lines:
        frame = {"kind": "prefill", "tokens": line["prompt_tokens"], "requests": 1}
        over = line["over_plain"]["median"]
        yield {**frame, "who": ours(line), "prefill_s": line["prefill_s"]["median"], "over": over}
        yield {**frame, "who": "transformers", "prefill_s": line["plain_s"]["median"]}


def decode_rows(lines: Iterable[Cell]) -> Iterator[Cell]:
    """Steps of our slots and of transformers' caches, without the native context, whose length depends on the budget."""
    for line in lines:
        frame = {"kind": "decode", "tokens": line["prompt_tokens"], "requests": line["batch"]}
        for name, took in line.get("ms", {}).items():
            if name == "native":
                continue
            mine = name.startswith("slots")
            who = f"{ours(line)}{name.removeprefix('slots')}" if mine else f"transformers, {name}"
            speed = 1 / line["over"]["dynamic"]["median"] if name == "slots" and "dynamic" in line["over"] else None
            yield {**frame, "who": who, "step_ms": took["median"], "tokens_s": line["tokens_s"][name], "speedup": speed}


def serve_rows(lines: Iterable[Cell]) -> Iterator[Cell]:
    """Tokens per second in a given memory, ours and transformers'."""
    for line in lines:
        frame = {"kind": "serve", "tokens": line["prompt_tokens"], "memory": line["kv_memory"]}
        who = f"{ours(line)}{', compiled' if line['compiled'] else ''}"
        speed = line["speedup"]["median"] if "speedup" in line else None
        for name, requests, whose in (("tokens_s", "fits", who), ("plain_tokens_s", "plain_fits", "transformers, dynamic")):
            if name in line:
                pace = {"requests": line[requests], "tokens_s": line[name]["median"]}
                yield {**frame, **pace, "who": whose, "speedup": speed if whose == who else None}


def peer_rows(lines: Iterable[Cell]) -> Iterator[Cell]:
    """Rows of what kvpress and vLLM measured."""
    for line in lines:
        yield {
            "kind": line["kind"],
            "tokens": line["context"],
            "requests": line.get("running", 1),
            "memory": line.get("kv_memory"),
            "who": f"kvpress {line['press']}" if line["side"] == "kvpress" else "vLLM, full cache",
            "over": line.get("over_plain"),
            **{name: line.get(name) for name in ("prefill_s", "step_ms", "tokens_s", "speedup")},
        }


def ours(line: Cell) -> str:
    """A setting of ours by name."""
    return f"winnowkv {line['policy']} at {line['budget']}"


def cells(row: Cell) -> list[str]:
    """A row of the table as text."""

    def number(name: str, digits: int, unit: str = "") -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}{unit}"

    work = f"decode in {row['memory'] / MIB:.0f} MiB" if row["kind"] == "serve" else row["kind"]
    against = number("over", 3, " of its seconds") if row["kind"] == "prefill" else number("speedup", 2, "x as fast")
    return [
        work, str(row["tokens"]), str(row["requests"]), row["who"], number("step_ms", 1), number("tokens_s", 1),
        number("prefill_s", 2), against,
    ]  # fmt: skip


def markdown(rows: Sequence[Cell], title: str, failed: dict[str, str]) -> str:
    """The table as Markdown."""
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---|" + "---:|" * (len(COLUMNS) - 4)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", *(f"- {side} did not finish: {reason}" for side, reason in failed.items())]
    return "\n".join(lines).rstrip() + "\n"


def show(rows: Sequence[Cell], title: str, failed: dict[str, str]) -> None:
    """Print the table."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a file or a pipe has no width to fold at
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("work", "who") else "right", overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for side, reason in failed.items():
        console.print(f"{side} did not finish: {reason}", markup=False)


def read_bench(folder: Path) -> tuple[Cell, Cell]:
    """The results of ``winnow bench`` and its settings. Raises InputError if they cannot be read."""
    try:
        bench = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise InputError(f"{folder / 'bench.json'} is missing or broken: run winnow bench --out {folder} first") from None
    return bench, read_config(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path("winnow-out/bench"), help="folder of a winnow bench")
    parser.add_argument("--presses", nargs="+", default=PRESSES, metavar="PRESS", help="Python expressions, 'SnapKVPress()'")
    parser.add_argument("--sides", default="kvpress,vllm")
    parser.add_argument("--kvpress-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--out", type=Path, default=Path("winnow-out/peers-speed"))
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    args = parse()
    pythons = {"kvpress": args.kvpress_python, "vllm": args.vllm_python}
    sides = [side for side in args.sides.split(",") if side]
    for side in sides:
        if side not in pythons:
            raise InputError(f"--sides {side!r} is unknown: use {', '.join(pythons)}")
        if not pythons[side].exists():
            raise InputError(f"{side}'s python {pythons[side]} does not exist: run make peers-speed, or give --{side}-python")
    bench, config = read_bench(args.bench)
    model, tokenizer = wk.load(config["model"])
    builder = PromptBuilder(tokenizer, read_haystack(), chat=config["chat"])
    work, shape = cells_of(bench, config), read_shape(model.config, model.dtype.itemsize)
    shared = {
        "model": str(model_folder(config["model"], model.dtype)) if config["model"] in PACKAGED else config["model"],
        "dtype": config["dtype"],
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "prompts": {str(tokens): build(builder, tokens) for tokens in {cell["context"] for cell in work}},
    }
    free = free_memory(model.device)
    del model  # the others need its memory
    jobs = {
        "kvpress": kvpress_jobs(work, args.presses, budget_of(bench)),
        "vllm": vllm_jobs(work, shape.full_bytes(1), free),
    }
    store = ResultStore(args.out, config, identity)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("peers", total=sum(len(job["cells"]) for side in sides for job in jobs[side]))

        def advance(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        for side in sides:
            if reason := measure(side, pythons[side], jobs[side], shared, store, advance):
                failed[side] = reason
    rows = rows_of(bench, store.lines)
    where, theirs = machine(), {line["side"]: line["versions"] for line in store.lines}
    title = (
        f"{config['model']} in {config['dtype']}, {where['accelerator'] or where['processor']}, {where['threads']} threads; "
        + "; ".join(f"{side} {theirs[side].get(side)} on torch {theirs[side]['torch']}" for side in theirs)
    )
    summary = {
        "rows": rows, "failed": failed, "versions": {"winnowkv": versions(), **theirs}, "machine": where,
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }  # fmt: skip
    write_json(args.out / "summary.json", summary)
    (args.out / "table.md").write_text(markdown(rows, title, failed), encoding="utf-8")
    store.close()
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(rows, title, failed)
        print(f"written to {args.out}")


if __name__ == "__main__":
    with one_sentence("peers_speed"):
        main()
