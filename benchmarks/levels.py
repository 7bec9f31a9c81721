"""What the levels of quality cost: time to the first token, the pause where something is chosen, a step before and after it,
and the bytes held; one process, the levels in turns, medians of the rounds.

    python benchmarks/levels.py [--model embedded] [--tokens 2048] [--new 160] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import winnowkv as wk
from winnowkv.cli.loading import load_model
from winnowkv.cli.main import one_sentence
from winnowkv.cli.tables import ResultTable, keys, numbers
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.models.devices import input_device
from winnowkv.policies.quality import LEVELS
from winnowkv.prompt.chat import uses_chat
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import MIB

LAST_STEPS = 32  # at the answer's end, whose median is a step after the choice
COLUMNS = ("first\ntoken s", "step ms\nbefore", "pause s", "step ms\nafter", "answer s", "peak\nMiB", "held\nMiB")
Line = dict[str, Any]


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, task: TaskProfile, spec: str, budget: float, level: str | None, new: int) -> Line:
    """One answer of ``new`` tokens; ``level`` None is the full cache."""
    cache = wk.CompactCache(model, "full" if level is None else spec, budget, task=task, quality=level)
    begin = time.perf_counter()
    token = wk.prefill(model, ids, cache).argmax(-1, keepdim=True)
    token.item()
    first, steps, held = time.perf_counter() - begin, [], []
    for _ in range(new):
        begin = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        token.item()
        steps.append(time.perf_counter() - begin)
        held.append(cache.held_bytes)
    usual = median(steps[-LAST_STEPS:])
    return {
        "first_token_s": first, "pause_s": max(max(steps) - usual, 0.0), "step_ms": 1000 * usual,
        "before_ms": 1000 * median(steps[:LAST_STEPS]), "answer_s": first + sum(steps),
        "peak_bytes": max(cache.report.peak_bytes, *held), "held_bytes": held[-1], "full_bytes": cache.report.full_bytes,
    }  # fmt: skip


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--policy", default="winnow")
    parser.add_argument("--budget", type=float, default=0.12)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--new", type=int, default=160, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args(words)


def main(args: argparse.Namespace) -> Line:
    """Measure, print, return."""
    model, tokenizer = load_model(args.model, lambda model: None)
    builder = PromptBuilder(tokenizer, read_haystack(), chat=uses_chat(None, tokenizer))
    row = builder.build(read_needles()[0], args.tokens, 0.5)
    task = TaskProfile("localization", structure=read_structure(tokenizer, row))
    ids = torch.tensor([row], device=input_device(model))
    levels: list[str | None] = [None, *LEVELS]
    found: dict[str | None, list[Line]] = {level: [] for level in levels}
    for level in levels:  # the first of each is not counted: it makes kernels and buffers
        measure(model, ids, task, args.policy, args.budget, level, args.new)
    for level in track(levels * args.rounds, "levels", console=Console(stderr=True)):
        found[level].append(measure(model, ids, task, args.policy, args.budget, level, args.new))
    rows = [
        {"level": level or "full cache", **{name: median(line[name] for line in lines) for name in lines[0]}}
        for level, lines in found.items()
    ]
    summary = {
        "model": args.model, "policy": args.policy, "budget": args.budget, "tokens": len(row), "new": args.new,
        "rounds": args.rounds, "rows": rows, "machine": machine(), "versions": versions(), "git": revision(),
    }  # fmt: skip
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)
    return summary


def show(summary: Line) -> None:
    """Print the table."""
    where = summary["machine"]
    title = f"{summary['policy']} at {summary['budget']}, {summary['tokens']} tokens, answers of {summary['new']}"
    table = ResultTable(
        [*keys("level"), *numbers(COLUMNS)],
        f"{title}; {where['accelerator'] or where['processor']}, {where['threads']} threads",
    )  # fmt: skip
    for row in summary["rows"]:
        table.add(
            row["level"], f"{row['first_token_s']:.2f}", f"{row['before_ms']:.1f}", f"{row['pause_s']:.2f}",
            f"{row['step_ms']:.1f}", f"{row['answer_s']:.1f}", f"{row['peak_bytes'] / MIB:.1f}",
            f"{row['held_bytes'] / MIB:.1f}",
        )  # fmt: skip
    table.print()


if __name__ == "__main__":
    with one_sentence("levels"):
        main(parse())
