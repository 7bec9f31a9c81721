"""The measurements of ``winnow bench``: prefill, decode, decode after short and long prompts, serving, memory growth.

Each function measures one cell: what a policy and budget cost at one context, next to plain transformers. All parts of a
ratio are timed in turns. Decode steps are timed on real caches; the tokens that are read do not change the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from winnowkv.budget import Budget
from winnowkv.engine.engine import Engine
from winnowkv.engine.sampling import Sampling
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.bench.caches import BENCH_TASK, PromptCaches, cache_bytes, plain_copy, stepping
from winnowkv.evaluate.bench.clock import Clock, Work, free_memory, held_memory, peak_of, ratio, spread
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_needles
from winnowkv.memory.plan import need
from winnowkv.memory.shape import read_shape
from winnowkv.policies import policy as make_policy
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import MIB

WARMUP_STEPS = 3  # decode steps that are not timed: they allocate buffers and compile graphs
MAX_MEMORY_SHARE = 0.9  # part of the free memory that a cell may take
GROWTH_FIRST_REQUESTS = 50  # requests before memory is read for the first time
GROWTH_BATCH = 5  # requests in one call
GROWTH_PROMPT_TOKENS = range(160, 340, 20)  # few lengths: the framework keeps kernels for each length that it has seen
GROWTH_BUDGET = 128  # entries that each of these prompts keeps
GROWTH_NEW_TOKENS = 4
MAX_ENGINE_ROWS = 1024  # high, so that memory is the engine's only limit
Cell = dict[str, Any]


class BenchSetup:
    """The model, its copy for transformers alone, the clock, and the prompts read last."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, builder: PromptBuilder, haystack: str, room: int, clock: Clock
    ) -> None:
        self.model, self.tokenizer, self.builder = model, tokenizer, builder
        self.haystack, self.room, self.clock = haystack, room, clock
        self.plain = plain_copy(model)
        self.shape = read_shape(model.config, model.dtype.itemsize)
        self._prompts: dict[int, PromptCaches] = {}

    def tokens(self, context: int) -> int:
        """Tokens of a prompt: ``context``, or fewer if new tokens would have no positions in the model."""
        limit = self.shape.positions
        return context if limit is None else min(context, limit - self.room)

    def prompt(self, context: int) -> PromptCaches:
        """The prompt of a context. Only two are kept, since each holds the keys and values of the whole prompt."""
        if context not in self._prompts:
            ids = build(self.builder, self.tokens(context))
            while len(self._prompts) > 1:
                self._prompts.pop(next(iter(self._prompts)))
            self._prompts[context] = PromptCaches(self.model, self.plain, self.tokenizer, ids)
        return self._prompts[context]


def build(builder: PromptBuilder, tokens: int) -> list[int]:
    """A prompt of this many tokens. It ends in a question, as policies that look for one expect."""
    return builder.build(read_needles()[0], tokens, 0.5)


def prefill(setup: BenchSetup, cell: Cell, rounds: int) -> dict[str, Any]:
    """Seconds of reading and compressing a prompt, and of transformers alone; memory peaks are those of the first pair."""
    prompt, reports = setup.prompt(cell["context"]), []

    def ours() -> None:
        reports.append(prompt.read(cell["policy"], cell["budget"]).report)

    peaks = {"ours": peak_of(ours), "plain": peak_of(prompt.read_plain)}
    took = setup.clock.turns({"ours": ours, "plain": prompt.read_plain}, rounds)
    report = reports.pop(0)
    return {
        "prompt_tokens": prompt.tokens,
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


def decode(setup: BenchSetup, cell: Cell, steps: int) -> dict[str, Any]:
    """Time decode steps in slots in turns with transformers' caches; what does not fit in memory is left out with a reason."""
    prompt, rows, compiled = setup.prompt(cell["context"]), cell["batch"], cell["compiled"]
    policy, budget, room = cell["policy"], cell["budget"], WARMUP_STEPS + steps
    mine = "slots, compiled" if compiled else "slots"
    made, task = make_policy(policy), TaskProfile.of(BENCH_TASK)
    kept = made.prompt_info(Budget.of(budget), prompt.tokens, 1, task).budget if made.evicts else prompt.tokens
    makers: dict[str, Callable[[], Any]] = {
        mine: lambda: prompt.slots(policy, budget, rows, room, compile=compiled),
        "native": lambda: prompt.dynamic(rows, kept),
    }
    if compiled:
        makers["slots"] = lambda: prompt.slots(policy, budget, rows, room)
    makers["dynamic"] = lambda: prompt.dynamic(rows)
    if rows == 1 and not compiled:
        makers |= {"static": lambda: prompt.static(room), "quantized": prompt.quantized}
    skipped = too_large(setup, cell, makers)
    caches = {}
    if mine not in skipped:
        for name in [name for name in makers if name not in skipped]:
            try:
                caches[name] = makers[name]()
            except WinnowError as error:
                skipped[name] = str(error)
    found: dict[str, Any] = {"prompt_tokens": prompt.tokens, "entries": kept, "skipped": skipped}
    if mine not in caches:
        return found
    works = {name: stepping(setup.model if name.startswith("slots") else setup.plain, caches[name], rows)
             for name in makers if name in caches}  # fmt: skip
    first = setup.clock.seconds(works[mine])
    took: dict[str, list[float]] = {}
    peak = peak_of(lambda: took.update(setup.clock.turns(works, steps, WARMUP_STEPS - 1)))
    return {
        **found,
        "first_step_s": first,  # includes compiling
        "ms": {name: spread([1000 * each for each in seconds]) for name, seconds in took.items()},
        "over": {name: ratio(took[mine], seconds) for name, seconds in took.items() if name != mine},
        "tokens_s": {name: rows / spread(seconds)["median"] for name, seconds in took.items()},
        "kv_bytes": {name: cache_bytes(cache) for name, cache in caches.items()},
        "peak_memory": peak,
    }


def too_large(setup: BenchSetup, cell: Cell, makers: Mapping[str, Any]) -> dict[str, str]:
    """Caches that do not fit in free memory together with those before them, each with the reason."""
    free, rows, tokens = free_memory(setup.model.device), cell["batch"], setup.tokens(cell["context"]) + setup.room
    if free is None:
        return {}
    full = setup.shape.full_bytes(tokens)
    budget = Budget.of(cell["budget"]).entries(setup.tokens(cell["context"]))
    kept = need(setup.shape, make_policy("random"), Budget.of(budget), tokens, TaskProfile()).rest
    small = min(kept + setup.room * full // tokens, full)
    sizes = {"dynamic": rows * full, "static": full, "quantized": full}
    taken, skipped = 2 * full, {}  # the prompt's own entries, and a copy while it is read
    for name in makers:
        wanted = sizes.get(name, rows * small)
        if taken + wanted > MAX_MEMORY_SHARE * free:
            skipped[name] = (
                f"{rows} x {tokens} tokens would take {wanted / MIB:.0f} MiB beside {taken / MIB:.0f} MiB, "
                f"{free / MIB:.0f} MiB are free"
            )
        else:
            taken += wanted
    return skipped


def flat(setup: BenchSetup, cell: Cell, steps: int) -> dict[str, Any]:
    """Time decode steps in turns on a short and on a long prompt of which equally many entries are kept."""
    policy, budget = cell["policy"], cell["budget"]
    ends = {name: setup.prompt(cell[name]) for name in ("shortest", "longest")}
    slots = {name: prompt.slots(policy, budget, 1, WARMUP_STEPS + steps) for name, prompt in ends.items()}
    took = setup.clock.turns({name: stepping(setup.model, each, 1) for name, each in slots.items()}, steps, WARMUP_STEPS)
    return {
        "ms": {name: spread([1000 * each for each in seconds]) for name, seconds in took.items()},
        "long_over_short": ratio(took["longest"], took["shortest"]),
    }


def serve(setup: BenchSetup, cell: Cell, steps: int, new_tokens: int) -> dict[str, Any]:
    """How many requests an engine holds in a given KV memory, and its decode steps in turns with transformers'.

    Transformers' batch is as many requests as fit in that memory with full caches, new tokens included.
    """
    prompt, memory = setup.prompt(cell["context"]), cell["kv_memory"]
    whole = setup.shape.full_bytes(prompt.tokens + new_tokens)
    found: dict[str, Any] = {"prompt_tokens": prompt.tokens, "new_tokens": new_tokens, "plain_fits": memory // whole}
    engine = Engine(
        setup.model, setup.tokenizer, cell["policy"], cell["budget"], kv_memory=memory, max_rows=MAX_ENGINE_ROWS,
        compile=cell["compiled"], task=BENCH_TASK,
    )  # fmt: skip
    try:
        taken = fill(engine, prompt, new_tokens)
    except InputError as error:  # not one request fits
        return {**found, "fits": 0, "skipped": str(error)}
    left = min(steps, new_tokens - taken - WARMUP_STEPS - 1)
    if left < 1:
        return {**found, "skipped": f"the first of {taken} requests ends before the memory is full: give more --new-tokens"}
    made: list[int] = []
    works: dict[str, Work] = {"engine": lambda: made.append(len(engine.step()))}
    plain = None
    if found["plain_fits"]:
        plain = prompt.dynamic(found["plain_fits"])
        works["plain"] = stepping(setup.plain, plain, found["plain_fits"])
    took = setup.clock.turns(works, left, WARMUP_STEPS)
    pace = [tokens / seconds for tokens, seconds in zip(made[WARMUP_STEPS:], took["engine"], strict=True)]
    found |= {"fits": made[-1], "kv_bytes": engine.held_bytes, "tokens_s": spread(pace)}
    if plain is not None:
        theirs = [found["plain_fits"] / seconds for seconds in took["plain"]]
        found |= {"plain_tokens_s": spread(theirs), "speedup": ratio(pace, theirs), "plain_kv_bytes": cache_bytes(plain)}
    return found


def fill(engine: Engine, prompt: PromptCaches, new_tokens: int) -> int:
    """Submit this prompt to the engine until a request has to wait; returns the decode steps of the first request.

    Raises InputError if not even one request fits.
    """
    ids, taken = prompt.ids[0].tolist(), 0
    while engine.active < MAX_ENGINE_ROWS and taken < new_tokens:
        engine.submit(ids, Sampling(max_new_tokens=new_tokens, ignore_eos=True))
        engine.step()
        taken += 1
        if engine.waiting:
            break
    return taken


def growth(setup: BenchSetup, cell: Cell, requests: int) -> dict[str, Any]:
    """Memory that the process holds after the first requests and after all of them; prompts are short, of several lengths."""
    text = setup.tokenizer(setup.haystack, add_special_tokens=False)["input_ids"]
    engine = Engine(setup.model, setup.tokenizer, cell["policy"], GROWTH_BUDGET, max_rows=GROWTH_BATCH, task=BENCH_TASK)
    sampling, held = Sampling(max_new_tokens=GROWTH_NEW_TOKENS, ignore_eos=True), []
    first = min(GROWTH_FIRST_REQUESTS, requests // 2 // GROWTH_BATCH * GROWTH_BATCH)
    for done in range(0, requests, GROWTH_BATCH):
        if done == first:
            held.append(held_memory())
        batch = range(done, min(done + GROWTH_BATCH, requests))
        engine.generate(
            [text[number : number + GROWTH_PROMPT_TOKENS[number % len(GROWTH_PROMPT_TOKENS)]] for number in batch], sampling
        )
    held.append(held_memory())
    before, after = held
    found = {"requests": requests, "first": first}
    if before is None or after is None:
        return {**found, "skipped": "this system does not report how much memory a process holds"}
    return {**found, "held_first": before, "held_all": after, "growth": after / before - 1}
