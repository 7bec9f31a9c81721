"""The needle test: can the model still find one sentence in a long text when most of the cache is gone?

One prefill serves every policy and budget of a case: it is recorded once over the full
cache and replayed for each (:meth:`CompactCache.replay`), which keeps what a live prefill
with that policy keeps.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from winnowkv.budget import Budget
from winnowkv.cache import CompactCache
from winnowkv.engine import greedy, prefill
from winnowkv.errors import InputError
from winnowkv.evaluate.factorial import effects
from winnowkv.evaluate.machine import machine, versions
from winnowkv.evaluate.prompts import Needle, PromptBuilder
from winnowkv.evaluate.store import ResultStore, write_json
from winnowkv.fingerprint import Fingerprint
from winnowkv.models import dtype_name, position_limit
from winnowkv.policies import Policy, Prompt, policy as make_policy
from winnowkv.task import TaskProfile

IDENTITY = ("policy", "budget", "length", "depth", "needle", "question", "answer")
Advance = Callable[[str], None]


@dataclass(frozen=True)
class NeedleTest:
    """What to measure. ``policies`` and ``budgets`` are kept as they were asked, for the results.

    Raises
    ------
    PolicyError, BudgetError, InputError
        From :meth:`check`, before any work: unknown policies, budgets too small for a
        policy at one of the lengths, depths outside 0..1, lengths beyond the model.
    """

    policies: Sequence[str]
    budgets: Sequence[int | float]
    lengths: Sequence[int]
    depths: Sequence[float]
    needles: Sequence[Needle]
    task: str = "localization"
    max_new_tokens: int = 24

    def resolved(self, model: PreTrainedModel | None = None) -> dict[str, Policy]:
        """Every asked policy with its task decided, and with its model where that is given."""
        profile = TaskProfile.of(self.task)
        made = {spec: make_policy(spec).for_task(profile) for spec in self.policies}
        if model is None:
            return made
        fingerprint = Fingerprint.of(model)
        return {spec: policy.for_model(fingerprint) for spec, policy in made.items()}

    def check(self, model: PreTrainedModel, builder: PromptBuilder) -> None:
        """Complain about everything that cannot work, before the first prompt is read."""
        if not (self.policies and self.budgets and self.lengths and self.depths and self.needles):
            raise InputError("the needle test needs at least one policy, budget, length, depth and needle")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, it must be at least 1")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise InputError(f"depth {depth} is outside 0 (start of the text) to 1 (its end)")
        limit, policies = position_limit(model), self.resolved(model).values()
        for length in self.lengths:
            if length < 1:
                raise InputError(f"length {length} must be at least 1 token")
            if limit is not None and length + self.max_new_tokens > limit:
                raise InputError(
                    f"length {length} with {self.max_new_tokens} new tokens passes the model's {limit} positions: "
                    f"ask for at most {limit - self.max_new_tokens}"
                )
            for policy in policies:
                for budget in self.budgets:
                    entries = Budget.of(budget).entries(length)
                    if policy.evicts and policy.observe < length and entries < length:
                        policy.check(Prompt(tokens=length, layers=1, budget=entries))
            for needle in self.needles:
                builder.build(needle, length, 0.0)  # complains where the haystack or the length is too short

    def cases(self) -> list[tuple[int, float, Needle]]:
        """All prompts: lengths x needles x depths."""
        return [(n, depth, needle) for n in self.lengths for needle in self.needles for depth in self.depths]

    def steps(self) -> int:
        """Measurements in all: cases x policies x budgets."""
        return len(self.cases()) * len(self.policies) * len(self.budgets)


def identity(line: dict[str, Any]) -> Hashable:
    """What tells two result lines apart."""
    return tuple((type(line[name]).__name__, line[name]) for name in IDENTITY)


def open_store(
    folder: Path, model: PreTrainedModel, name: str, builder: PromptBuilder, haystack: str, test: NeedleTest
) -> ResultStore:
    """The result folder of a test; lines of other models, haystacks or settings are refused."""
    config = {
        "model": name,
        "dtype": dtype_name(model.dtype),
        "chat": builder.chat,
        "task": test.task,
        "max_new_tokens": test.max_new_tokens,
        "haystack_sha256": hashlib.sha256(haystack.encode()).hexdigest(),
    }
    return ResultStore(folder, config, identity)


def run(
    test: NeedleTest, model: PreTrainedModel, tokenizer: Any, builder: PromptBuilder, store: ResultStore, advance: Advance
) -> None:
    """Measure what the store does not hold yet, line by line; ``advance`` is told of every line, old and new."""
    policies = test.resolved(model)
    stop = stop_tokens(model, tokenizer)
    for length, depth, needle in test.cases():
        frame = {"length": length, "depth": depth, **asdict(needle)}
        asked = [{"policy": p, "budget": b, **frame} for p in test.policies for b in test.budgets]
        todo = [line for line in asked if not store.has(identity(line))]
        for _ in range(len(asked) - len(todo)):
            advance("done before")
        if not todo:
            continue
        advance_to = f"{length} tokens, depth {depth}, {needle.answer}"
        ids = torch.tensor([builder.build(needle, length, depth)], device=model.device)
        record = max(policies[line["policy"]].reads(ids.shape[1]) for line in todo)
        begin = time.perf_counter()
        recorded = CompactCache(model, "full", 1, record=max(record, 1))
        logits = prefill(model, ids, recorded)
        logits.argmax(-1).item()  # wait for the device
        seconds = time.perf_counter() - begin
        whole: dict[str, dict[str, Any]] = {}  # a policy that evicts nothing gives every budget the same
        for line in todo:
            spec = line["policy"]
            measured = whole.get(spec)
            if measured is None:
                cache = recorded.replay(policies[spec], line["budget"])
                output, decode_ms = decode(model, tokenizer, cache, logits, test.max_new_tokens, stop)
                measured = {
                    "output": output,
                    **judge(needle.answer, output),
                    "kept_entries_per_layer": cache.report.kept_entries[0],
                    "kept_bytes": cache.report.kept_bytes,
                    "full_bytes": cache.report.full_bytes,
                    "held_bytes": cache.report.held_bytes,
                    "prefill_s": round(seconds + cache.report.compress_seconds, 4),
                    "compress_s": round(cache.report.compress_seconds, 4),
                    "decode_ms_per_token": None if decode_ms is None else round(decode_ms, 2),
                    "prompt_tokens": ids.shape[1],
                }
                if not policies[spec].evicts:
                    whole[spec] = measured
            store.add({**line, **measured, "versions": versions()})
            advance(advance_to)


def decode(
    model: PreTrainedModel, tokenizer: Any, cache: CompactCache, logits: torch.Tensor, limit: int, stop: set[int]
) -> tuple[str, float | None]:
    """The answer's text, and the median milliseconds from one token to the next (None for a single token).

    The first step is left out of the median: it makes the buffers' room for growth.
    """
    tokens, clock = [], [time.perf_counter()]
    for token in greedy(model, cache, logits, limit, stop):
        tokens.append(token)
        clock.append(time.perf_counter())
    if len(tokens) < limit:
        clock.append(time.perf_counter())  # the step that ended in a stop token
    gaps = [1000 * (b - a) for a, b in pairwise(clock[1:])]
    steady = gaps[1:] or gaps
    return tokenizer.decode(tokens, skip_special_tokens=True), median(steady) if steady else None


def judge(answer: str, output: str) -> dict[str, Any]:
    """Exact containment, case-folded, and ROUGE-1 of the output against the answer."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rouge1"]).score(answer, output)["rouge1"]
    return {
        "correct": answer.casefold() in output.casefold(),
        "rouge1_recall": round(rouge.recall, 4),
        "rouge1_f1": round(rouge.fmeasure, 4),
    }


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the model's generation config and the tokenizer's end token."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    listed = ends if isinstance(ends, list) else [ends]
    return {int(end) for end in [*listed, tokenizer.eos_token_id] if end is not None}


def summarize(test: NeedleTest, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means per policy, budget and length, in the order asked, over the lines that this test asks for."""
    wanted = {identity({"policy": p, "budget": b, "length": n, "depth": d, **asdict(x)})
              for p in test.policies for b in test.budgets for n, d, x in test.cases()}  # fmt: skip
    mine = [line for line in lines if identity(line) in wanted]
    groups = []
    for length in test.lengths:
        for policy in test.policies:
            for budget in test.budgets:
                rows = [r for r in mine if (r["policy"], r["budget"], r["length"]) == (policy, budget, length)
                        and type(r["budget"]) is type(budget)]  # fmt: skip
                if rows:
                    groups.append({"policy": policy, "budget": budget, "length": length, **means(rows)})
    return {
        "groups": groups, "effects": effects(groups), "lines": len(mine), "expected_lines": len(wanted),
        "machine": machine(), "versions": versions(),
    }  # fmt: skip


def means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, scores, bytes and seconds of one group, and one example answer."""
    shown = rows[len(rows) // 2]
    paces = [row["decode_ms_per_token"] for row in rows if row["decode_ms_per_token"] is not None]
    return {
        "cases": len(rows),
        "accuracy": mean(row["correct"] for row in rows),
        "rouge1_recall": mean(row["rouge1_recall"] for row in rows),
        "rouge1_f1": mean(row["rouge1_f1"] for row in rows),
        "kept_bytes": mean(row["kept_bytes"] for row in rows),
        "full_bytes": mean(row["full_bytes"] for row in rows),
        "prefill_s": median(row["prefill_s"] for row in rows),
        "compress_s": median(row["compress_s"] for row in rows),
        "decode_ms_per_token": median(paces) if paces else None,
        "accuracy_by_depth": {str(d): mean(r["correct"] for r in rows if r["depth"] == d)
                              for d in sorted({r["depth"] for r in rows})},
        "example": {"question": shown["question"], "answer": shown["answer"], "output": shown["output"]},
    }  # fmt: skip


def write_summary(test: NeedleTest, store: ResultStore) -> dict[str, Any]:
    """``summary.json`` and ``needle.png`` of what is finished; returns the summary."""
    from winnowkv.evaluate.plot import depth_map

    summary = summarize(test, store.lines)
    write_json(store.folder / "summary.json", summary)
    if summary["groups"]:
        depth_map(summary["groups"], store.folder / "needle.png")
    return summary
