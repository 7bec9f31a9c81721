"""``winnow bench``: what compression costs and saves in seconds and bytes, cell by cell, next to plain transformers.

A cell is one kind of measurement of one policy and budget at one context; it is one line of the results, and one that was
measured is not measured again.
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
from winnowkv.evaluate.bench.cells import SHORT, SHORT_BUDGET, WARM, WAVE, Bed, Cell
from winnowkv.evaluate.bench.clock import Clock
from winnowkv.evaluate.needle.prompts import PromptBuilder
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.evaluate.settings import Setting
from winnowkv.models.info import Fingerprint, position_limit
from winnowkv.models.load import dtype_name
from winnowkv.policies import Prompt, policy as make_policy, resolve

IDENTITY = ("kind", "policy", "budget", "context", "batch", "compiled", "kv_memory", "shortest", "longest")
LEAST = 2 * WAVE  # requests: memory is read once in between
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes
    ----------
    settings: policies at budgets. contexts: prompt tokens. batches: requests that decode together.
    rounds: pairs of prefills a cell; steps: decode steps a cell, each in turns with those it is compared with.
    kv_memory: bytes of keys and values that an engine may hold, with prompts of ``serve_context`` tokens and ``new_tokens``
        new ones. requests: short ones in a row, to see whether memory grows; 0 for none.
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
        """New tokens that a prompt leaves positions for."""
        return max(self.steps + WARM, self.new_tokens)

    @property
    def flat_entries(self) -> int:
        """Entries kept where a short and a long prompt keep equally many: half of the shorter."""
        return min(self.contexts) // 2

    def cells(self) -> list[Cell]:
        """Every cell, those that look at memory first, then context by context."""
        found = [self._cell("growth", one, budget=SHORT_BUDGET) for one in self._policies()] if self.requests else []
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
        """Complain about everything that cannot work, before anything is measured."""
        for name, value, least in (
            ("rounds", self.rounds, 1), ("steps", self.steps, 1), ("new_tokens", self.new_tokens, WARM + 3),
            ("batch", min(self.batches), 1), ("context", min([*self.contexts, self.serve_context]), 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"{name} is {value}, it must be at least {least}")
        if 0 < self.requests < LEAST:
            raise InputError(f"{self.requests} requests in a row show no growth: ask for at least {LEAST}, or for 0")
        limit = position_limit(model)
        for context in {*self.contexts, self.serve_context}:
            if limit is not None and not self.room < context <= limit:
                raise InputError(
                    f"a context of {context} tokens cannot be measured with {self.room} new ones on a model with {limit} "
                    f"positions: give {self.room + 1} to {limit}"
                )
        for cell in self.cells():
            (policy,) = resolve(cell["policy"], Fingerprint.of(model), bench_cells.TASK)
            lengths = [cell[name] for name in ("context", "shortest", "longest") if cell.get(name)] or [SHORT[0]]
            for tokens in (length if limit is None else min(length, limit - self.room) for length in lengths):
                entries = Budget.of(cell["budget"]).entries(tokens)
                if policy.evicts and policy.observe < tokens and entries < tokens:
                    policy.check(Prompt(tokens=tokens, layers=1, budget=entries))
                if cell["kind"] == "prefill":
                    bench_cells.build(builder, tokens)  # complains where the haystack is too short

    def config(self, model: PreTrainedModel, name: str, builder: PromptBuilder) -> dict[str, Any]:
        """What must be equal for lines to stand in one table."""
        where = machine()
        return {
            "model": name, "dtype": dtype_name(model.dtype), "chat": builder.chat, "rounds": self.rounds, "steps": self.steps,
            "new_tokens": self.new_tokens, "requests": self.requests,
            "machine": f"{where['accelerator'] or where['processor']}, {where['threads']} threads",
        }  # fmt: skip

    def _policies(self) -> list[Setting]:
        """Each policy once."""
        return list({one.policy: one for one in self.settings}.values())

    def _cell(self, kind: str, one: Setting, *, budget: Asked | None = None, **where: Any) -> Cell:
        return {
            "kind": kind, "policy": one.policy, "budget": one.budget if budget is None else budget, "compiled": False, **where,
        }  # fmt: skip


def identity(line: Cell) -> Hashable:
    """What tells two cells apart."""
    return tuple((type(value).__name__, value) for value in map(line.get, IDENTITY))


def open_store(folder: Path, model: PreTrainedModel, name: str, builder: PromptBuilder, bench: Bench) -> ResultStore:
    """The result folder; lines of another model, machine or number of rounds are refused."""
    return ResultStore(folder, bench.config(model, name, builder), identity)


def run(
    bench: Bench, model: PreTrainedModel, tokenizer: Any, builder: PromptBuilder, haystack: str, store: ResultStore,
    advance: Advance,
) -> None:  # fmt: skip
    """Measure the cells that the store does not hold yet; ``advance`` is told of every cell, old and new."""
    bed = Bed(model, tokenizer, builder, haystack, bench.room, Clock(model.device))
    measures: dict[str, Callable[[Cell], dict[str, Any]]] = {
        "growth": lambda cell: bench_cells.growth(bed, cell, bench.requests),
        "prefill": lambda cell: bench_cells.prefill(bed, cell, bench.rounds),
        "decode": lambda cell: bench_cells.decode(bed, cell, bench.steps),
        "flat": lambda cell: bench_cells.flat(bed, cell, bench.steps),
        "serve": lambda cell: bench_cells.serve(bed, cell, bench.steps, bench.new_tokens),
    }
    for cell in bench.cells():
        if store.has(identity(cell)):
            advance("done before")
            continue
        store.add({**cell, **measures[cell["kind"]](cell), "versions": versions(), "git": revision()})
        advance(" ".join(str(cell[name]) for name in ("kind", "policy", "context", "batch") if name in cell))
