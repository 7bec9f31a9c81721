"""What ``winnow bench`` measures: prefill, decode, decode at one size behind short and long prompts, serving, growth.

Each function measures one cell: what a policy and budget cost at one context, next to plain transformers. Everything that
a ratio compares is timed in turns. Decode steps are timed on real caches; which tokens are read does not matter to time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from winnowkv.budget import Budget
from winnowkv.engine.engine import Engine
from winnowkv.engine.sampling import Sampling
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.bench.caches import TASK, Source, cache_bytes, stepping, twin
from winnowkv.evaluate.bench.clock import Clock, Work, free_memory, held_memory, peak_of, ratio, spread
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_needles
from winnowkv.memory.plan import need
from winnowkv.memory.shape import read_shape
from winnowkv.policies import policy as make_policy
from winnowkv.report import MIB

WARM = 3  # decode steps before the clock runs: buffers get their room, graphs are compiled
SHARE = 0.9  # of the free memory that a cell may take
FIRST = 50  # requests before memory is read for the first time
WAVE = 5  # requests in one call
SHORT = range(160, 340, 20)  # tokens of short prompts; few lengths, since the framework keeps kernels for each that it has seen
SHORT_BUDGET = 128  # entries that a short prompt keeps
SHORT_ANSWER = 4
MOST_ROWS = 1024  # of an engine whose only limit is to be its memory
Cell = dict[str, Any]


class Bed:
    """The model and its twin, the clock, and the prompts read last."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, builder: PromptBuilder, haystack: str, room: int, clock: Clock
    ) -> None:
        self.model, self.tokenizer, self.builder = model, tokenizer, builder
        self.haystack, self.room, self.clock = haystack, room, clock
        self.plain = twin(model)
        self.shape = read_shape(model.config, model.dtype.itemsize)
        self._sources: dict[int, Source] = {}

    def tokens(self, context: int) -> int:
        """Tokens of a prompt: those asked, less what new tokens need of the model's positions."""
        limit = self.shape.positions
        return context if limit is None else min(context, limit - self.room)

    def source(self, context: int) -> Source:
        """The prompt of a context. Two are kept at a time, since each holds the whole prompt's keys and values."""
        if context not in self._sources:
            ids = build(self.builder, self.tokens(context))
            while len(self._sources) > 1:
                self._sources.pop(next(iter(self._sources)))
            self._sources[context] = Source(self.model, self.plain, self.tokenizer, ids)
        return self._sources[context]


def build(builder: PromptBuilder, tokens: int) -> list[int]:
    """A prompt of so many tokens. It ends in a question, as policies that look for one expect."""
    return builder.build(read_needles()[0], tokens, 0.5)


def prefill(bed: Bed, cell: Cell, rounds: int) -> dict[str, Any]:
    """Reading a prompt and compressing it, beside reading it with transformers alone; the first pair tells the peaks."""
    source, reports = bed.source(cell["context"]), []

    def ours() -> None:
        reports.append(source.read(cell["policy"], cell["budget"]).report)

    peaks = {"ours": peak_of(ours), "plain": peak_of(source.read_plain)}
    took = bed.clock.turns({"ours": ours, "plain": source.read_plain}, rounds)
    report = reports.pop(0)
    return {
        "prompt_tokens": source.tokens,
        "prefill_s": spread(took["ours"]),
        "plain_s": spread(took["plain"]),
        "over_plain": ratio(took["ours"], took["plain"]),
        "compress_s": spread([each.compress_seconds for each in reports]),
        "compress_share": ratio([each.compress_seconds for each in reports], took["ours"]),
        "kept_entries": sum(map(float, report.kept_entries[0])) / len(report.kept_entries[0]),
        "kept_bytes": report.kept_bytes,
        "full_bytes": report.full_bytes,
        "kv_peak_bytes": report.peak_bytes,
        "peak_memory": peaks["ours"],
        "plain_peak_memory": peaks["plain"],
    }


def decode(bed: Bed, cell: Cell, steps: int) -> dict[str, Any]:
    """Decode steps in slots, in turns with transformers' caches; what memory does not hold is left out, and says so."""
    source, rows, compiled = bed.source(cell["context"]), cell["batch"], cell["compiled"]
    policy, budget, room = cell["policy"], cell["budget"], WARM + steps
    mine = "slots, compiled" if compiled else "slots"
    kept = Budget.of(budget).entries(source.tokens) if make_policy(policy).evicts else source.tokens
    makers: dict[str, Callable[[], Any]] = {
        mine: lambda: source.slots(policy, budget, rows, room, compile=compiled),
        "native": lambda: source.dynamic(rows, kept),
    }
    if compiled:
        makers["slots"] = lambda: source.slots(policy, budget, rows, room)
    makers["dynamic"] = lambda: source.dynamic(rows)
    if rows == 1 and not compiled:
        makers |= {"static": lambda: source.static(room), "quantized": source.quantized}
    skipped = too_large(bed, cell, makers)
    caches = {}
    if mine not in skipped:
        for name in [name for name in makers if name not in skipped]:
            try:
                caches[name] = makers[name]()
            except WinnowError as error:
                skipped[name] = str(error)
    found: dict[str, Any] = {"prompt_tokens": source.tokens, "entries": kept, "skipped": skipped}
    if mine not in caches:
        return found
    works = {name: stepping(bed.model if name.startswith("slots") else bed.plain, caches[name], rows)
             for name in makers if name in caches}  # fmt: skip
    first = bed.clock.seconds(works[mine])
    took: dict[str, list[float]] = {}
    peak = peak_of(lambda: took.update(bed.clock.turns(works, steps, WARM - 1)))
    return {
        **found,
        "first_step_s": first,  # with what compiling takes
        "ms": {name: spread([1000 * each for each in seconds]) for name, seconds in took.items()},
        "over": {name: ratio(took[mine], seconds) for name, seconds in took.items() if name != mine},
        "tokens_s": {name: rows / spread(seconds)["median"] for name, seconds in took.items()},
        "kv_bytes": {name: cache_bytes(cache) for name, cache in caches.items()},
        "peak_memory": peak,
    }


def too_large(bed: Bed, cell: Cell, makers: Mapping[str, Any]) -> dict[str, str]:
    """Caches that free memory does not hold beside those before them, with the reason; sizes by the plan."""
    free, rows, tokens = free_memory(bed.model.device), cell["batch"], bed.tokens(cell["context"]) + bed.room
    if free is None:
        return {}
    full = bed.shape.full_bytes(tokens)
    budget = Budget.of(cell["budget"]).entries(bed.tokens(cell["context"]))
    small = min(need(bed.shape, make_policy("random"), Budget.of(budget), tokens).rest + bed.room * full // tokens, full)
    sizes = {"dynamic": rows * full, "static": full, "quantized": full}
    taken, skipped = 2 * full, {}  # the prompt's own, and what reading it takes
    for name in makers:
        wanted = sizes.get(name, rows * small)
        if taken + wanted > SHARE * free:
            skipped[name] = (
                f"{rows} x {tokens} tokens would take {wanted / MIB:.0f} MiB beside {taken / MIB:.0f} MiB, "
                f"{free / MIB:.0f} MiB are free"
            )
        else:
            taken += wanted
    return skipped


def flat(bed: Bed, cell: Cell, steps: int) -> dict[str, Any]:
    """Decode steps with equally many entries kept of a short and of a long prompt, in turns."""
    policy, budget = cell["policy"], cell["budget"]
    ends = {name: bed.source(cell[name]) for name in ("shortest", "longest")}
    slots = {name: source.slots(policy, budget, 1, WARM + steps) for name, source in ends.items()}
    took = bed.clock.turns({name: stepping(bed.model, each, 1) for name, each in slots.items()}, steps, WARM)
    return {
        "ms": {name: spread([1000 * each for each in seconds]) for name, seconds in took.items()},
        "long_over_short": ratio(took["longest"], took["shortest"]),
    }


def serve(bed: Bed, cell: Cell, steps: int, new_tokens: int) -> dict[str, Any]:
    """How many requests an engine holds in a given KV memory, and its decode steps in turns with transformers'.

    Transformers' batch is as many requests as that memory holds of its full cache, prompts and new tokens.
    """
    source, memory = bed.source(cell["context"]), cell["kv_memory"]
    whole = bed.shape.full_bytes(source.tokens + new_tokens)
    found: dict[str, Any] = {"prompt_tokens": source.tokens, "new_tokens": new_tokens, "plain_fits": memory // whole}
    engine = Engine(
        bed.model, bed.tokenizer, cell["policy"], cell["budget"], kv_memory=memory, max_rows=MOST_ROWS,
        compile=cell["compiled"], task=TASK,
    )  # fmt: skip
    try:
        taken = fill(engine, source, new_tokens)
    except InputError as error:  # not one request fits
        return {**found, "fits": 0, "skipped": str(error)}
    left = min(steps, new_tokens - taken - WARM - 1)
    if left < 1:
        return {**found, "skipped": f"the first of {taken} requests ends before the memory is full: give more --new-tokens"}
    made: list[int] = []
    works: dict[str, Work] = {"engine": lambda: made.append(len(engine.step()))}
    plain = None
    if found["plain_fits"]:
        plain = source.dynamic(found["plain_fits"])
        works["plain"] = stepping(bed.plain, plain, found["plain_fits"])
    took = bed.clock.turns(works, left, WARM)
    pace = [tokens / seconds for tokens, seconds in zip(made[WARM:], took["engine"], strict=True)]
    found |= {"fits": made[-1], "kv_bytes": engine.held_bytes, "tokens_s": spread(pace)}
    if plain is not None:
        theirs = [found["plain_fits"] / seconds for seconds in took["plain"]]
        found |= {"plain_tokens_s": spread(theirs), "speedup": ratio(pace, theirs), "plain_kv_bytes": cache_bytes(plain)}
    return found


def fill(engine: Engine, source: Source, new_tokens: int) -> int:
    """Give the engine this prompt until one has to wait; returns the decode steps that the first request has had.

    Raises InputError where not even one fits.
    """
    ids, taken = source.ids[0].tolist(), 0
    while engine.active < MOST_ROWS and taken < new_tokens:
        engine.submit(ids, Sampling(max_new_tokens=new_tokens, ignore_eos=True))
        engine.step()
        taken += 1
        if engine.waiting:
            break
    return taken


def growth(bed: Bed, cell: Cell, requests: int) -> dict[str, Any]:
    """Memory that the process holds after the first requests and after all of them, short ones of several lengths."""
    text = bed.tokenizer(bed.haystack, add_special_tokens=False)["input_ids"]
    engine = Engine(bed.model, bed.tokenizer, cell["policy"], SHORT_BUDGET, max_rows=WAVE, task=TASK)
    sampling, held = Sampling(max_new_tokens=SHORT_ANSWER, ignore_eos=True), []
    first = min(FIRST, requests // 2 // WAVE * WAVE)
    for done in range(0, requests, WAVE):
        if done == first:
            held.append(held_memory())
        wave = range(done, min(done + WAVE, requests))
        engine.generate([text[number : number + SHORT[number % len(SHORT)]] for number in wave], sampling)
    held.append(held_memory())
    before, after = held
    found = {"requests": requests, "first": first}
    if before is None or after is None:
        return {**found, "skipped": "this system does not say what a process holds in memory"}
    return {**found, "held_first": before, "held_all": after, "growth": after / before - 1}
