"""``winnow bench``: what compression costs and saves in seconds and bytes, cell by cell, next to plain transformers.

A cell is one kind of measurement of one policy and budget at one context: one line of the results. A finished cell is
not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from winnowkv.budget import Asked, Budget
from winnowkv.errors import InputError
from winnowkv.evaluate.bench import cells as bench_cells
from winnowkv.evaluate.bench.caches import BENCH_TASK
from winnowkv.evaluate.bench.cells import GROWTH_BATCH, GROWTH_BUDGET, GROWTH_PROMPT_TOKENS, WARMUP_STEPS, BenchSetup, Cell
from winnowkv.evaluate.bench.clock import Clock
from winnowkv.evaluate.needle.prompts import PromptBuilder
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.evaluate.settings import Setting
from winnowkv.models.info import ModelInfo, position_limit
from winnowkv.models.load import dtype_name
from winnowkv.policies import policy as make_policy
from winnowkv.prompt.task import TaskProfile

IDENTITY_FIELDS = ("kind", "policy", "budget", "context", "batch", "compiled", "kv_memory", "shortest", "longest")
MIN_GROWTH_REQUESTS = 2 * GROWTH_BATCH  # memory is read once in between
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes
    ----------
    settings: policies at budgets.
    contexts: lengths of prompts, in tokens; batches: requests that decode together.
    rounds, steps: pairs of prefills and decode steps of each cell, in turns with what they are compared with.
    kv_memory: bytes of keys and values that an engine may hold.
    serve_context, new_tokens: prompt tokens and new tokens of the requests in that memory.
    requests: short requests in a row, to see whether memory grows; 0 for none.
    compile: measure compiled decode steps, too.
    """

    settings: Sequence[Setting]
    contexts: Sequence[int]
    batches: Sequence[int]
    rounds: int = 7
    steps: int = 40
    kv_memory: int = 256 * 2**20
    serve_context: int = 4096
    new_tokens: int = 128
    requests: int = 500
    compile: bool = False

    @property
    def room(self) -> int:
        """New tokens for which a prompt leaves positions in the model."""
        return max(self.steps + WARMUP_STEPS, self.new_tokens)

    @property
    def flat_entries(self) -> int:
        """Entries that the shortest and the longest prompt both keep in the cell ``flat``: half of the shortest."""
        return min(self.contexts) // 2

    def cells(self) -> list[Cell]:
        """Every cell: memory growth first, then context by context."""
        found = [self._cell("growth", one, budget=GROWTH_BUDGET) for one in self._policies()] if self.requests else []
        for context in sorted(self.contexts):
            for one in self.settings:
                found.append(self._cell("prefill", one, context=context))
                found += [self._cell("decode", one, context=context, batch=batch) for batch in self.batches]
                if self.compile:
                    found.append(self._cell("decode", one, context=context, batch=1, compiled=True))
        if len(self.contexts) > 1:
            ends = {"shortest": min(self.contexts), "longest": max(self.contexts)}
            evicting = [one for one in self._policies() if make_policy(one.policy).evicts]
            found += [self._cell("flat", one, budget=self.flat_entries, **ends) for one in evicting]
        for one in self.settings:
            for compiled in (False, True) if self.compile else (False,):
                found.append(self._cell("serve", one, context=self.serve_context, kv_memory=self.kv_memory, compiled=compiled))
        return found

    def check(self, model: PreTrainedModel, builder: PromptBuilder) -> None:
        """Check everything before the first measurement. Raises a WinnowError that names what is wrong."""
        self.check_model(model)
        limit = position_limit(model)
        for tokens in {cell["context"] for cell in self.cells() if cell["kind"] == "prefill"}:
            # raises if the haystack is too short
            bench_cells.build(builder, tokens if limit is None else min(tokens, limit - self.room))

    def check_model(self, model: PreTrainedModel) -> None:
        """What :meth:`check` can say without a tokenizer, of a model without weights, too."""
        for name, value, least in (
            ("rounds", self.rounds, 1), ("steps", self.steps, 1), ("new_tokens", self.new_tokens, WARMUP_STEPS + 3),
            ("batch", min(self.batches), 1), ("context", min([*self.contexts, self.serve_context]), 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"{name} is {value}, it must be at least {least}")
        if 0 < self.requests < MIN_GROWTH_REQUESTS:
            raise InputError(
                f"{self.requests} requests in a row show no growth: ask for at least {MIN_GROWTH_REQUESTS}, or for 0"
            )
        limit = position_limit(model)
        for context in {*self.contexts, self.serve_context}:
            if limit is not None and not self.room < context <= limit:
                raise InputError(
                    f"a context of {context} tokens cannot be measured with {self.room} new ones on a model with {limit} "
                    f"positions: give {self.room + 1} to {limit}"
                )
        for cell in self.cells():
            policy, task = make_policy(cell["policy"]), TaskProfile.of(BENCH_TASK)
            policy.check(ModelInfo.of(model), task)
            if policy.looks:
                raise InputError(
                    f"{cell['policy']} chooses after its prompt, and prefill and decode are timed apart here: leave lookahead, "
                    "draft and refit out; benchmarks/gpu_check.py times what they cost"
                )
            lengths = [cell[name] for name in ("context", "shortest", "longest") if cell.get(name)] or [GROWTH_PROMPT_TOKENS[0]]
            for tokens in (length if limit is None else min(length, limit - self.room) for length in lengths):
                policy.check_prompt(policy.prompt_info(Budget.of(cell["budget"]), tokens, 1, task))

    def config(self, model: PreTrainedModel, name: str, builder: PromptBuilder) -> dict[str, Any]:
        """What all lines of one result folder must have in common."""
        here = machine()
        return {
            "model": name, "dtype": dtype_name(model.dtype), "chat": builder.chat, "rounds": self.rounds, "steps": self.steps,
            "new_tokens": self.new_tokens, "requests": self.requests,
            "machine": f"{here['accelerator'] or here['processor']}, {here['threads']} threads",
        }  # fmt: skip

    def _policies(self) -> list[Setting]:
        """Each policy once."""
        return list({one.policy: one for one in self.settings}.values())

    def _cell(self, kind: str, one: Setting, *, budget: Asked | None = None, **fields: Any) -> Cell:
        return {
            "kind": kind, "policy": one.policy, "budget": one.budget if budget is None else budget, "compiled": False, **fields,
        }  # fmt: skip


def identity(line: Cell) -> Hashable:
    """The identity of a cell."""
    return tuple((type(value).__name__, value) for value in map(line.get, IDENTITY_FIELDS))


def open_store(folder: Path, model: PreTrainedModel, name: str, builder: PromptBuilder, bench: Bench) -> ResultStore:
    """Open the result folder. Raises InputError if it holds lines of another model, machine or number of rounds."""
    return ResultStore(folder, bench.config(model, name, builder), identity)


def run(
    bench: Bench, model: PreTrainedModel, tokenizer: Any, builder: PromptBuilder, haystack: str, store: ResultStore,
    advance: Advance,
) -> None:  # fmt: skip
    """Measure the cells that the store does not hold yet; ``advance`` is called after every cell, old and new."""
    setup = BenchSetup(model, tokenizer, builder, haystack, bench.room, Clock(model.device))
    measures: dict[str, Callable[[Cell], dict[str, Any]]] = {
        "growth": lambda cell: bench_cells.growth(setup, cell, bench.requests),
        "prefill": lambda cell: bench_cells.prefill(setup, cell, bench.rounds),
        "decode": lambda cell: bench_cells.decode(setup, cell, bench.steps),
        "flat": lambda cell: bench_cells.flat(setup, cell, bench.steps),
        "serve": lambda cell: bench_cells.serve(setup, cell, bench.steps, bench.new_tokens),
    }
    for cell in bench.cells():
        if store.has(identity(cell)):
            advance("done before")
            continue
        store.add({**cell, **measures[cell["kind"]](cell), "versions": versions(), "git": revision()})
        advance(" ".join(str(cell[name]) for name in ("kind", "policy", "context", "batch") if name in cell))
