"""``winnow eval``: tasks x policies x budgets, a line a row and setting, in one process or as the part of many.

A :class:`Worker` holds a model and answers rows; :func:`run` feeds it what a result folder
lacks. ``scale/`` feeds many workers the same way.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from winnowkv.budget import Budget
from winnowkv.classify import task_profile
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.machine import machine, revision, versions
from winnowkv.evaluate.needle import stop_tokens
from winnowkv.evaluate.page import write_page
from winnowkv.evaluate.protocol import PROTOCOLS, encode_row
from winnowkv.evaluate.settings import Setting, continue_all, peak_memory, policies_for, read_prompt, replay, settings
from winnowkv.evaluate.store import ResultStore, write_json
from winnowkv.evaluate.summary import summarize
from winnowkv.evaluate.tasks import EvalTask, Row, find_tasks
from winnowkv.models import dtype_name, load, position_limit
from winnowkv.task import TaskProfile

TAIL = 600  # characters of a prompt's end that stand in a result line
Advance = Callable[[str], None]
Work = tuple[str, Row, list[Setting]]  # a task's name, one of its rows, and the settings to answer it with


@dataclass(frozen=True)
class Evaluation:
    """What to measure. Everything is plain data, so that it travels to other processes.

    Parameters
    ----------
    tasks, policies, budgets: as they were asked (``longbench``, ``snapkv:observe=16``, ``0.12``).
    protocol: ``official`` or ``context-only``.
    max_context: most prompt tokens; longer prompts are truncated by protocol. None: the model's limit.
    limit: most rows a task; drawn with ``seed`` where that is not 0, else the first.
    data: folder of local rows; None reads them from the hub.
    """

    tasks: tuple[str, ...]
    policies: tuple[str, ...]
    budgets: tuple[int | float, ...]
    protocol: str = "official"
    model: str = "embedded"
    data: str | None = None
    limit: int | None = None
    max_context: int | None = None
    chat: bool | None = None
    seed: int = 0

    def check(self) -> None:
        """Complain about everything that can be seen without model and rows. Raises a WinnowError that names it."""
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol {self.protocol!r} is unknown: it is one of {', '.join(PROTOCOLS)}")
        for name, least in (("limit", 1), ("max_context", 64)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')} {value} is too small: give at least {least}")
        for budget in self.budgets:
            Budget.of(budget)
        settings(self.policies, self.budgets)
        find_tasks(self.tasks)

    def rows(self) -> list[tuple[EvalTask, Row]]:
        """Every row of every task, limited. Raises InputError for broken or missing data."""
        found = []
        for task in find_tasks(self.tasks):
            rows = task.rows(Path(self.data) if self.data else None)
            if self.limit is not None and self.limit < len(rows):
                rows = random.Random(self.seed).sample(rows, self.limit) if self.seed else rows[: self.limit]
            twice = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
            if twice:
                raise InputError(f"task {task.name}: two rows are called {twice[0]!r}; give every row an id of its own")
            found += [(task, row) for row in rows]
        return found


def identity(line: dict[str, Any]) -> Hashable:
    """What tells two result lines apart."""
    return (line["task"], line["row"], line["protocol"], *Setting(line["policy"], line["budget"]).key)


class Worker:
    """One model that answers rows. ``loaded`` is a model and its tokenizer, where they are there already.

    Raises ProfileError at once, and not in every row, where a policy lacks its calibration profile.
    """

    def __init__(self, asked: Evaluation, loaded: tuple[Any, Any] | None = None) -> None:
        self.asked = asked
        self.model: PreTrainedModel
        self.model, self.tokenizer = loaded or load(asked.model)
        self.tasks = {task.name: task for task in find_tasks(asked.tasks)}
        self.stop = stop_tokens(self.model, self.tokenizer)
        self.chat = bool(self.tokenizer.chat_template) if asked.chat is None else asked.chat
        self.frame = {"versions": versions(), "git": revision(), "seed": asked.seed}
        policies_for(settings(asked.policies, asked.budgets), self.model, TaskProfile.of("localization"))

    @property
    def config(self) -> dict[str, Any]:
        """What lines must have in common to stand in one result folder."""
        return {
            "command": "eval", "model": self.asked.model, "dtype": dtype_name(self.model.dtype),
            "chat": self.chat, "protocol": self.asked.protocol, "max_context": self.limit(0),
        }  # fmt: skip

    def limit(self, new_tokens: int) -> int | None:
        """Most prompt tokens, so that ``new_tokens`` still have positions."""
        positions = position_limit(self.model)
        ends = [n for n in (self.asked.max_context, positions and positions - new_tokens) if n is not None]
        return min(ends, default=None)

    def answer(self, task_name: str, row: Row, asked: Sequence[Setting]) -> list[dict[str, Any]]:
        """Result lines of one row, one for each setting. What goes wrong with the row stands in its lines."""
        task = self.tasks[task_name]
        frame = {"task": task.name, "row": row.id, "protocol": self.asked.protocol}
        try:
            lines = list(self.measure(task, row, asked))
        except (WinnowError, torch.OutOfMemoryError) as error:
            torch.cuda.empty_cache()
            lines = [{**asdict(setting), "score": None, "failed": str(error)} for setting in asked]
        return [{**frame, **line, **self.frame} for line in lines]

    def measure(self, task: EvalTask, row: Row, asked: Sequence[Setting]) -> Iterator[dict[str, Any]]:
        """Read the row's prompt once, then answer with what each setting keeps of it."""
        encoded = encode_row(row, task, self.tokenizer, self.asked.protocol, self.limit(task.max_new_tokens), self.chat)
        context, question = encoded.ids[: encoded.context_end], encoded.ids[encoded.context_end :]
        # What is compressed before the question is known is classified without it, too.
        made = policies_for(asked, self.model, task_profile(encoded.context))
        recorded, logits, seconds = read_prompt(self.model, context, made)
        kept = replay(recorded, asked, made)
        answers = continue_all(self.model, kept, logits, question, task.max_new_tokens, self.ends(task))
        for one in kept:
            line = {
                **asdict(one.setting), "answers": list(row.answers), "metric": task.metric, "score": None, "failed": one.failed,
                "prompt_tail": encoded.text[-TAIL:], "prompt_tokens": len(encoded.ids), "truncated_tokens": encoded.truncated,
            }  # fmt: skip
            if one.cache is not None:
                report = one.cache.report
                found = answers[one.setting]
                line |= {
                    "kept_entries": float(sum(report.kept_entries[0]) / len(report.kept_entries[0])),
                    "kept_bytes": report.kept_bytes, "full_bytes": report.full_bytes, "held_bytes": report.held_bytes,
                    "peak_bytes": report.peak_bytes, "prefill_s": round(seconds + report.compress_seconds, 4),
                    "compress_s": round(report.compress_seconds, 4), "decode_s": round(found["decode_s"], 4),
                    "decode_tokens": found["decode_tokens"], "decode_batch": found["decode_batch"], "peak_rss": peak_memory(),
                }  # fmt: skip
                if found["tokens"] is None:
                    line["failed"] = "a logit is not a number"
                else:
                    line["prediction"] = self.text(found["tokens"])
                    line["score"] = task.score(row, line["prediction"])
            yield line

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's tokens as text, without what ended it."""
        return self.tokenizer.decode([t for t in tokens if t not in self.stop], skip_special_tokens=True)

    def ends(self, task: EvalTask) -> Callable[[list[int]], bool]:
        """When an answer is complete: at a stop token, or where the task says that more text changes nothing."""

        def done(tokens: list[int]) -> bool:
            return tokens[-1] in self.stop or task.complete(self.text(tokens))

        return done


def missing(
    store: ResultStore, asked: Evaluation, rows: Sequence[tuple[EvalTask, Row]]
) -> list[tuple[str, Row, list[Setting]]]:
    """Rows that the store lacks, with the settings that it lacks of each."""
    every, work = settings(asked.policies, asked.budgets), []
    for task, row in rows:
        frame = {"task": task.name, "row": row.id, "protocol": asked.protocol}
        lacking = [s for s in every if not store.has(identity({**frame, **asdict(s)}))]
        if lacking:
            work.append((task.name, row, lacking))
    return work


def run(worker: Worker, store: ResultStore, work: Sequence[Work], advance: Advance) -> None:
    """Answer every row of ``work`` and store its lines; ``advance`` is told of every line."""
    for name, row, lacking in work:
        for line in worker.answer(name, row, lacking):
            store.add(line)
            advance(f"{name} {row.id}")


def write_summary(store: ResultStore, config: dict[str, Any], asked: Evaluation) -> dict[str, Any]:
    """``summary.json`` and ``report.html`` of what is finished; returns the summary."""
    about = {**config, "asked": asdict(asked), "machine": machine(), "versions": versions(), "git": revision()}
    summary = summarize(store.lines, about)
    write_json(store.folder / "summary.json", summary)
    write_page(summary, store.lines, about, store.folder / "report.html")
    return summary
