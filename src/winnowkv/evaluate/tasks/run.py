"""``winnow eval``: tasks x policies x budgets, one result line for each row and setting.

A :class:`Worker` holds a model and answers rows; :func:`run` gives it the rows that a result folder
lacks. ``scale/`` does the same with many workers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from winnowkv.budget import Asked, Budget
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.lookahead import FirstTokens, check_asked_later, looked
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.page import write_page
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.evaluate.report.summary import summarize
from winnowkv.evaluate.settings import (
    Answer,
    Kept,
    Setting,
    decode_together,
    peak_memory,
    policies_for,
    read_prompt,
    replay,
    settings,
)  # fmt: skip
from winnowkv.evaluate.tasks.protocol import PROTOCOLS, EncodedRow, encode_row
from winnowkv.evaluate.tasks.tasks import EvalTask, Row, find_tasks
from winnowkv.models.info import end_tokens, prompt_limit
from winnowkv.models.load import dtype_name, load
from winnowkv.prompt.chat import uses_chat
from winnowkv.prompt.classifier import task_profile
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile

TAIL_CHARACTERS = 600  # of a prompt's end, in a result line
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """What to measure: plain data only, so that it can be sent to other processes.

    Parameters
    ----------
    tasks, policies, budgets: as the user wrote them (``longbench``, ``snapkv:observe=16``, ``0.12``).
    protocol: ``official`` or ``context-only``.
    max_context: most prompt tokens; longer prompts are truncated by protocol. None: the model's limit. Rows that are made
        (RULER's 13 tasks) are made for this length instead, answer included; None: for 4096 tokens.
    batch: rows of a task whose answers are decoded together; as many full caches are held at once.
    limit: most rows of each task; the first ones, or drawn with ``seed`` if that is not 0.
    data: folder of local rows; None reads rows from the hub. Rows that are made come from neither.
    """

    tasks: tuple[str, ...]
    policies: tuple[str, ...]
    budgets: tuple[Asked, ...]
    protocol: str = "official"
    model: str = "embedded"
    data: str | None = None
    limit: int | None = None
    max_context: int | None = None
    chat: bool | None = None
    seed: int = 0
    batch: int = 1

    def check(self) -> None:
        """Check everything that needs neither model nor rows. Raises a WinnowError that names what is wrong."""
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol {self.protocol!r} is unknown: it is one of {', '.join(PROTOCOLS)}")
        for name, least in (("limit", 1), ("max_context", 64), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')} {value} is too small: give at least {least}")
        for budget in self.budgets:
            Budget.of(budget)
        settings(self.policies, self.budgets)
        if self.protocol == "context-only":
            check_asked_later(self.policies)
        find_tasks(self.tasks)

    def rows(self) -> list[tuple[EvalTask, Row]]:
        """Every row of every task, limited. Raises InputError for broken or missing data."""
        found = []
        for task in (one.for_model(self.model, self.max_context) for one in find_tasks(self.tasks)):
            rows = task.rows(Path(self.data) if self.data else None)
            if self.limit is not None and self.limit < len(rows):
                rows = random.Random(self.seed).sample(rows, self.limit) if self.seed else rows[: self.limit]
            twice = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
            if twice:
                raise InputError(f"task {task.name}: two rows are called {twice[0]!r}; give every row an id of its own")
            found += [(task, row) for row in rows]
        return found


class Work(NamedTuple):
    """One row of a task, and the settings to answer it with."""

    task: str
    row: Row
    settings: list[Setting]


@dataclass(frozen=True)
class Read:
    """A row after its prefill: the prompt, the prefill's seconds, and what every setting kept."""

    row: Row
    encoded: EncodedRow
    seconds: float
    kept: list[Kept]


def identity(line: dict[str, Any]) -> Hashable:
    """The identity of a result line: lines of one measurement have the same."""
    return (line["task"], line["row"], line["protocol"], *Setting(line["policy"], line["budget"]).key)


class Worker:
    """One model that answers rows. ``loaded`` is a model and its tokenizer, if they are loaded already.

    Raises ProfileError here, before the first row, if a policy lacks its calibration profile.
    """

    def __init__(self, asked: Evaluation, loaded: tuple[Any, Any] | None = None) -> None:
        self.asked = asked
        self.model: PreTrainedModel
        self.model, self.tokenizer = loaded or load(asked.model)
        self.tasks = {task.name: task for task in find_tasks(asked.tasks)}
        self.stop = end_tokens(self.model, self.tokenizer)
        self.chat = uses_chat(asked.chat, self.tokenizer)
        self.frame = {"versions": versions(), "git": revision(), "seed": asked.seed}
        policies_for(settings(asked.policies, asked.budgets), self.model, TaskProfile.of("localization"))

    @property
    def config(self) -> dict[str, Any]:
        """What all lines of one result folder must have in common."""
        return {
            "command": "eval", "model": self.asked.model, "dtype": dtype_name(self.model.dtype),
            "chat": self.chat, "protocol": self.asked.protocol, "max_context": self.limit(0),
        }  # fmt: skip

    def limit(self, new_tokens: int) -> int | None:
        """Most prompt tokens that leave positions for ``new_tokens``; None without a limit."""
        return prompt_limit(self.model, new_tokens, self.asked.max_context)

    def answer(self, shard: Sequence[Work]) -> list[dict[str, Any]]:
        """Result lines of some rows of one task, one for each setting. A row that fails has the reason in its lines."""
        task, lines, read = self.tasks[shard[0].task], [], []
        for work in shard:
            try:
                read.append(self.read(task, work))
            except (WinnowError, torch.OutOfMemoryError) as error:
                lines += self.failed(work, error)
        try:
            kept = [one for row in read for one in row.kept]
            answers = iter(decode_together(self.model, kept, task.max_new_tokens, self.ends(task)))
        except (WinnowError, torch.OutOfMemoryError) as error:
            if len(shard) > 1:
                del read, kept  # frees the batch's memory before its rows are tried one by one
                return [line for work in shard for line in self.answer([work])]
            return self.failed(shard[0], error)
        for row in read:
            lines += [self.line(task, row, one, next(answers)) for one in row.kept]
        return [{**line, **self.frame} for line in lines]

    def read(self, task: EvalTask, work: Work) -> Read:
        """Read a row's prompt once, and compress it by each setting."""
        most = None if task.sized else self.asked.max_context
        limit = prompt_limit(self.model, task.max_new_tokens, most)
        encoded = encode_row(work.row, task, self.tokenizer, self.asked.protocol, limit, self.chat)
        context, question = encoded.ids[: encoded.context_end], tuple(encoded.ids[encoded.context_end :])
        # A text that is compressed without its question is classified without it, too.
        profile = task_profile(encoded.context)
        if not question:  # the structure describes where the question is, and this text has none
            profile = replace(profile, structure=read_structure(self.tokenizer, context))
        made = policies_for(work.settings, self.model, profile)
        recorded, logits, seconds = read_prompt(self.model, context, made.values(), profile)
        first = None if question else FirstTokens(self.model, logits, task.max_new_tokens, self.ends(task))
        kept = [
            replace(one, logits=logits if one.logits is None else one.logits, question=question)
            for one in replay(recorded, work.settings, made, profile, first=first)
        ]
        return Read(work.row, encoded, seconds, kept)

    def failed(self, work: Work, error: Exception) -> list[dict[str, Any]]:
        """Lines of a row that could not be answered."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return failed_lines(work, self.asked.protocol, str(error), self.frame)

    def line(self, task: EvalTask, read: Read, kept: Kept, answer: Answer | None) -> dict[str, Any]:
        """The result line of one row and setting."""
        line = {
            "task": task.name, "row": read.row.id, "protocol": self.asked.protocol, **asdict(kept.setting),
            "answers": list(read.row.answers), "metric": task.metric, "score": None, "failed": kept.failed,
            "prompt_tail": read.encoded.text[-TAIL_CHARACTERS:], "prompt_tokens": len(read.encoded.ids),
            "truncated_tokens": read.encoded.truncated,
        }  # fmt: skip
        if kept.cache is None or answer is None:
            return line
        report = kept.cache.report
        line |= {
            "kept_entries": float(sum(report.kept_entries[0]) / len(report.kept_entries[0])),
            "kept_bytes": report.kept_bytes, "full_bytes": report.full_bytes, "held_bytes": report.held_bytes,
            "peak_bytes": report.peak_bytes, "prefill_s": round(read.seconds + report.compress_seconds, 4),
            "compress_s": round(report.compress_seconds, 4), "decode_s": round(answer.seconds, 4),
            "decode_tokens": answer.steps, "decode_batch": answer.batch, "peak_rss": peak_memory(), **looked(kept.cache),
        }  # fmt: skip
        if answer.tokens is None:
            return {**line, "failed": "a logit is not a number"}
        prediction = self.text(answer.tokens)
        return {**line, "prediction": prediction, "score": task.score(read.row, prediction)}

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's tokens as text, without stop tokens."""
        text: str = self.tokenizer.decode([t for t in tokens if t not in self.stop], skip_special_tokens=True)
        return text

    def ends(self, task: EvalTask) -> Callable[[list[int]], bool]:
        """A test of whether an answer is complete: at a stop token, or if the task says that more text changes nothing."""

        def done(tokens: list[int]) -> bool:
            return tokens[-1] in self.stop or (task.ends_early and task.complete(self.text(tokens)))

        return done


def missing(store: ResultStore, asked: Evaluation, rows: Sequence[tuple[EvalTask, Row]]) -> list[Work]:
    """Rows that the store lacks, each with the settings that it lacks."""
    every, work = settings(asked.policies, asked.budgets), []
    for task, row in rows:
        frame = {"task": task.name, "row": row.id, "protocol": asked.protocol}
        lacking = [s for s in every if not store.has(identity({**frame, **asdict(s)}))]
        if lacking:
            work.append(Work(task.name, row, lacking))
    return work


def shards(work: Sequence[Work], size: int) -> Iterator[list[Work]]:
    """Groups of consecutive rows of one task, at most ``size`` each."""
    for _, group in groupby(work, key=lambda one: one.task):
        rows = list(group)
        yield from (rows[begin : begin + size] for begin in range(0, len(rows), size))


def failed_lines(work: Work, protocol: str, reason: str, frame: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of a row that no setting could answer."""
    where = {"task": work.task, "row": work.row.id, "protocol": protocol}
    return [{**where, **asdict(setting), "score": None, "failed": reason, **frame} for setting in work.settings]


def run(worker: Worker, store: ResultStore, work: Sequence[Work], advance: Advance) -> None:
    """Answer every row of ``work`` and store its lines; ``advance`` is called after every line."""
    for shard in shards(work, worker.asked.batch):
        for line in worker.answer(shard):
            store.add(line)
            advance(f"{line['task']} {line['row']}")


def write_summary(store: ResultStore, config: dict[str, Any], asked: Evaluation) -> dict[str, Any]:
    """Write ``summary.json`` and ``report.html`` of the finished lines; returns the summary."""
    about = {**config, "asked": asdict(asked), "machine": machine(), "versions": versions(), "git": revision()}
    summary = summarize(store.lines, about)
    write_json(store.folder / "summary.json", summary)
    write_page(summary, store.lines, about, store.folder / "report.html")
    return summary
