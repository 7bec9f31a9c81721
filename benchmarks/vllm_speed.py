"""Contexts inside vLLM beside plain vLLM with the same KV memory: requests at once, tokens a second, first token, decode step.

Two vLLM engines, each in a process of its own and idle while the other works, serve the same documents and questions in turns:
one is plain vLLM with its prefix cache on, one has winnowkv's connector. Prompts are token ids, answers have a fixed length.

- *own documents*: a batch of requests, each on another document, and no engine has anything of them in its blocks. Plain vLLM
  gets fewer of them, since each takes it equally long: the last number of ``--work``.
- *first token*: of one request on a document that the engine has nothing of in its blocks: plain vLLM reads it, the connector
  loads it from its worker's memory.
- *one document*: a batch of as many questions about one document, which plain vLLM has in its prefix cache: its best case.
- *first token, cached*: of one more question about a document that was asked about before.

One document of each length is read, by ``snapkv``; the others are stored with its entries under token ids of their own, since
time depends on the number of entries and not on what is in them. Stored contexts are kept in ``--out`` for the next run.

``--clock cpu`` takes the processor time of the engine's process for seconds, which other work on the machine changes little;
with one thread it is what the clock says on a quiet machine. Both are recorded.

Run it in vLLM's environment, which ``make peers-speed`` or ``make vllm-demo`` creates:

    .venv-vllm/bin/python benchmarks/vllm_speed.py [--work 4096:16:4,7168:10:2] [--clock cpu] [--compile] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import winnowkv as wk
from winnowkv.cli.main import one_sentence
from winnowkv.cli.tables import ResultTable, keys, note, numbers
from winnowkv.contexts.context import Context
from winnowkv.contexts.export import export_context, whole_blocks
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.store import write_json
from winnowkv.integrations.vllm.options import transfer_config
from winnowkv.models.load import EMBEDDED, model_folder
from winnowkv.prompt.chat import open_turn
from winnowkv.report import MIB

ENGINE = Path(__file__).with_name("vllm_speed_engine.py")
POLICY = "snapkv"
LONGEST = 8192  # tokens, the model's own limit
PLACES = 61  # tokens between the beginnings of two documents
CLOCKS = ("wall", "cpu")
SECONDS = {"wall": "seconds", "cpu": "cpu_seconds"}
NAMES = {
    "at_once": "requests at once", "tokens_s": "tokens/s, prompts included", "step_ms": "decode step, ms",
    "decode_tokens_s": "tokens/s of that step", "first_s": "seconds",
}  # fmt: skip
BATCH = ("at_once", "tokens_s", "step_ms", "decode_tokens_s")
FIGURES = (
    *(("own documents", figure) for figure in BATCH), ("first token", "first_s"),
    *(("one document", figure) for figure in BATCH[1:]), ("first token, cached", "first_s"),
)  # fmt: skip
Cell = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A running engine: what it said when it started, and its pipes."""

    process: subprocess.Popen[str]
    about: Cell
    log: Path

    def ask(self, requests: Sequence[Cell], new_tokens: int, *, reset: bool = False) -> Cell:
        """Serve requests at once. Raises InputError if the engine ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"requests": list(requests), "new_tokens": new_tokens, "reset": reset}) + "\n")
        self.process.stdin.flush()
        return read_line(self.process, self.log)


def read_line(process: subprocess.Popen[str], log: Path) -> Cell:
    """The next line of an engine. Raises InputError if it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        said = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line] or ["no error in its log"]
        raise InputError(f"the engine ended with {process.wait()}: {said[-1].strip()} (the whole output is in {log})")
    found: Cell = json.loads(line)
    return found


@contextmanager
def engine(name: str, job: Cell, folder: Path, threads: int) -> Iterator[Side]:
    """An engine that runs until the block is left."""
    file, log = folder / f"{name}-job.json", folder / f"{name}.log"
    write_json(file, job)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines on the same cores
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
    }
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ENGINE), str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
    try:
        yield Side(process, read_line(process, log), log)
    finally:
        process.kill()
        process.wait()


def make_contexts(tokens: int, count: int, share: float, folder: Path) -> list[Context]:
    """Contexts of ``count`` documents of so many tokens; the first one's entries for all, read unless they are stored."""
    store = ContextStore(folder / "store")
    known = {context.header.name: context for context in store}
    budget = whole_blocks(tokens, share)
    names = [f"{tokens}-{budget}-{number}" for number in range(count)]
    if all(name in known for name in names):
        return [known[name] for name in names]
    model, tokenizer = wk.load(EMBEDDED, dtype=torch.bfloat16)
    texts = [part(tokenizer, tokens + 1 - len(open_turn(tokenizer, "a", chat=True)), at * PLACES) for at in range(count)]
    first = known.get(names[0]) or export_context(wk.read(model, tokenizer, texts[0], POLICY, budget), store, name=names[0])
    states, found = store.states(first.id), [first]
    for name, text in zip(names[1:], texts[1:], strict=True):
        ids = open_turn(tokenizer, text, chat=True)
        header = first.header.model_copy(update={"name": name, "seen": len(ids)})
        found.append(store.add(header, states, ids))
    progress(f"{count} contexts of {first.seen} tokens, {first.kept} kept")
    return found


def part(tokenizer: Any, tokens: int, begin: int) -> str:
    """So many tokens of the essays from a place on; after the end they go on at the beginning."""
    text = read_haystack()
    text += f"\n\n{text}"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[offsets[begin][0] : offsets[begin + tokens - 1][1]]


def requests_of(contexts: Sequence[Context], tokenizer: Any, questions: Sequence[str]) -> tuple[list[Cell], list[Cell]]:
    """The same requests for plain vLLM and on contexts: each context with the question beside it."""
    plain, ours = [], []
    for context, question in zip(contexts, questions, strict=True):
        prompt = context.ask(tokenizer, question)
        plain.append({"ids": [*context.tokens, *prompt.ids[context.kept :]]})
        ours.append({"ids": prompt.ids, "salt": prompt.salt, "params": prompt.kv_transfer_params})
    return plain, ours


def pace(measured: Cell, requests: int, new_tokens: int, clock: str) -> Cell:
    """Requests at once, tokens a second with prompts, and the decode step of the largest batch.

    Requests are at once if they get a token in the same step. A step is a decode step at that batch if it gave none its first.
    """
    steps = measured["steps"]
    most = max(emitted for *_, emitted, _, _ in steps)
    took = [step[CLOCKS.index(clock)] for step in steps if step[2] == most and not step[3]]
    step = median(took) if took else None
    seconds = {each: measured[each] for each in ("seconds", "cpu_seconds", "cached", "preempted")}
    return {
        "requests": requests, "at_once": most, "running": max(running for *_, running in steps), "steps": len(took),
        "tokens_s": requests * new_tokens / measured[SECONDS[clock]], "step_ms": step and 1000 * step,
        "decode_tokens_s": step and most / step, **seconds,
    }  # fmt: skip


def first_token(measured: Cell, clock: str) -> Cell:
    """Of one request that was asked for one token."""
    seconds = {each: measured[each] for each in ("seconds", "cpu_seconds", "cached")}
    return {"requests": 1, "first_s": measured[SECONDS[clock]], **seconds}


def measure(
    plain: Side, ours: Side, contexts: Sequence[Context], fewer: int, tokenizer: Any, args: argparse.Namespace
) -> list[Cell]:
    """All measurements with documents of one length; of own documents plain vLLM gets the first ``fewer``."""
    asked = [needle.question for needle in read_needles()]
    questions = [f"{asked[n % len(asked)]} Answer in {n + 3} words." for n in range(len(contexts))]
    batch, one = len(contexts), [contexts[0]] * len(contexts)
    different, same = (requests_of(each, tokenizer, questions) for each in (contexts, one))
    sides = (("plain", plain), ("context", ours))
    lines: list[Cell] = []

    def add(work: str, side: str, number: int, found: Cell) -> None:
        about = {"document": contexts[0].seen, "kept": contexts[0].kept, "work": work, "side": side, "round": number}
        lines.append({**about, "load": os.getloadavg()[0], **found})
        progress(f"{contexts[0].seen} tokens, {work}, {side}, round {number}: {shown(found)}")

    ours.ask(different[1], 2)  # warms up, and fills the connector's memory
    plain.ask([{"ids": different[0][0]["ids"][-256:]}], 2)
    for number in range(args.first_rounds):
        at = number % batch
        again = requests_of([contexts[at]], tokenizer, [questions[(at + 1) % batch]])
        for which, (name, side) in enumerate(sides):
            add("first token", name, number, first_token(side.ask([different[which][at]], 1, reset=True), args.clock))
            add("first token, cached", name, number, first_token(side.ask(again[which], 1), args.clock))
    for number in range(args.rounds):
        turns = list(enumerate(sides))[:: 1 if number % 2 else -1]
        for which, (name, side) in turns:
            todo = different[which][: None if which else fewer]
            found = pace(side.ask(todo, args.new_tokens, reset=True), len(todo), args.new_tokens, args.clock)
            add("own documents", name, number, found)
        for which, (name, side) in turns:
            side.ask(same[which][-1:], 1)  # the document is in its cache now
            found = pace(side.ask(same[which], args.new_tokens), batch, args.new_tokens, args.clock)
            add("one document", name, number, found)
    return lines


def shown(found: Cell) -> str:
    """The numbers of a measurement."""
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float))


def progress(text: str) -> None:
    """Say on standard error what was done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(lines: Sequence[Cell]) -> list[Cell]:
    """Medians over the rounds; ``ratio`` is the median of each round's ratio, above 1 where contexts are better."""
    rows = []
    for document in dict.fromkeys(line["document"] for line in lines):
        for work, figure in FIGURES:
            mine = [line for line in lines if (line["document"], line["work"]) == (document, work)]
            plain, ours = (
                {line["round"]: line[figure] for line in mine if line["side"] == side and line[figure] is not None}
                for side in ("plain", "context")
            )
            ratios = [ours[at] / plain[at] for at in sorted(set(ours) & set(plain))]
            if figure == "first_s":
                ratios = [1 / ratio for ratio in ratios]
            rows.append(
                {
                    "document": document, "kept": mine[0]["kept"], "work": work, "figure": figure,
                    "requests": {line["side"]: line["requests"] for line in mine},
                    "plain": median(plain.values()) if plain else None, "context": median(ours.values()) if ours else None,
                    "ratio": median(ratios) if ratios and figure != "step_ms" else None,
                }
            )  # fmt: skip
    return rows


def show(rows: Sequence[Cell], title: str, captions: Sequence[str]) -> None:
    """Print the table."""
    table = ResultTable([*keys("work", "tokens", "figure"), *numbers(("vLLM", "contexts", "ratio"))], title)
    before = None
    for row in rows:
        if before not in (None, row["document"]):
            table.section()
        before = row["document"]
        values = ["-" if row[side] is None else f"{row[side]:.3g}" for side in ("plain", "context")]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3g}x"
        table.add(row["work"], str(row["document"]), NAMES[row["figure"]], *values, ratio)
    table.print()
    for caption in captions:
        note(caption)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="4096:16:4,7168:10:2", help="tokens:documents:those that plain vLLM gets of a batch")
    parser.add_argument("--share", type=float, default=0.12, help="of the entries that stays, rounded up to whole blocks")
    parser.add_argument("--kv-mib", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="of batches")
    parser.add_argument("--first-rounds", type=int, default=3, help="of single requests")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model, which takes minutes at the start")
    parser.add_argument("--out", type=Path, default=Path("winnow-out/vllm-speed"))
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        work = [tuple(map(int, each.split(":"))) for each in args.work.split(",")]
    except ValueError:
        work = []
    if not work or any(len(each) != 3 or not 1 <= each[2] <= each[1] for each in work):
        raise InputError(f"--work {args.work!r}: give tokens, documents and plain vLLM's share of them, 4096:16:4,7168:10:2")
    if args.clock == "cpu" and args.threads != 1:
        raise InputError(f"--clock cpu adds up the time of {args.threads} threads: give --threads 1")
    args.out.mkdir(parents=True, exist_ok=True)
    contexts = [make_contexts(tokens, count, args.share, args.out) for tokens, count, _ in work]
    folder = model_folder(EMBEDDED, torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    job = {
        "model": str(folder), "dtype": "bfloat16", "max_model_len": LONGEST, "enforce_eager": not args.compile,
        "kv_cache_memory_bytes": args.kv_mib * MIB, "enable_prefix_caching": True,
    }  # fmt: skip
    transfer = transfer_config(str((args.out / "store").resolve()))
    lines: list[Cell] = []
    loads = [os.getloadavg()]
    with ExitStack() as stack:
        plain = stack.enter_context(engine("plain", job, args.out, args.threads))
        ours = stack.enter_context(engine("context", {**job, "kv_transfer_config": transfer}, args.out, args.threads))
        progress(f"plain vLLM started in {plain.about['start_s']:.0f} s, with the connector in {ours.about['start_s']:.0f} s")
        for each, (*_, fewer) in zip(contexts, work, strict=True):
            lines += measure(plain, ours, each, fewer, tokenizer, args)
    loads.append(os.getloadavg())
    rows, where = summary(lines), machine()
    result = {
        "rows": rows, "lines": lines, "engines": {"plain": plain.about, "context": ours.about}, "load": loads,
        "machine": where, "versions": versions(), "revision": revision(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }  # fmt: skip
    write_json(args.out / f"result{'-compiled' if args.compile else ''}.json", result)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    captions = [
        f"{args.new_tokens} new tokens a request; requests and what is kept: "
        + ", ".join(f"{len(each)} of {each[0].seen} tokens, {each[0].kept}" for each in contexts),
        "one document, and first token, cached: vLLM has the document in its prefix cache",
        f"{plain.about['blocks']} blocks of {plain.about['block']} tokens, {args.kv_mib} MiB; seconds: {args.clock}; medians "
        f"of {args.rounds} and {args.first_rounds} rounds; load average {loads[0][0]:.1f} to {loads[-1][0]:.1f}",
    ]
    title = (
        f"SmolLM2-135M in bfloat16, vLLM {plain.about['versions']['vllm']} ({'compiled' if args.compile else 'eager'}), "
        f"{where['processor']}, {args.threads} thread{'s' * (args.threads > 1)}"
    )
    show(rows, title, captions)


if __name__ == "__main__":
    with one_sentence("vllm_speed"):
        main()
