"""Ablation of the policy ``winnow``: the same prompts with one part changed at a time, and with the published policies.

``needles``: how many needle prompts each variant answers, of those that the full cache answers. Each needle has one depth,
0.1, 0.3, 0.5, 0.7, 0.9 in turn. The package's needles were used to choose the policy; ``--needles`` reads others.

``texts``: rows of ``winnow eval``'s tasks. Every variant reads the full cache's own greedy answer; measured are how often
its token is the most likely one, and the KL divergence of the probabilities, of all tokens but the first and of those after
the first ``--after``. Variants with lookahead read their first tokens over the whole cache, as they do live. Intervals are
bootstrapped over rows; differences are to the published policy of ``--against`` whose KL is lowest at that budget, on the
same rows.

One recorded prefill serves all variants of a prompt. An interrupted run continues where it stopped.

    python benchmarks/winnow_parts.py needles [--needles benchmarks/needles_report.jsonl] [--lengths 1000,3000] [--json]
    python benchmarks/winnow_parts.py texts --tasks longbench_multi_news,longbench_gov_report --data DIR [--limit 10] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from winnow_tables import show
from winnow_variants import VARIANTS, AnswerAttention, Oracle, Variant

import winnowkv as wk
from winnowkv.budget import Asked
from winnowkv.cache.reading import extend, prefill
from winnowkv.cli.loading import load_model
from winnowkv.cli.main import one_sentence
from winnowkv.cli.options import budgets as read_budgets, numbers
from winnowkv.cli.progress import resumable
from winnowkv.engine.step import greedy_rows
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.audit.audit import after, agreement, by_spoken, fidelity, of_full_cache
from winnowkv.evaluate.lookahead import FirstTokens, looked
from winnowkv.evaluate.needle import needle as runner
from winnowkv.evaluate.needle.prompts import Needle, PromptBuilder, read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.plot import same
from winnowkv.evaluate.report.stats import mean_interval, paired
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.evaluate.settings import Kept, Setting, batches, begun, read_prompt
from winnowkv.evaluate.tasks.protocol import encode_row
from winnowkv.evaluate.tasks.tasks import find_tasks
from winnowkv.models.info import end_tokens, prompt_limit
from winnowkv.models.load import EMBEDDED, dtype_name
from winnowkv.policies import policy as make_policy
from winnowkv.prompt.chat import uses_chat
from winnowkv.prompt.classifier import task_profile
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MAX_CACHES_HELD = 24  # of one prompt
MIN_ANSWER_TOKENS = 3  # the first token comes from the prompt, and a single one has no variance
DECIDING_PACKAGES = ("policies", "scoring", "cache", "prompt", "models", "budget")
Line = dict[str, Any]
Found = tuple[Variant, Asked, list[Line]]
Todo = Sequence[tuple[Variant, Asked]]
Ask = tuple[Line, Callable[[Todo], Iterator[Line]]]  # a prompt: the common fields of its lines, and what measures it


def chosen(table: str, labels: str, also: Sequence[str] = ()) -> list[Variant]:
    """The variants of a table: all, or those named and ``also``. Raises InputError for an unknown label."""
    known = {variant.label: variant for variant in VARIANTS if table in variant.tables}
    wanted = [label.strip() for label in labels.split(",") if label.strip()]
    for label in (*wanted, *also):
        if label not in known:
            raise InputError(f"variant {label!r} is unknown in the table {table!r}: it is one of {', '.join(known)}")
    return [variant for label, variant in known.items() if not wanted or label in (*wanted, *also)]


def code_digest() -> str:
    """A digest of the code that decides results, which tells versions apart, committed or not."""
    package = Path(wk.__file__).parent
    files = [file for name in DECIDING_PACKAGES for file in sorted((package / name).rglob("*.py")) or [package / f"{name}.py"]]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def keep(
    recorded: wk.CompactCache,
    variant: Variant,
    budget: Asked,
    found: TaskProfile,
    recorded_attention: Sequence[Any] = (),
    first: FirstTokens | None = None,
) -> Kept:
    """What a variant keeps of a recorded prompt, after the lookahead and draft that it may have, or why it fails."""
    policy = replace(variant.policy, recorded=recorded_attention) if isinstance(variant.policy, Oracle) else variant.policy
    setting = Setting(variant.label, budget)
    try:
        # The task is given to the replay, since variants of one prompt may have different tasks.
        return begun(setting, recorded.replay(policy, budget, task=variant.profile(found)), first)
    except WinnowError as error:
        return Kept(setting, None, str(error))


def parts(todo: Todo) -> Iterator[Todo]:
    """Groups of settings whose caches are held at once."""
    return (todo[begin : begin + MAX_CACHES_HELD] for begin in range(0, len(todo), MAX_CACHES_HELD))


def skipped(todo: Todo, reason: str) -> Iterator[Line]:
    """Lines of a prompt that cannot be used, with the reason."""
    return ({**asdict(Setting(variant.label, budget)), "skipped": reason} for variant, budget in todo)


def needle_prompts(args: argparse.Namespace, model: Any, tokenizer: Any, haystack: str) -> list[Ask]:
    """Every needle at every length, at one depth."""
    builder = PromptBuilder(tokenizer, haystack, chat=uses_chat(None, tokenizer))
    asked: list[Ask] = []
    for length in numbers(args.lengths, int, "--lengths"):
        for at, needle in enumerate(read_needles(args.needles)):
            frame = {"length": length, "depth": DEPTHS[at % len(DEPTHS)], **asdict(needle)}
            builder.build(needle, length, frame["depth"])  # raises now if the haystack or the length is too short
            asked.append((frame, partial(measure_needle, model, tokenizer, builder, needle, frame, args.max_new_tokens)))
    return asked


def measure_needle(
    model: Any, tokenizer: Any, builder: PromptBuilder, needle: Needle, frame: Line, limit: int, todo: Todo
) -> Iterator[Line]:
    """Lines as those of ``winnow needle``, one for each setting, if the full cache answers correctly."""
    ids = builder.build(needle, frame["length"], frame["depth"])
    found = TaskProfile("localization", structure=read_structure(tokenizer, ids))
    read = read_prompt(model, ids, [make_policy("expected")], found)
    reading = runner.Reading(model, tokenizer, *read, needle.answers, limit, end_tokens(model, tokenizer))
    ((_, full),) = reading.answer([Kept(Setting("full", 1), reading.cache.replay("full", 1))])
    if not full["correct"]:
        yield from skipped(todo, "not answered by the full cache")
        return
    for part in parts(todo):
        kept = [keep(reading.cache, variant, budget, found, first=reading.first) for variant, budget in part]
        yield from ({**asdict(one.setting), "failed": one.failed} for one in kept if one.cache is None)
        for setting, line in reading.answer([one for one in kept if one.cache is not None]):
            yield {**asdict(setting), **line}


def text_prompts(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[Ask]:
    """Rows of the tasks, as ``winnow eval`` reads them."""
    limit, asked = prompt_limit(model, args.max_new_tokens, args.max_context), []
    for task in find_tasks([name.strip() for name in args.tasks.split(",") if name.strip()]):
        rows = task.rows(args.data)
        if args.skip >= len(rows):
            raise InputError(f"--skip {args.skip} leaves nothing of {task.name}, which has {len(rows)} rows: skip fewer")
        for row in rows[args.skip : args.skip + args.limit]:
            encoded = encode_row(row, task, tokenizer, "official", limit, uses_chat(None, tokenizer))
            frame = {"task": task.name, "row": row.id, "prompt_tokens": len(encoded.ids), "truncated_tokens": encoded.truncated}
            found = replace(task_profile(encoded.context), structure=read_structure(tokenizer, encoded.ids))
            asked.append((frame, partial(measure_text, model, tokenizer, encoded.ids, found, args.max_new_tokens)))
    return asked


def measure_text(model: Any, tokenizer: Any, ids: list[int], found: TaskProfile, limit: int, todo: Todo) -> Iterator[Line]:
    """Lines with how close each setting comes to the full cache's own answer."""
    stop, seen = end_tokens(model, tokenizer), len(ids)
    recorded, logits, _ = read_prompt(model, ids, [make_policy("expected")], found)
    (tokens,) = greedy_rows([recorded.replay("full", 1)], logits, limit, lambda made: made[-1] in stop)
    if tokens is None or len(tokens) < MIN_ANSWER_TOKENS:
        yield from skipped(
            todo, f"the full cache's answer has fewer than {MIN_ANSWER_TOKENS} tokens, or a logit is not a number"
        )
        return
    answering = AnswerAttention(model)  # a prefill of its own: a cache that has decoded cannot be replayed
    prefill(model, torch.tensor([ids], device=model.device), answering)
    truth = extend(model, answering, torch.tensor([tokens[:-1]], device=model.device), [seen])[0]
    full = {
        "answer": tokenizer.decode(tokens), "compared_tokens": len(tokens) - 1, "classified": found.task,
        "full_agreement": agreement(truth, tokens[1:]).float().mean().item(),
    }  # fmt: skip
    first = FirstTokens.known(model, tokens, torch.cat([logits, truth]))
    for part in parts(todo):
        kept = [keep(recorded, variant, budget, found, answering.recorded, first) for variant, budget in part]
        yield from ({**asdict(one.setting), **full, "failed": one.failed} for one in kept if one.cache is None)
        for one in kept:
            if one.ended is not None:
                yield {**asdict(one.setting), **full, **cost(one), **of_full_cache(truth, tokens)}
        for batch in (batch for group in by_spoken(kept) for batch in batches(group)):
            costs = [cost(one) for one in batch]
            rows = fidelity(model, [one.cache for one in batch], truth, tokens, seen, len(batch[0].spoken))
            for one, spent, row in zip(batch, costs, rows, strict=True):
                yield {**asdict(one.setting), **full, **spent, **row}


def cost(one: Kept) -> Line:
    """Bytes of what a setting keeps, and what it has looked at."""
    report = one.cache.report
    sizes = {"kept_bytes": report.kept_bytes, "full_bytes": report.full_bytes}
    return {**sizes, "compress_s": round(report.compress_seconds, 4), **looked(one.cache)}


def text_identity(line: Line) -> Hashable:
    """What identifies a line of texts."""
    return (line["task"], line["row"], *Setting(line["policy"], line["budget"]).key)


def run(args: argparse.Namespace, store: ResultStore, prompts: Sequence[Ask]) -> None:
    """Measure what the store does not hold yet, prompt by prompt."""
    every = [(variant, budget) for variant in args.chosen for budget in args.budgets]
    stamp = {"versions": versions(), "git": revision()}
    with resumable(Console(stderr=True), store, args.table, len(prompts) * len(every)) as advance:
        for number, (frame, measure) in enumerate(prompts, 1):
            todo = [(v, b) for v, b in every if not store.has(args.key({**frame, **asdict(Setting(v.label, b))}))]
            for _ in range(len(every) - len(todo)):
                advance("done before")
            for line in measure(todo) if todo else ():
                store.add({**frame, **line, **stamp})
                advance(f"prompt {number} of {len(prompts)}")


def lines_by_setting(args: argparse.Namespace, store: ResultStore, prompts: Sequence[Ask]) -> Iterator[Found]:
    """Every setting with its lines, for the prompts on which all settings of its budget have a result.

    A setting without any result (a budget below its window) does not exclude prompts.
    """
    lines = {args.key(line): line for line in store.lines}
    for budget in args.budgets:
        found = {}
        for variant in args.chosen:
            setting = asdict(Setting(variant.label, budget))
            mine = {at: lines.get(args.key({**frame, **setting})) for at, (frame, _) in enumerate(prompts)}
            found[variant] = {at: line for at, line in mine.items() if line and not (line.get("skipped") or line.get("failed"))}
        common = set.intersection(*({*numbered} for numbered in found.values() if numbered), set(range(len(prompts))))
        for variant, numbered in found.items():
            yield variant, budget, [line for at, line in numbered.items() if at in common]


def needle_rows(args: argparse.Namespace, store: ResultStore, prompts: Sequence[Ask]) -> list[Line]:
    """The number of prompts found, for each setting."""
    return [
        {**asdict(Setting(variant.label, budget)), "prompts": len(lines), "found": sum(line["correct"] for line in lines)}
        for variant, budget, lines in lines_by_setting(args, store, prompts)
    ]


def text_rows(args: argparse.Namespace, store: ResultStore, prompts: Sequence[Ask]) -> list[Line]:
    """Means with intervals for each setting, and differences to the best of ``--against`` at its budget."""
    found, rows = list(lines_by_setting(args, store, prompts)), []
    for variant, budget, lines in found:
        rivals = [(v.label, theirs) for v, b, theirs in found if v.label in args.against and same(b, budget) and theirs]
        best, theirs = min(rivals, key=lambda rival: mean_of(rival[1], "kl_mean")[0], default=(None, lines))
        row = {**asdict(Setting(variant.label, budget)), "prompts": len(lines), "against": best}
        row |= measures(lines, theirs if lines else [])
        # Whether an answer has tokens after so many does not depend on the variant: the rows stay paired.
        later, others = ([late for line in side if (late := late_tokens(line, args.after))] for side in (lines, theirs))
        row |= {"after": args.after, "prompts_after": len(later)}
        row |= {f"{name}_after": value for name, value in measures(later, others if later else []).items()}
        rows.append(row)
    return rows


def late_tokens(line: Line, tokens: int) -> Line | None:
    """The measures of a line's tokens after the first ``tokens``; None if its answer has none."""
    found = after(line, tokens)
    return None if found is None else {"task": line["task"], "agreement": found[0], "kl_mean": found[1]}


def measures(lines: Sequence[Line], theirs: Sequence[Line]) -> Line:
    """Means with intervals, and paired differences to the lines of the best published policy."""
    row: Line = {}
    for metric in ("agreement", "kl_mean"):
        old, new = ([line[metric] for line in side] for side in (theirs, lines))
        apart = paired(old, new, strata=[line["task"] for line in lines])
        difference = plain(apart.mean_difference, apart.low, apart.high)
        row |= {metric: plain(*mean_of(lines, metric)), f"{metric}_difference": difference}
    return row


def plain(*numbers: float) -> list[float | None]:
    """The numbers with None for NaN, which JSON does not have."""
    return [None if math.isnan(number) else number for number in numbers]


def mean_of(lines: Sequence[Line], metric: str) -> tuple[float, float, float]:
    """The mean over tasks, and its interval."""
    return mean_interval([line[metric] for line in lines], strata=[line["task"] for line in lines])


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    needles, texts = tables.add_parser("needles"), tables.add_parser("texts")
    needles.add_argument("--needles", type=Path, help="JSONL with needle, question, answer; default: the package's")
    needles.add_argument("--haystack", type=Path, help="a text file or a folder with .txt in it; default: the package's essays")
    needles.add_argument("--lengths", default="1000,3000")
    texts.add_argument("--tasks", default="longbench_multi_news,longbench_gov_report")
    texts.add_argument("--data", type=Path, help="folder with the tasks' rows; default: the hub")
    texts.add_argument("--limit", type=int, default=10, help="most rows of each task")
    texts.add_argument("--skip", type=int, default=0, help="skip this many rows of each task")
    texts.add_argument("--max-context", type=int, help="most prompt tokens; longer prompts lose their middle")
    texts.add_argument(
        "--against", default="cake,compresskv,snapkv", help="variants are compared with the one of these that has the lowest KL"
    )
    texts.add_argument("--after", type=int, default=32, help="compare the tokens after so many by themselves, too")
    for table, new_tokens in ((needles, 24), (texts, 64)):
        table.add_argument("--model", default=EMBEDDED)
        table.add_argument("--variants", default="", help="comma-separated labels; default: all")
        table.add_argument("--budgets", default="0.12,128,64")
        table.add_argument("--max-new-tokens", type=int, default=new_tokens)
        table.add_argument("--out", type=Path, help="default: winnow-out/parts-needles or winnow-out/parts-texts")
        table.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    args = parser.parse_args(words)
    args.out = args.out or Path(f"winnow-out/parts-{args.table}")
    args.budgets = read_budgets(args.budgets)
    args.against = [name.strip() for name in args.against.split(",") if name.strip()] if args.table == "texts" else []
    args.chosen = chosen(args.table, args.variants, args.against)
    return args


def main(args: argparse.Namespace) -> Line:
    """Measure, write the summary, print the table."""
    model, tokenizer = load_model(args.model, lambda model: None)
    config = {"benchmark": f"winnow_parts {args.table}", "model": args.model, "dtype": dtype_name(model.dtype),
              "max_new_tokens": args.max_new_tokens, "code": code_digest()}  # fmt: skip
    if args.table == "needles":
        haystack = read_haystack(args.haystack)
        config["haystack_sha256"] = hashlib.sha256(haystack.encode()).hexdigest()
        args.key, prompts, rows_of = runner.identity, needle_prompts(args, model, tokenizer, haystack), needle_rows
    else:
        config["max_context"] = args.max_context
        args.key, prompts, rows_of = text_identity, text_prompts(args, model, tokenizer), text_rows
    store = ResultStore(args.out, config, args.key)
    try:
        run(args, store, prompts)
    finally:
        summary = {
            "table": args.table, "prompts": len(prompts), "rows": rows_of(args, store, prompts), "folder": str(args.out),
            "config": config, "machine": machine(), "versions": versions(), "git": revision(),
        }  # fmt: skip
        write_json(args.out / "summary.json", summary)
        store.close()
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)
    return summary


if __name__ == "__main__":
    with one_sentence("winnow_parts"):
        main(parse())
