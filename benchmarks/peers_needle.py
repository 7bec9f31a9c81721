"""The needle test with winnowkv's policies and with NVIDIA's kvpress: same prompts, model, dtype and kept entries.

Ours runs here; kvpress runs in an environment of its own with the transformers that it needs
(``make peers`` creates it), by ``peers_kvpress.py``. Both get the same token ids and decode
greedily to the same stop tokens. Both compress after reading the whole prompt, question
included, as our needle test does. kvpress's own pipeline compresses the context before the
question is known, which is harder; its published tables are of that task.

A press's ratio is chosen so that it keeps as many entries as our budget; what it kept is in the
table. Held bytes are the storage of keys and values after prefill: presses that give each
head its own entries (AdaKV and similar) only mask them and free nothing. Decode times come from
two processes that run one after the other; ``make bench`` measures time with more care.

    python benchmarks/peers_needle.py [--policies full,snapkv] [--presses "SnapKVPress()" ...]
                                      [--budgets 0.12,128] [--length 3000] [--needles 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import winnowkv as wk
from winnowkv.cli.main import one_sentence
from winnowkv.cli.options import budgets as read_budgets, numbers
from winnowkv.errors import InputError
from winnowkv.evaluate.needle import needle as runner
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine, versions
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.models.info import end_tokens
from winnowkv.models.load import EMBEDDED, PACKAGED, dtype_name, model_folder
from winnowkv.policies import split_policies
from winnowkv.prompt.chat import uses_chat
from winnowkv.report import MIB

POLICIES = "full,random,streaming,h2o,tova,snapkv,pyramidkv,adakv,headkv,cake,dynamickv,windowkv,compresskv"
PRESSES = (
    "SnapKVPress()",
    "SnapKVPress(window_size=32, kernel_size=7)",  # the authors' LongBench numbers, our default
    "PyramidKVPress()",
    "StreamingLLMPress()",
    "TOVAPress()",
    "ObservedAttentionPress()",
    "ExpectedAttentionPress()",
    "KnormPress()",
    "KeyDiffPress()",
    "LagKVPress()",
    "FinchPress()",
    "ChunkKVPress(SnapKVPress())",
    "CompactorPress()",
    "CURPress()",
    "CriticalKVPress(SnapKVPress())",
    "CriticalAdaKVPress(SnapKVPress())",
    "AdaKVPress(SnapKVPress())",
    "AdaKVPress(ExpectedAttentionPress(epsilon=1e-2))",
    "KVzipPress()",
    "RandomPress(seed=0)",
)
NO_PRESS = "None"  # the full cache on kvpress's side
KVPRESS_SCRIPT = Path(__file__).with_name("peers_kvpress.py")
MAX_DEVIATION = 0.1  # bfloat16 kernels differ by less; a RoPE base of 10,000 instead of 100,000 gives 0.6
COLUMNS = ("policy or press", "side", "budget", "found", "kept entries", "KV MiB kept", "KV MiB held", "decode ms/token")


def ratio_for(kept: int, tokens: int) -> float:
    """The compression ratio with which kvpress keeps exactly ``kept``, whether it rounds down or to the nearest."""
    return 0.0 if kept >= tokens else 1 - (kept + 0.25) / tokens


def question_tokens(builder: PromptBuilder, needle: Any, ids: list[int]) -> int:
    """Tokens after the end of the book: the common end of this prompt and one with an empty book."""
    empty = builder._ids("", needle)
    return next(n for n, (a, b) in enumerate(zip(reversed(ids), reversed(empty), strict=False)) if a != b)


def deviation(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Standard deviation of the difference of two models' logits, over that of ours."""
    return float((theirs - ours).std() / ours.std())


def make_job(
    args: argparse.Namespace, test: runner.NeedleTest, model: Any, tokenizer: Any, builder: PromptBuilder, store: ResultStore
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The job for kvpress, without what the store holds already, and the common fields of each prompt's result lines."""
    prompts, frames = [], []
    for length, depth, needle in test.cases():
        ids, frame = (
            builder.build(needle, length, depth),
            {"variant": test.variant, "length": length, "depth": depth, **asdict(needle)},
        )
        asked = []
        for press in (NO_PRESS, *args.presses):
            for budget in test.budgets[: 1 if press == NO_PRESS else None]:
                if not store.has(runner.identity({"policy": press, "budget": budget, **frame})):
                    ratio = ratio_for(wk.Budget.of(budget).entries(len(ids)), len(ids))
                    asked.append({"press": press, "budget": budget, "ratio": ratio})
        if asked:
            prompts.append({"ids": ids, "question": question_tokens(builder, needle, ids), "asked": asked})
            frames.append({**frame, "prompt_tokens": len(ids)})
    job = {
        "model": str(model_folder(args.model, model.dtype)) if args.model in PACKAGED else args.model,
        "dtype": dtype_name(model.dtype),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "max_new_tokens": test.max_new_tokens,
        "stop": sorted(end_tokens(model, tokenizer)),
        "check": builder.build(test.needles[0], test.lengths[0], test.depths[0]),
        "prompts": prompts,
    }
    return job, frames


def lines_of(args: argparse.Namespace, job: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Run kvpress's side and yield its output lines. Raises InputError if it exits with an error."""
    file, log = args.out / "job.json", args.out / "kvpress.log"
    write_json(file, job)
    command = [str(args.peers_python), str(KVPRESS_SCRIPT), str(file), *(["--live"] if args.live else [])]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}  # both sides read the same local files
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        yield from map(json.loads, process.stdout)
        if process.wait():
            output = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise InputError(f"kvpress's side ended with {process.returncode}: {output[-1]} (the whole output is in {log})")
    finally:
        process.kill()
        process.wait()


def measure_theirs(
    args: argparse.Namespace, job: dict[str, Any], frames: Sequence[dict[str, Any]], logits: torch.Tensor, tokenizer: Any,
    store: ResultStore, advance: Callable[[str], None],
) -> dict[str, str]:  # fmt: skip
    """Let kvpress measure what is missing; returns the presses that failed, with their errors."""
    answers = iter(lines_of(args, job))
    first = next(answers)
    apart = deviation(torch.tensor(first["logits"]), logits)
    if not apart <= MAX_DEVIATION:  # NaN fails this too
        raise InputError(
            f"the two sides do not run the same model: logits of one prompt differ by {apart:.2f} of their spread, "
            f"the limit is {MAX_DEVIATION}; look at rope_parameters in {job['model']}/config.json and at transformers "
            f"{first['versions']['transformers']} in {args.peers_python}"
        )
    errors: dict[str, str] = {}
    for line in answers:
        frame, press = frames[line.pop("prompt")], line.pop("press")
        if error := line.pop("error", None):
            errors.setdefault(press, error)  # not stored: the next run tries again
        else:
            output = tokenizer.decode(line.pop("tokens"), skip_special_tokens=True)
            judged = {"output": output, **runner.judge(frame["answer"], output)}
            store.add({"policy": press, **frame, **line, **judged, "versions": first["versions"], "logit_deviation": apart})
        advance(f"kvpress: {press}")
    return errors


def rows_of(lines: Iterable[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """One row for each policy and budget; what keeps everything is the same at every budget and has one row."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        whole = min(line["kept_entries_per_layer"]) >= line["prompt_tokens"]
        group = groups.setdefault((line["policy"], "all" if whole else str(line["budget"])), [])
        if not whole or all(line["budget"] == other["budget"] for other in group):
            group.append(line)
    rows = []
    for (policy, budget), group in groups.items():
        paces = [line["decode_ms_per_token"] for line in group if line["decode_ms_per_token"] is not None]
        rows.append({
            "policy": policy, "side": side, "budget": budget, "cases": len(group),
            "found": sum(line["correct"] for line in group),
            "kept_entries": mean(mean(line["kept_entries_per_layer"]) for line in group),
            "kept_bytes": mean(line["kept_bytes"] for line in group),
            "held_bytes": mean(line["held_bytes"] for line in group),
            "decode_ms_per_token": median(paces) if paces else None,
        })  # fmt: skip
    return rows


def ranked(rows: Iterable[dict[str, Any]], budgets: Sequence[str]) -> list[dict[str, Any]]:
    """Rows sorted: full caches first, then by budget in the order asked, most found first."""
    order = ["all", *budgets]
    return sorted(rows, key=lambda row: (order.index(row["budget"]), -row["found"] / row["cases"], row["side"], row["policy"]))


def cells(row: dict[str, Any]) -> list[str]:
    pace = row["decode_ms_per_token"]
    return [
        "full cache" if row["policy"] == NO_PRESS else row["policy"],
        row["side"], row["budget"], f"{row['found']}/{row['cases']}",
        f"{row['kept_entries']:.1f}".removesuffix(".0"), f"{row['kept_bytes'] / MIB:.2f}", f"{row['held_bytes'] / MIB:.2f}",
        "-" if pace is None else f"{pace:.1f}",
    ]  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]], title: str, errors: dict[str, str]) -> str:
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", *(f"- {press} did not run: {error}" for press, error in errors.items())]
    return "\n".join(lines).rstrip() + "\n"


def show(rows: Sequence[dict[str, Any]], title: str, errors: dict[str, str]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file or a pipe has no width to fold at
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*cells(row), end_section=following is not None and following["budget"] != row["budget"])
    console.print(table)
    for press, error in errors.items():
        console.print(f"{press} did not run: {error}", markup=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument(
        "--presses", nargs="+", default=PRESSES, metavar="PRESS", help="Python expressions, 'AdaKVPress(SnapKVPress())'"
    )
    parser.add_argument("--budgets", default="0.12,128")
    parser.add_argument("--length", type=int, default=3000)
    parser.add_argument("--depths", default="0.1,0.5,0.9")
    parser.add_argument("--needles", type=int, default=3, help="how many of the package's eight")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--live", action="store_true", help="a prefill for every press, in kvpress's context manager; slow")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--out", type=Path, default=Path("winnow-out/peers"))
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.peers_python.exists():
        raise InputError(f"kvpress's python {args.peers_python} does not exist: run make peers, or give --peers-python")
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = wk.load(args.model)
    haystack = read_haystack()
    builder = PromptBuilder(tokenizer, haystack, chat=uses_chat(None, tokenizer))
    test = runner.NeedleTest(
        policies=list(dict.fromkeys(split_policies(args.policies))),
        budgets=read_budgets(args.budgets),
        lengths=[args.length],
        depths=numbers(args.depths, float, "--depths"),
        needles=read_needles()[: args.needles],
        max_new_tokens=args.max_new_tokens,
    )
    test.check(model, builder)
    ours, theirs = (
        runner.open_store(args.out / name, model, args.model, builder, haystack, test)
        for name in ("winnowkv", "kvpress-live" if args.live else "kvpress")
    )
    job, frames = make_job(args, test, model, tokenizer, builder, theirs)
    todo = sum(len(prompt["asked"]) for prompt in job["prompts"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors: dict[str, str] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("needles", total=test.steps() + todo)

        def advance(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        runner.run(test, model, tokenizer, builder, ours, advance)
        if todo:
            with torch.no_grad():
                ids = torch.tensor([job["check"]], device=model.device)
                logits = model(ids, logits_to_keep=1).logits[0, -1].float().cpu()
            errors = measure_theirs(args, job, frames, logits, tokenizer, theirs, advance)
    cases = {(length, depth, needle.needle) for length, depth, needle in test.cases()}
    lines = [
        [line for line in store.lines if line["policy"] in names and (line["length"], line["depth"], line["needle"]) in cases
         and line["budget"] in test.budgets]
        for store, names in ((ours, test.policies), (theirs, (NO_PRESS, *args.presses)))
    ]  # fmt: skip
    rows = ranked([*rows_of(lines[0], "winnowkv"), *rows_of(lines[1], "kvpress")], [str(budget) for budget in test.budgets])
    where = machine()
    last = lines[1][-1] if lines[1] else {"versions": {}}
    their = last["versions"]
    title = (
        f"{len(cases)} needle prompts of {args.length} tokens, {args.model} in {job['dtype']}, "
        f"{where['accelerator'] or where['processor']}, {where['threads']} threads; "
        f"winnowkv {wk.__version__} on transformers {transformers.__version__}, "
        f"kvpress {their.get('kvpress')} on {their.get('transformers')}, torch {torch.__version__}"
    )
    summary = {
        "rows": rows,
        "errors": errors,
        "logit_deviation": last.get("logit_deviation"),
        "versions": {"winnowkv": versions(), "kvpress": their},
        "machine": where,
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    write_json(args.out / "summary.json", summary)
    (args.out / "table.md").write_text(markdown(rows, title, errors), encoding="utf-8")
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(rows, title, errors)
        print(f"written to {args.out}")


if __name__ == "__main__":
    with one_sentence("peers_needle"):
        main()
