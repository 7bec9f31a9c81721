"""What a study of a text is worth when the question comes later: policies and ways to study over the same texts.

``needles``: texts of ``--length`` tokens with one needle each, asked for after compression; counted are the needles that the
full cache finds. Depths are 0.1, 0.3, 0.5, 0.7, 0.9 in turn, and begin one further for each of ``--turns``. The package's
needles were used to choose; ``--needles`` reads others.

``texts``: rows of ``winnow eval``'s tasks, question after compression. Each setting reads the full cache's own greedy answer;
measured are how often its token is the most likely one, and the KL divergence of the probabilities.

Each text is read and studied once, for all settings. An interrupted run continues where it stopped.

    python benchmarks/study_parts.py needles [--needles benchmarks/needles_report.jsonl] [--turns 2] [--json]
    python benchmarks/study_parts.py texts --tasks longbench_qmsum,longbench_multifieldqa_en --data DIR [--limit 4] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from winnow_parts import DEPTHS, code_digest, plain
from winnow_tables import interval

import winnowkv as wk
from winnowkv.budget import Asked
from winnowkv.cache.forks import fork
from winnowkv.cache.listening import Ear, Teller
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.stacked import stack
from winnowkv.cache.study import Study, hear, replay_studied, text_structure
from winnowkv.cli.loading import load_model
from winnowkv.cli.main import one_sentence
from winnowkv.cli.options import budgets as read_budgets
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import ResultTable, keys, numbers as number_columns, say
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import Needle, PromptBuilder, read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.plot import same
from winnowkv.evaluate.report.stats import mean_interval
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.evaluate.tasks.tasks import find_tasks
from winnowkv.models.info import end_tokens
from winnowkv.models.load import EMBEDDED, dtype_name
from winnowkv.prompt.chat import open_turn, rest_of_turn, text_begin, text_ending, uses_chat

FULL = ("again", "summary", "facts", "questions")
BLIND = "winnow:observe=context"
EQUAL = f"{BLIND}:equal=true"  # every layer and head keeps the same number of entries, as a paged engine needs it
ROWS_AT_ONCE = 12
Line = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A policy and how the text is studied for it, None for not at all."""

    label: str
    policy: str
    study: Study | None = None
    weighs: bool = field(default=False)  # as kvzip:plus=true


WAYS = [
    Way("snapkv", "snapkv"),
    Way("expected", "expected"),
    Way("expected, refit", "expected:refit=true"),
    Way("kvzip", "kvzip", Study()),
    Way("kvzip equal", "kvzip:equal=true", Study()),
    Way("kvzip:plus=true", "kvzip:plus=true", Study(), weighs=True),
    Way("winnow lean", BLIND, Study()),
    Way("winnow lean, equal", EQUAL, Study()),
    Way("winnow lean, equal, refit", f"{EQUAL}:refit=true", Study()),
    Way("winnow lean, equal, no sentences", EQUAL, Study(sentences=0)),
    Way("winnow lean, equal, no sentences, refit", f"{EQUAL}:refit=true", Study(sentences=0)),
    Way("winnow lean, equal, maximum, refit", f"{EQUAL}:refit=true", Study(maximum=True)),
    Way("winnow lean, maximum", BLIND, Study(maximum=True)),
    Way("winnow lean, refit", f"{BLIND}:refit=true", Study()),
    Way("winnow lean, maximum, refit", f"{BLIND}:refit=true", Study(maximum=True)),
    Way("winnow full", BLIND, Study(FULL)),
    Way("winnow full, refit", f"{BLIND}:refit=true", Study(FULL)),
]


class Text:
    """A text that was read over the full cache and studied in every way that is asked for."""

    def __init__(self, model: Any, tokenizer: Any, text: str, question: str, chosen: Sequence[Way]) -> None:
        self.model, self.tokenizer, chat = model, tokenizer, uses_chat(None, tokenizer)
        self.ids = open_turn(tokenizer, text, chat=chat)
        self.asked = rest_of_turn(tokenizer, text_ending(tokenizer, self.ids, chat=chat), question, chat=chat)
        self._structure = text_structure(tokenizer, self.ids)
        self.recorded = wk.CompactCache(model, "full", 1, record=len(self.ids))
        prefill(model, torch.tensor([self.ids], device=model.device), self.recorded)
        self._chosen, self._heard, self.seconds = chosen, dict[bool, Ear](), dict[str, float]()

    def answer(self, limit: int) -> list[int]:
        """The full cache's own greedy answer."""
        reading = fork(self.recorded)
        ids = torch.tensor([self.asked], device=self.model.device)
        logits = extend(self.model, reading, ids, [len(self.ids)], 1)[:, -1]
        return list(greedy(self.model, reading, logits, limit, end_tokens(self.model, self.tokenizer)))

    def heard(self, *, weighs: bool) -> Ear:
        """What was heard, studied the first time that it is asked for."""
        if weighs not in self._heard:
            begin, chat = time.perf_counter(), uses_chat(None, self.tokenizer)
            wanted = {s for way in self._chosen if way.study and way.weighs == weighs for s in way.study.sources}
            study = Study(tuple(s for s in FULL if s in wanted))
            reading = fork(self.recorded)
            assert self.recorded.recording is not None
            scales = [scale for _, scale in self.recorded.recording.layers]
            ear: Any = Ear(reading.compact_layers, scales, len(self.ids))
            reading.heard = ear
            first = text_begin(self.tokenizer, self.ids, chat=chat)
            hear(
                reading, ear, self.tokenizer, self.ids, first, study, chat=chat, weigh=weighs, sample=True, tell=Teller(None, 0)
            )
            self._heard[weighs] = ear
            self.seconds["weighed" if weighs else "heard"] = time.perf_counter() - begin
        return self._heard[weighs]

    def kept(self, way: Way, budget: Asked) -> wk.CompactCache:
        """A cache that holds what a way keeps."""
        if way.study is None:
            return self.recorded.replay(way.policy, budget)
        return replay_studied(self.recorded, self.heard(weighs=way.weighs), way.study, way.policy, budget, self._structure)

    def logits(self, caches: Sequence[wk.CompactCache], more: Sequence[int], last: int) -> tuple[wk.CompactCache, torch.Tensor]:
        """The question and ``more`` read into several caches at once; the logits of the ``last`` tokens."""
        together = stack(caches)
        ids = torch.tensor([[*self.asked, *more]] * len(caches), device=self.model.device)
        return together, extend(self.model, together, ids, [len(self.ids)] * len(caches), last)

    def answers(self, caches: Sequence[wk.CompactCache], limit: int) -> list[str]:
        """Greedy answers from several caches."""
        together, logits = self.logits(caches, [], 1)
        rows: list[list[int]] = [[] for _ in caches]
        ends, done = end_tokens(self.model, self.tokenizer), set[int]()
        for step in range(limit):
            newest = logits[:, -1].argmax(-1)
            for row, token in enumerate(newest.tolist()):
                if token in ends:
                    done.add(row)
                elif row not in done:
                    rows[row].append(token)
            if len(done) == len(rows):
                break
            logits = extend(self.model, together, newest[:, None], [len(self.ids) + len(self.asked) + step] * len(rows), 1)
        return [self.tokenizer.decode(row) for row in rows]


def settings(text: Text, todo: Sequence[tuple[Way, Asked]]) -> Iterator[tuple[list[tuple[Way, Asked]], list[wk.CompactCache]]]:
    """Groups of settings and their caches."""
    for begin in range(0, len(todo), ROWS_AT_ONCE):
        part = list(todo[begin : begin + ROWS_AT_ONCE])
        yield part, [text.kept(way, budget) for way, budget in part]


def size(cache: wk.CompactCache) -> Line:
    """Entries and bytes of a cache."""
    report = cache.report
    return {"kept_fraction": report.kept_fraction, "held_bytes": report.held_bytes, "full_bytes": report.full_bytes,
            "refitted": report.refitted}  # fmt: skip


def measure_needle(
    model: Any, tokenizer: Any, book: str, needle: Needle, args: argparse.Namespace, todo: Sequence[tuple[Way, Asked]]
) -> Iterator[Line]:
    """Whether each setting finds the needle, if the full cache does."""
    text = Text(model, tokenizer, book, needle.question, args.chosen)
    if not found(needle, full := tokenizer.decode(text.answer(args.max_new_tokens))):
        for way, budget in todo:
            yield {"way": way.label, "budget": budget, "skipped": "not answered by the full cache", "output": full}
        return
    for part, caches in settings(text, todo):
        sizes = [size(cache) for cache in caches]
        for (way, budget), more, output in zip(part, sizes, text.answers(caches, args.max_new_tokens), strict=True):
            yield {"way": way.label, "budget": budget, "correct": found(needle, output), "output": output, **more,
                   "text_tokens": len(text.ids), "seconds": dict(text.seconds)}  # fmt: skip


def found(needle: Needle, output: str) -> bool:
    """Whether an answer contains the needle's."""
    return needle.answer.lower() in output.lower()


def measure_row(
    model: Any, tokenizer: Any, context: str, question: str, args: argparse.Namespace, todo: Sequence[tuple[Way, Asked]]
) -> Iterator[Line]:
    """How close each setting comes to the full cache's own answer."""
    text = Text(model, tokenizer, context, question, args.chosen)
    tokens = text.answer(args.max_new_tokens)
    if not tokens:
        for way, budget in todo:
            yield {"way": way.label, "budget": budget, "skipped": "the full cache answers nothing"}
        return
    read = len(tokens)
    truth = text.logits([text.recorded.replay("full", 1)], tokens[:-1], read)[1][0].float().log_softmax(-1)
    for part, caches in settings(text, todo):
        sizes = [size(cache) for cache in caches]
        for at, (way, budget) in enumerate(part):  # one by one: a row's logits may be large
            guessed = text.logits([caches[at]], tokens[:-1], read)[1][0].float().log_softmax(-1)
            divergence = (truth.exp() * (truth - guessed)).sum(-1).mean()
            agree = (guessed.argmax(-1) == torch.tensor(tokens, device=guessed.device)).float().mean()
            yield {"way": way.label, "budget": budget, "agreement": agree.item(), "kl_mean": divergence.item(), **sizes[at],
                   "text_tokens": len(text.ids), "answer_tokens": read, "seconds": dict(text.seconds)}  # fmt: skip


def needle_prompts(
    args: argparse.Namespace, model: Any, tokenizer: Any
) -> Iterator[tuple[Line, Callable[..., Iterator[Line]]]]:
    """A text for each needle and turn."""
    builder = PromptBuilder(tokenizer, read_haystack(), chat=uses_chat(None, tokenizer))
    for turn in range(args.turns):
        for at, needle in enumerate(read_needles(args.needles)):
            depth, take = DEPTHS[(at + turn) % len(DEPTHS)], args.length
            for _ in range(8):
                book = builder._hide(needle.needles, take, depth)
                over = len(open_turn(tokenizer, book, chat=builder.chat)) - args.length
                if not over:
                    break
                take -= over
            frame = {"needle": needle.needle, "depth": depth, "length": args.length}
            yield frame, partial(measure_needle, model, tokenizer, book, needle, args)


def row_prompts(args: argparse.Namespace, model: Any, tokenizer: Any) -> Iterator[tuple[Line, Callable[..., Iterator[Line]]]]:
    """Rows of the tasks, cut in the middle; what comes after the context is asked."""
    for task in find_tasks([name.strip() for name in args.tasks.split(",") if name.strip()]):
        rows = task.rows(args.data)[args.skip : args.skip + args.limit]
        if not rows:
            raise InputError(f"--skip {args.skip} leaves nothing of {task.name}: skip fewer")
        for row in rows:
            text = row.before + row.context
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if len(ids) > args.max_context:
                half = args.max_context // 2
                text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
            question = row.prompt[len(row.before + row.context) :]
            frame = {"task": task.name, "row": row.id, "max_context": args.max_context}
            yield frame, partial(measure_row, model, tokenizer, text, question, args)


def identity(line: Line) -> tuple[Any, ...]:
    """What identifies a line."""
    where = (line["task"], line["row"]) if "task" in line else (line["needle"], line["depth"], line["length"])
    return (*where, line["way"], float(line["budget"]))


def table_rows(args: argparse.Namespace, store: ResultStore) -> list[Line]:
    """Of each setting how many needles it found, or its means with intervals."""
    rows = []
    for budget in args.budgets:
        for way in args.chosen:
            lines = [one for one in store.lines if one["way"] == way.label and same(one["budget"], budget)]
            lines = [one for one in lines if not one.get("skipped")]
            row: Line = {"way": way.label, "budget": budget, "texts": len(lines)}
            if args.table == "needles":
                row["found"] = sum(one["correct"] for one in lines)
            else:
                for metric in ("agreement", "kl_mean"):
                    row[metric] = plain(*mean_interval([one[metric] for one in lines], strata=[one["task"] for one in lines]))
            rows.append(row)
    return rows


def show(summary: Line) -> None:
    """Print the table."""
    of, where, rows = summary["config"], summary["machine"], summary["rows"]
    columns = ("found",) if summary["table"] == "needles" else ("rows", "same token", "KL, nats")
    ran = f"{of['model']} in {of['dtype']}, {where['accelerator'] or where['processor']}, {where['threads']} threads"
    table = ResultTable([*keys("way", "budget"), *number_columns(columns)], f"Studies, question asked afterwards: {ran}")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        if "found" in row:
            cells = [f"{row['found']} of {row['texts']}"]
        else:
            cells = [str(row["texts"]), interval(row["agreement"], "{:.1f}%", 100), interval(row["kl_mean"], "{:.3f}", 1)]
        table.add(row["way"], str(row["budget"]), *cells)
        if after and not same(after["budget"], row["budget"]):
            table.section()
    table.print()
    say(f"texts that the full cache answers are counted; files in {summary['folder']}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    needles, texts = tables.add_parser("needles"), tables.add_parser("texts")
    needles.add_argument("--needles", type=Path, help="JSONL with needle, question, answer; default: the package's")
    needles.add_argument("--length", type=int, default=970, help="tokens of a text")
    needles.add_argument("--turns", type=int, default=1, help="texts with each needle")
    texts.add_argument("--tasks", default="longbench_qmsum,longbench_multifieldqa_en")
    texts.add_argument("--data", type=Path, help="folder with the tasks' rows; default: the hub")
    texts.add_argument("--limit", type=int, default=4, help="most rows of each task")
    texts.add_argument("--skip", type=int, default=0, help="skip this many rows of each task")
    texts.add_argument("--max-context", type=int, default=2048, help="most tokens of a text; longer ones lose their middle")
    for table, new_tokens in ((needles, 28), (texts, 48)):
        table.add_argument("--model", default=EMBEDDED)
        table.add_argument("--ways", default="", help="labels, separated by semicolons; default: all")
        table.add_argument("--budgets", default="0.12,0.25,0.5")
        table.add_argument("--max-new-tokens", type=int, default=new_tokens)
        table.add_argument("--out", type=Path, help="default: winnow-out/study-needles or winnow-out/study-texts")
        table.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    args = parser.parse_args(words)
    args.out = args.out or Path(f"winnow-out/study-{args.table}")
    args.budgets = read_budgets(args.budgets)
    wanted, known = [label.strip() for label in args.ways.split(";") if label.strip()], [way.label for way in WAYS]
    for label in wanted:
        if label not in known:
            raise InputError(f"way {label!r} is unknown: it is one of {'; '.join(known)}")
    args.chosen = [way for way in WAYS if not wanted or way.label in wanted]
    return args


@torch.no_grad()
def main(args: argparse.Namespace) -> Line:
    """Measure, write the summary, print the table."""
    model, tokenizer = load_model(args.model, lambda model: None)
    config = {"benchmark": f"study_parts {args.table}", "model": args.model, "dtype": dtype_name(model.dtype),
              "max_new_tokens": args.max_new_tokens, "code": code_digest()}  # fmt: skip
    if args.table == "needles":
        text = read_haystack() + "".join(str(needle) for needle in read_needles(args.needles))
        config["texts_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    prompts = list((needle_prompts if args.table == "needles" else row_prompts)(args, model, tokenizer))
    every = [(way, budget) for budget in args.budgets for way in args.chosen]
    store = ResultStore(args.out, config, identity)
    stamp = {"versions": versions(), "git": revision()}
    try:
        with resumable(Console(stderr=True), store, args.table, len(prompts) * len(every)) as advance:
            for number, (frame, measure) in enumerate(prompts, 1):
                todo = [(w, b) for w, b in every if not store.has(identity({**frame, "way": w.label, "budget": b}))]
                for _ in range(len(every) - len(todo)):
                    advance("done before")
                for line in measure(todo) if todo else ():
                    store.add({**frame, **line, **stamp})
                    advance(f"text {number} of {len(prompts)}")
    finally:
        summary = {
            "table": args.table, "rows": table_rows(args, store), "folder": str(args.out), "config": config,
            "machine": machine(), "versions": versions(), "git": revision(),
        }  # fmt: skip
        write_json(args.out / "summary.json", summary)
        store.close()
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)
    return summary


if __name__ == "__main__":
    with one_sentence("study_parts"):
        main(parse())
