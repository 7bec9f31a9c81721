"""The needle test: can the model still find a sentence, or several, in a long text when most of the cache is gone?

Each prompt is read once: its prefill is recorded over the full cache and replayed for every policy
and budget (:meth:`CompactCache.replay`), which keeps what a live prefill with that policy keeps.
Settings that keep about equally many entries answer in one batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from winnowkv.budget import Asked, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.errors import InputError
from winnowkv.evaluate.lookahead import FirstTokens, looked
from winnowkv.evaluate.needle.factorial import effects
from winnowkv.evaluate.needle.prompts import Hidden, PromptBuilder
from winnowkv.evaluate.report.machine import machine, versions
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.evaluate.settings import Kept, Setting, begun, continue_all, read_prompt
from winnowkv.models.info import ModelInfo, end_tokens, position_limit
from winnowkv.models.load import dtype_name
from winnowkv.policies import Policy, policy as make_policy
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import Report

# A line has needle and answer if its prompt hides one fact, else needles and answers.
IDENTITY_FIELDS = ("variant", "policy", "budget", "length", "depth", "question", "needle", "needles", "answer", "answers")
METRICS = ("correct", "found", "rouge1_f1", "rouge1_recall")
LONGEST = "max"  # as a length: the model's limit
NO_NUMBER = "a logit was not a number"
Advance = Callable[[str], None]


@dataclass(frozen=True)
class NeedleTest:
    """What to measure. ``policies`` and ``budgets`` stay as the user wrote them, for the results.

    ``needles`` are those of one ``variant``. ``timed``: every setting decodes alone, so that its ms/token are known.

    Raises
    ------
    PolicyError, BudgetError, InputError
        From :meth:`check`, before any work: unknown policies, budgets too small for a
        policy at one of the lengths, depths outside 0..1, lengths beyond the model.
    """

    policies: Sequence[str]
    budgets: Sequence[Asked]
    lengths: Sequence[int]
    depths: Sequence[float]
    needles: Sequence[Hidden]
    task: str = "localization"
    max_new_tokens: int = 24
    variant: str = "single"
    timed: bool = True

    def made(self) -> dict[str, Policy]:
        """Every policy that was asked for, by its spec."""
        return {spec: make_policy(spec) for spec in self.policies}

    def check(self, model: PreTrainedModel, builder: PromptBuilder) -> None:
        """Check everything before the first prompt is read; raises what the class names."""
        self.check_model(model)
        for length in self.lengths:
            for needle in self.needles:
                builder.build(needle, length, 0.0)  # raises if the haystack or the length is too short

    def check_model(self, model: PreTrainedModel) -> None:
        """What :meth:`check` can say without a tokenizer, of a model without weights, too."""
        if not (self.policies and self.budgets and self.lengths and self.depths and self.needles):
            raise InputError("the needle test needs at least one policy, budget, length, depth and needle")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, it must be at least 1")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise InputError(f"depth {depth} is outside 0 (start of the text) to 1 (its end)")
        limit, policies, task = position_limit(model), self.made().values(), TaskProfile.of(self.task)
        for policy in policies:
            policy.check(ModelInfo.of(model), task)
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
                    policy.check_prompt(policy.prompt_info(Budget.of(budget), length, 1, task))

    def cases(self) -> list[tuple[int, float, Hidden]]:
        """All prompts, as (length, depth, needle)."""
        return [(n, depth, needle) for n in self.lengths for needle in self.needles for depth in self.depths]

    def steps(self) -> int:
        """Number of measurements: cases x policies x budgets."""
        return len(self.cases()) * len(self.policies) * len(self.budgets)


def fit_lengths(asked: Sequence[int | str], model: PreTrainedModel, max_new_tokens: int) -> list[int]:
    """The lengths in tokens; :data:`LONGEST` becomes the model's positions less the new tokens."""
    limit = position_limit(model)
    if limit is None and LONGEST in asked:
        raise InputError(f"the model does not say how many positions it has: give a number in place of {LONGEST!r}")
    return list(dict.fromkeys((limit or 0) - max_new_tokens if n == LONGEST else int(n) for n in asked))


def check_metric(metric: str) -> None:
    """Raise InputError for a metric that no line has."""
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is unknown: use one of {', '.join(METRICS)}")


def identity(line: dict[str, Any]) -> Hashable:
    """The identity of a result line: lines of one measurement have the same."""
    values = [line.get(name) for name in IDENTITY_FIELDS]
    # JSON returns a list for a tuple.
    return tuple(tuple(value) if isinstance(value, list | tuple) else (type(value).__name__, value) for value in values)


def open_store(
    folder: Path, model: PreTrainedModel, name: str, builder: PromptBuilder, haystack: str, test: NeedleTest
) -> ResultStore:
    """Open the result folder of a test. Raises InputError if it holds lines of another model, haystack or settings."""
    config = {
        "model": name,
        "dtype": dtype_name(model.dtype),
        "chat": builder.chat,
        "task": test.task,
        "variant": test.variant,
        "max_new_tokens": test.max_new_tokens,
        "haystack_sha256": hashlib.sha256(haystack.encode()).hexdigest(),
    }
    return ResultStore(folder, config, identity)


def run(
    test: NeedleTest, model: PreTrainedModel, tokenizer: Any, builder: PromptBuilder, store: ResultStore, advance: Advance
) -> None:
    """Measure what the store does not hold yet; ``advance`` is called once for every line, old and new."""
    policies = test.made()
    stop = end_tokens(model, tokenizer)
    for length, depth, needle in test.cases():
        frame = {"variant": test.variant, "length": length, "depth": depth, **asdict(needle)}
        asked = [{"policy": p, "budget": b, **frame} for p in test.policies for b in test.budgets]
        todo = [line for line in asked if not store.has(identity(line))]
        for _ in range(len(asked) - len(todo)):
            advance("done before")
        if not todo:
            continue
        ids = builder.build(needle, length, depth)
        profile = replace(TaskProfile.of(test.task), structure=read_structure(tokenizer, ids))
        read = read_prompt(model, ids, [policies[line["policy"]] for line in todo], profile)
        reading = Reading(model, tokenizer, *read, needle.answers, test.max_new_tokens, stop, profile)
        lines: dict[Setting, list[dict[str, Any]]] = {}
        for line in todo:
            # A policy that evicts nothing answers alike at every budget: it is measured once.
            shared = line["budget"] if policies[line["policy"]].evicts else test.budgets[0]
            lines.setdefault(Setting(line["policy"], shared), []).append(line)
        for setting, measured in reading.measure(list(lines), policies, alone=test.timed):
            for line in lines[setting]:
                store.add({**line, **measured, "versions": versions()})
                advance(f"{length} tokens, depth {depth}, {', '.join(needle.answers)}")


@dataclass(frozen=True)
class Reading:
    """One recorded prompt, with everything needed to answer its question from replays of it."""

    model: PreTrainedModel
    tokenizer: Any
    cache: CompactCache
    logits: torch.Tensor
    seconds: float
    answers: Sequence[str]
    limit: int
    stop: Collection[int]
    task: TaskProfile = field(default_factory=TaskProfile)

    @cached_property
    def first(self) -> FirstTokens:
        """The first tokens of the full cache's answer, which policies with lookahead or draft read before they evict."""
        return FirstTokens(self.model, self.logits, self.limit, lambda tokens: tokens[-1] in self.stop)

    def measure(
        self, asked: Sequence[Setting], policies: Mapping[str, Policy], *, alone: bool
    ) -> Iterator[tuple[Setting, dict[str, Any]]]:
        """The measured fields of each setting's result line; settings of similar length decode together unless ``alone``."""
        waiting: list[Kept] = []
        for setting in asked:
            cache = self.cache.replay(policies[setting.policy], setting.budget, task=self.task)
            one = begun(setting, cache, self.first)
            if alone or not policies[setting.policy].evicts:
                yield from self.answer([one])
                continue
            waiting.append(one)
            # Answered as soon as they hold as much as the full cache: memory does not grow with the number of settings.
            if sum(each.cache.held_bytes for each in waiting if each.cache is not None) > self.cache.held_bytes:
                yield from self.answer(waiting)
                waiting = []
        yield from self.answer(waiting)

    def answer(self, kept: Sequence[Kept]) -> Iterator[tuple[Setting, dict[str, Any]]]:
        """Answer from these caches, those of similar length in one batch; a single cache also gets its median ms/token.

        The pace is that of the tokens after the lookahead.
        """
        clock = []

        def done(tokens: list[int]) -> bool:
            clock.append(time.perf_counter())
            return tokens[-1] in self.stop

        found = continue_all(self.model, kept, self.logits, (), self.limit, done)
        clock.append(time.perf_counter())
        for one in kept:
            if (cache := one.cache) is None:
                continue
            tokens, batch = found[one.setting].tokens, found[one.setting].batch
            output = self.text(tokens or [])
            timed = clock[: len(tokens) - len(one.spoken)] if tokens and one.ended is None and len(kept) == 1 else []
            measured = {
                "output": output,
                **judge(self.answers, output),
                "failed": NO_NUMBER if tokens is None else None,
                **kept_of(cache.report),
                **looked(cache),
                "prefill_s": round(self.seconds + cache.report.compress_seconds, 4),
                "decode_ms_per_token": pace(timed),
                "decode_batch": batch,
            }
            yield one.setting, measured

    def text(self, tokens: list[int]) -> str:
        """An answer's tokens as text, without the stop token."""
        kept = tokens[:-1] if tokens and tokens[-1] in self.stop else tokens
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text


def kept_of(report: Report) -> dict[str, Any]:
    """The fields of a result line that come from the report of one prompt."""
    return {
        "kept_entries_per_layer": report.kept_entries[0],
        "kept_bytes": report.kept_bytes,
        "full_bytes": report.full_bytes,
        "held_bytes": report.held_bytes,
        "compress_s": round(report.compress_seconds, 4),
        "prompt_tokens": report.prompt_tokens[0],
    }


def pace(clock: Sequence[float]) -> float | None:
    """The median milliseconds from one token to the next, None for a single token.

    The first step is left out: it allocates the buffers' room for growth.
    """
    gaps = [1000 * (b - a) for a, b in pairwise(clock)]
    steady = gaps[1:] or gaps
    return round(median(steady), 2) if steady else None


def judge(answers: str | Sequence[str], output: str) -> dict[str, Any]:
    """Whether the output contains the answer, or each of several (case-folded), and its ROUGE-1 against all of them.

    ``found`` is the fraction of the answers that the output contains; ``correct`` is whether it contains all.
    """
    from rouge_score.rouge_scorer import RougeScorer

    wanted = [answers] if isinstance(answers, str) else list(answers)
    rouge = RougeScorer(["rouge1"]).score(" ".join(wanted), output)["rouge1"]
    found = sum(answer.casefold() in output.casefold() for answer in wanted) / len(wanted)
    return {
        "correct": found == 1,
        "found": round(found, 4),
        "rouge1_recall": round(rouge.recall, 4),
        "rouge1_f1": round(rouge.fmeasure, 4),
    }


def summarize(test: NeedleTest, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means per policy, budget and length, in the test's order, over the lines that belong to this test.

    A line that failed is counted and left out of the means.
    """
    wanted = {identity({"variant": test.variant, "policy": p, "budget": b, "length": n, "depth": d, **asdict(x)})
              for p in test.policies for b in test.budgets for n, d, x in test.cases()}  # fmt: skip
    mine = [line for line in lines if identity(line) in wanted]
    good = [line for line in mine if not line.get("failed")]
    groups = []
    for length in test.lengths:
        for spec, policy in test.made().items():
            for budget in test.budgets:
                rows = [
                    r for r in good if (r["policy"], r["length"]) == (spec, length) and Budget(r["budget"]) == Budget(budget)
                ]
                if rows:
                    of = {"policy": spec, "budget": budget, "length": length, "evicts": policy.evicts}
                    groups.append({**of, **means(rows)})
    return {
        "variant": test.variant, "groups": groups, "effects": effects(groups), "lines": len(mine),
        "expected_lines": len(wanted), "failed": len(mine) - len(good), "machine": machine(), "versions": versions(),
    }  # fmt: skip


def means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores, bytes and seconds of one group, scores also by depth, and one example answer."""
    shown = rows[len(rows) // 2]
    paces = [row["decode_ms_per_token"] for row in rows if row["decode_ms_per_token"] is not None]
    depths = sorted({row["depth"] for row in rows})
    at = {str(depth): [row for row in rows if row["depth"] == depth] for depth in depths}
    return {
        "cases": len(rows),
        "accuracy": mean_of(rows, "correct"),
        **{metric: mean_of(rows, metric) for metric in METRICS},
        "by_depth": {metric: {depth: mean_of(some, metric) for depth, some in at.items()} for metric in METRICS},
        "kept_bytes": mean(row["kept_bytes"] for row in rows),
        "full_bytes": mean(row["full_bytes"] for row in rows),
        "prefill_s": median(row["prefill_s"] for row in rows),
        "compress_s": median(row["compress_s"] for row in rows),
        "decode_ms_per_token": median(paces) if paces else None,
        "whole_answers": sum(bool(row.get("whole")) for row in rows),
        "example": {"question": shown["question"], "answer": answer_text(shown), "output": shown["output"]},
    }


def mean_of(rows: Sequence[dict[str, Any]], metric: str) -> float:
    """Mean of a score."""
    scores: list[float] = [row[metric] for row in rows]
    return mean(scores)


def answer_text(line: dict[str, Any]) -> str:
    """The text that a right output contains; several answers are joined by commas."""
    return line["answer"] if "answer" in line else ", ".join(line["answers"])


def write_summary(test: NeedleTest, store: ResultStore, metric: str = METRICS[0]) -> dict[str, Any]:
    """Write ``summary.json``, ``needle.png`` and ``needle_kept.png`` of the finished lines; returns the summary."""
    from winnowkv.evaluate.report.plot import kept_lines, needle_maps

    summary = summarize(test, store.lines)
    write_json(store.folder / "summary.json", summary)
    if summary["groups"]:
        needle_maps(summary["groups"], metric, store.folder / "needle.png")
        kept_lines(summary["groups"], metric, store.folder / "needle_kept.png")
    return summary
