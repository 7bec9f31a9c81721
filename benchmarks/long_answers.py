"""What long answers hold and how fast they come, with a decode budget and without: several long ones and short ones beside.

    python benchmarks/long_answers.py [--model embedded] [--new 4000] [--decode-budget 256] [--rows 4] [--json]

The same requests twice in one process: first with the decode budget, then without one. Long answers do not end before ``--new``
tokens; one short request after the other decodes beside them. Seconds are those of the clock and those of the processor, which
are what to compare on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

import winnowkv as wk
from winnowkv.cli.loading import load_model
from winnowkv.cli.main import one_sentence
from winnowkv.cli.tables import ResultTable, keys, numbers
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.prompt.chat import uses_chat
from winnowkv.report import MIB

SHARES = (0.125, 0.5, 1.0)  # of the new tokens, where what is held is noted
Line = dict[str, Any]


def measure(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], args: argparse.Namespace, limit: int | None, advance: Any
) -> Line:
    """All long answers of one engine. ``advance``: called after each step."""
    policy = {"policy": args.policy, "budget": args.budget}
    engine = wk.Engine(model, tokenizer, decode_budget=limit, compile=args.compile, task="aggregation", **policy)
    warm = engine.warm_up(len(prompts[0]), args.new) if args.compile else 0.0
    sampling = wk.Sampling(max_new_tokens=args.new, ignore_eos=True)
    short = wk.Sampling(max_new_tokens=args.short, ignore_eos=True)
    requests = [engine.submit(prompt, sampling) for prompt in prompts]
    while engine.waiting:
        engine.step()
    beside, ended = engine.submit(prompts[0], short), 0
    marks, held, begin = [round(share * args.new) for share in SHARES], {}, time.perf_counter()
    times, most, first, worked = {}, 0, sum(len(request.tokens) for request in requests), time.process_time()
    while any(request.completion is None for request in requests):
        if beside.completion is not None:
            ended += len(beside.tokens)
            beside = engine.submit(prompts[0], short)
        engine.step()
        done, now = len(requests[0].tokens), engine.held_bytes
        most = max(most, now)
        for mark in marks:
            if done >= mark - 1 and mark not in held:  # with the last token the rows end
                held[mark], times[mark] = now, time.process_time() - worked
        advance()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - worked
    engine.cancel(beside)
    tokens = sum(len(request.tokens) for request in requests) - first + ended + len(beside.tokens)
    edges = [0.0, *(times[mark] for mark in marks)]
    counts = [0, *marks]
    reports = [request.completion.report for request in requests if request.completion is not None]
    return {
        "decode_budget": limit, "held_bytes": {str(mark): held[mark] for mark in marks}, "most_bytes": most,
        "tokens_per_s": tokens / seconds, "tokens_per_cpu_s": tokens / cpu, "seconds": seconds, "cpu_s": cpu,
        "warm_up_s": warm, "short_answers": ended // args.short,
        "steps_per_cpu_s": [
            (counts[at + 1] - counts[at]) / (edges[at + 1] - edges[at]) for at in range(len(marks))
        ],
        "decode_entries": [report.decode_entries for report in reports],
        "distinct_last_500": [len(set(request.tokens[-500:])) for request in requests],
    }  # fmt: skip


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt")
    parser.add_argument("--new", type=int, default=4000, help="tokens of a long answer")
    parser.add_argument("--short", type=int, default=64, help="tokens of a short one")
    parser.add_argument("--rows", type=int, default=4, help="long answers at a time")
    parser.add_argument("--decode-budget", type=int, default=256)
    parser.add_argument("--compile", action="store_true", help="compiled decode steps")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args(words)


def main(args: argparse.Namespace) -> Line:
    """Measure, print, return."""
    model, tokenizer = load_model(args.model, lambda model: None)
    builder = PromptBuilder(tokenizer, read_haystack(), chat=uses_chat(None, tokenizer))
    needles = read_needles()
    prompts = [builder.build(needles[row % len(needles)], args.tokens, (row + 0.5) / args.rows) for row in range(args.rows)]
    limits, rows, code = (args.decode_budget, None), [], revision()
    with Progress(console=Console(stderr=True)) as progress:
        for limit in limits:
            task = progress.add_task("no decode budget" if limit is None else f"decode budget {limit}", total=args.new)
            rows.append(measure(model, tokenizer, prompts, args, limit, lambda task=task: progress.advance(task)))
            print(json.dumps(rows[-1]), file=sys.stderr)  # a long run that is stopped has measured something
    summary = {
        "model": args.model, "policy": args.policy, "budget": args.budget, "tokens": len(prompts[0]), "new": args.new,
        "short": args.short, "rows": args.rows, "compile": args.compile, "lines": rows, "machine": machine(),
        "versions": versions(), "git": code,
    }  # fmt: skip
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)
    return summary


def show(summary: Line) -> None:
    """Print the table."""
    where, marks = summary["machine"], list(summary["lines"][0]["held_bytes"])
    title = f"{summary['rows']} answers of {summary['new']} tokens, prompts of {summary['tokens']} at {summary['budget']}"
    table = ResultTable(
        [
            *keys("decode\nbudget"),
            *numbers([*(f"MiB at\n{mark}" for mark in marks), "most\nMiB", "tokens\na second", "a CPU\nsecond"]),
        ],
        f"{title}; {where['accelerator'] or where['processor']}, {where['threads']} threads",
    )
    for line in summary["lines"]:
        table.add(
            str(line["decode_budget"] or "none"), *(f"{line['held_bytes'][mark] / MIB:.1f}" for mark in marks),
            f"{line['most_bytes'] / MIB:.1f}", f"{line['tokens_per_s']:.0f}",
            f"{line['tokens_per_cpu_s']:.0f}",
        )  # fmt: skip
    table.print()


if __name__ == "__main__":
    with one_sentence("long_answers"):
        main(parse())
