"""The engine: prompts wait, are read one by one, compressed, placed in slots, and decode together.

What may wait and what runs is decided by bytes of keys and values. A request's own numbers never hang on the others:
its prompt is read alone, its row of a step is its own, and so are its draws and its text.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.api import profiles
from winnowkv.attention.hooks import known
from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.chunked import cut
from winnowkv.cache.reading import prefill
from winnowkv.engine.request import Claim, Completion, Event, Reason, Request
from winnowkv.engine.sampling import Sampling, check_whole, choose
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import GREEDY, advance, drop_ended
from winnowkv.errors import InputError, WinnowError
from winnowkv.memory.plan import LayerShape, Shape, need
from winnowkv.memory.sizes import read_size
from winnowkv.models.info import end_tokens, position_limit, prompt_limit
from winnowkv.policies import Policy, policy as make_policy
from winnowkv.prompt.chat import AnyPrompt, token_ids
from winnowkv.prompt.task import TASKS, TaskProfile
from winnowkv.report import Report


class Engine:
    """Answers many prompts at once with compressed caches. Every method may be called from any thread.

    First come, first served: a prompt is read when the bytes of keys and values that it needs, while it is read and
    afterwards with all its new tokens, fit beside what is held. One prompt is read at a time.

    Parameters
    ----------
    model, policy, budget: as for :class:`CompactCache`.
    tokenizer: reads prompts and writes text; policies that score by task or layout read prompts back with it.
    kv_memory: most bytes of keys and values, as a number or ``"512MiB"``; None for no limit. What a layer's copy takes
        while buffers grow or shrink comes on top, one layer at a time.
    max_rows: most requests that decode together.
    prefill_chunk, prefill_ceiling: read prompts in chunks (:func:`winnowkv.cache.reading.prefill`).
    compile: compiled decode steps (:class:`Slots`); :meth:`warm_up` compiles them before the first request.
    task: of all prompts that are submitted without one; None has each classified where the policy asks.

    Raises
    ------
    PolicyError, BudgetError, ProfileError, UnsupportedModelError, InputError
        At once, for what can serve no prompt.

    Examples
    --------
    >>> engine = wk.Engine(model, tokenizer, kv_memory="512MiB")                       # doctest: +SKIP
    >>> for done in engine.generate(prompts, wk.Sampling(max_new_tokens=64)):          # doctest: +SKIP
    ...     print(done.text)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        policy: str | Policy = "winnow",
        budget: Budget | int | float | str = DEFAULT_BUDGET,
        *,
        kv_memory: int | str | None = None,
        max_rows: int = 32,
        prefill_chunk: int | None = None,
        prefill_ceiling: int | float | None = None,
        compile: bool = False,
        task: TaskProfile | str | None = None,
    ) -> None:
        check_whole("max_rows", max_rows, 1)
        if prefill_ceiling is not None and prefill_chunk is None:
            raise InputError(f"prefill_ceiling={prefill_ceiling} is for what is held between chunks: give prefill_chunk, too")
        self.model, self.tokenizer = model, tokenizer
        self.policy = policy if isinstance(policy, str) else policy.name
        self.budget = Budget.of(budget)
        self.kv_memory = None if kv_memory is None else read_size(kv_memory, "kv_memory")
        self.max_rows = max_rows
        self._chunk, self._ceiling = prefill_chunk, prefill_ceiling
        self._task, self._compile = task, compile
        # Complain now about whatever would fail for every prompt.
        CompactCache(model, policy, self.budget, task=TASKS[0] if task is None else task)
        self._made = make_policy(policy).for_model(known(model))
        self.ends = end_tokens(model, tokenizer)
        self._slots = Slots(model, compile=compile)  # while they live the model's attention goes through ours
        self._shape = shape_of(self._slots, model)
        self._free = threading.Condition()  # its lock guards everything below
        self._stepping = False  # one thread works with the model and the slots, outside the lock
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []  # in the order of the slots' rows
        self._current: tuple[Request, CompactCache] | None = None  # being read, or waiting for a place in the slots

    @property
    def waiting(self) -> int:
        """Requests whose prompts were not begun."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that are being read or decode."""
        return len(self._active) + (self._current is not None)

    @property
    def held_bytes(self) -> int:
        """Storage behind keys and values now."""
        current = self._current
        return self._slots.held_bytes + (0 if current is None else current[1].held_bytes)

    def warm_up(self, prompt_tokens: int, new_tokens: int = 128) -> float:
        """Compile the steps of up to ``max_rows`` prompts of that length, as many as fit; returns the seconds it took."""
        entries, room = [self.budget.entries(prompt_tokens)] * len(self._shape.compressed), new_tokens - 1
        rows = self.max_rows
        if self.kv_memory is not None:
            most = max(self.kv_memory // self._slots.bytes_alone(entries, room), 1)
            rows = max(size for size in self._slots.graph_rows(min(rows, most)) if size <= most)
        with self._step():
            return self._slots.warm_up(rows, entries[0], room)

    def submit(self, prompt: AnyPrompt, sampling: Sampling = GREEDY, *, task: TaskProfile | str | None = None) -> Request:
        """Queue a prompt: text as it is, chat messages, or token ids. :meth:`step` does the work.

        Raises
        ------
        InputError
            For a prompt that is empty, too long, or can never fit into ``kv_memory``.
        BudgetError
            Where the budget of a prompt of this length cannot hold sinks and recent window.
        """
        return self._submit(prompt, sampling, task, None)

    def _submit(
        self, prompt: AnyPrompt, sampling: Sampling, task: TaskProfile | str | None, inbox: deque[Event] | None
    ) -> Request:
        ids = self._read_prompt(prompt, sampling)
        given = self._task if task is None else task
        (profile,) = profiles(self.tokenizer, torch.tensor([ids]), None, given, self._made)
        claim = self._claim(len(ids), sampling, self._made.for_task(profile))
        if self.kv_memory is not None:
            self._refuse(claim, len(ids), sampling)
        made = {"tokenizer": self.tokenizer, "ends": self.ends, "device": self.model.device, "inbox": inbox}
        request = Request(ids, sampling, profile, claim, Report(self.policy, self.budget.asked), **made)
        with self._free:
            self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now. Its row is free at once, or as soon as the forward pass that is running ends."""
        with self._free:
            if request.completion is not None:
                return
            if request in self._waiting:
                self._waiting.remove(request)
            request.end("cancelled")
            if not self._stepping:
                self._sweep()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Read the first waiting prompt if it fits, then do one decode step of all active requests; what came of it.

        What a request cannot go on for ends it alone, and its last event says so. What no request is to blame for
        is raised, and ends all that were in the forward pass.
        """
        with self._step():
            return [*self._admit(), *self._decode()]

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        task: TaskProfile | str | None = None,
    ) -> list[Completion]:
        """Answer prompts, in their order; one sampling for all, or one for each.

        Nothing is read before all were accepted (:meth:`submit`). An exception, Ctrl-C included, cancels what is left.
        """
        if isinstance(prompts, str):
            raise InputError("generate() takes a list of prompts: give [prompt]")
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise InputError(f"{len(each)} samplings for {len(prompts)} prompts: give one for each, or one")
        requests: list[Request] = []
        try:
            for prompt, how in zip(prompts, each, strict=True):
                requests.append(self.submit(prompt, how, task=task))
            while any(request.completion is None for request in requests):
                self.step()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        return [request.completion for request in requests if request.completion is not None]

    def stream(
        self, prompt: AnyPrompt, sampling: Sampling = GREEDY, *, task: TaskProfile | str | None = None
    ) -> Iterator[Event]:
        """The events of one prompt as they come, the last one with its completion; closing the iterator cancels."""
        inbox: deque[Event] = deque()
        request = self._submit(prompt, sampling, task, inbox)
        try:
            while True:
                while inbox:
                    yield (event := inbox.popleft())
                    if event.finished is not None:
                        return
                self.step()
        finally:
            self.cancel(request)

    @contextmanager
    def _step(self) -> Iterator[None]:
        """The right to work with the model and the slots; what was cancelled meanwhile leaves at the end."""
        with self._free:
            self._free.wait_for(lambda: not self._stepping)
            self._stepping = True
        try:
            yield
        finally:
            with self._free:
                self._sweep()
                self._stepping = False
                self._free.notify()

    def _sweep(self) -> None:
        """Free what requests that have ended hold. Called with the lock."""
        drop_ended(self._slots, self._active, lambda request: request.completion is not None)
        if self._current is not None and self._current[0].completion is not None:
            self._current = None

    def _admit(self) -> list[Event]:
        events = []
        if (request := self._next()) is not None:
            events += self._read(request)
        return events + self._place()

    def _next(self) -> Request | None:
        """The first waiting request, if there is a row for it and it fits."""
        with self._free:
            self._sweep()
            if self._current is not None or len(self._active) == self.max_rows or not self._waiting:
                return None
            return self._waiting.popleft() if self._fits(self._waiting[0].claim) else None

    def _fits(self, claim: Claim) -> bool:
        if self.kv_memory is None:
            return True
        if self._slots.held_bytes + claim.peak > self.kv_memory:
            self._slots.trim()  # rows of requests that have ended
        reading = self._slots.held_bytes + claim.peak
        return max(reading, self._slots.bytes_with(claim.entries, claim.room)) <= self.kv_memory

    def _read(self, request: Request) -> list[Event]:
        """Read a prompt and choose the first token behind it."""
        request.started = time.perf_counter()
        try:
            cache = CompactCache(self.model, self._made, self.budget, task=request.task, hold=False)
            cache.report.policy = self.policy  # as it was asked: to look it up again takes longer than a decode step
            request.report, self._current = cache.report, (request, cache)
            (chosen,) = choose(self._prefilled(request, cache), [request.sampler])
        except BaseException as error:
            self._current = None
            events = self._fail([request], error)
            if isinstance(error, WinnowError):
                return events
            raise
        with self._free:
            events = [] if request.completion is not None else [request.take(chosen)]
            self._sweep()
        return events

    def _prefilled(self, request: Request, cache: CompactCache) -> Tensor:
        ids = torch.tensor([request.prompt], device=self.model.device)
        return prefill(self.model, ids, cache, chunk=self._chunk, ceiling=self._ceiling)

    def _place(self) -> list[Event]:
        """Give what was read its row. Layers that share a budget may need more than was claimed, and wait for it."""
        if self._current is None:
            return []
        request, cache = self._current
        entries = [layer.length for layer in cache.compact_layers]
        if self.kv_memory is not None and self._slots.bytes_with(entries, request.claim.room) > self.kv_memory:
            if self._active:
                return []
            self._current = None
            least = max(request.claim.peak, self._slots.bytes_alone(entries, request.claim.room))
            return self._fail([request], too_small(self.kv_memory, least, len(request.prompt), request.sampling))
        self._slots.place(cache, request.claim.room)
        with self._free:
            self._active.append(request)
            self._current = None
        return []

    def _decode(self) -> list[Event]:
        """One forward pass for all rows."""
        with self._free:
            self._sweep()
            active = list(self._active)
        if not active:
            return []
        try:
            chosen = advance(self._slots, [request.sampler for request in active])
        except BaseException as error:
            # Some layers may have the new tokens and some not: nothing can go on from there.
            self._fail(active, error)
            self._active.clear()
            self._slots = Slots(self.model, compile=self._compile)
            raise
        with self._free:
            return [request.take(one) for request, one in zip(active, chosen, strict=True) if request.completion is None]

    def _fail(self, requests: Sequence[Request], error: BaseException) -> list[Event]:
        reason: Reason = "error" if isinstance(error, Exception) else "cancelled"
        with self._free:
            return [request.end(reason, error) for request in requests if request.completion is None]

    def _read_prompt(self, prompt: AnyPrompt, sampling: Sampling) -> list[int]:
        """Token ids, checked against the model."""
        ids = token_ids(self.tokenizer, prompt)
        if not ids:
            raise InputError("the prompt is empty: give at least one token")
        vocabulary: Any = self.model.get_input_embeddings()
        if unknown := [token for token in ids if not 0 <= token < vocabulary.num_embeddings]:
            raise InputError(f"token {unknown[0]} is unknown: the model has tokens 0 to {vocabulary.num_embeddings - 1}")
        limit = prompt_limit(self.model, sampling.max_new_tokens)
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"the prompt has {len(ids)} tokens, with {sampling.max_new_tokens} new ones it passes the model's "
                f"{position_limit(self.model)} positions: shorten it or lower max_new_tokens"
            )
        return ids

    def _claim(self, tokens: int, sampling: Sampling, policy: Policy) -> Claim:
        """What a prompt needs. Raises BudgetError and InputError for a budget or for chunks that cannot serve it."""
        peak = need(self._shape, policy, self.budget, tokens).peak
        kept = self.budget.entries(tokens) if policy.evicts and tokens > policy.observe else tokens
        if policy.per_head:  # heads of a layer are padded to the longest, which may be whole
            peak = held_whole(self._shape, tokens, tokens)
        if self._chunk is not None:
            chunks = cut(policy, self.budget, tokens, self._chunk, self._ceiling)
            kept = min(kept, chunks.most)
            if len(chunks.sizes) > 1:  # all layers hold everything that is left until the last chunk
                peak = held_whole(self._shape, chunks.most, self._chunk)
        return Claim(peak, [kept] * len(self._shape.compressed), sampling.max_new_tokens - 1)

    def _refuse(self, claim: Claim, tokens: int, sampling: Sampling) -> None:
        """Raise InputError for what does not fit even alone."""
        assert self.kv_memory is not None
        least = max(claim.peak, self._slots.bytes_alone(claim.entries, claim.room))
        if least > self.kv_memory:
            raise too_small(self.kv_memory, least, tokens, sampling)


def too_small(kv_memory: int, least: int, tokens: int, sampling: Sampling) -> InputError:
    """What to say of a request that can never fit."""
    return InputError(
        f"a prompt of {tokens} tokens with {sampling.max_new_tokens} new ones needs {least} bytes of keys and values, "
        f"kv_memory is {kv_memory}: give kv_memory={least} or more, a smaller budget, or lower max_new_tokens"
    )


def shape_of(slots: Slots, model: PreTrainedModel) -> Shape:
    """What a plan needs to know of the model, from its layers."""
    layers: Any = slots.layers
    shapes = tuple(LayerShape(each.keys.shape[1], each.keys.shape[3], each.values.shape[3], each.window) for each in layers)
    return Shape(shapes, layers[0].keys.itemsize, 0, position_limit(model), known(model))


def held_whole(shape: Shape, entries: int, chunk: int) -> int:
    """A prompt of which every layer holds so many entries, those that slide no more than their window and a chunk."""
    return sum(
        layer.kv_bytes(entries if layer.window is None else min(entries, layer.window + chunk), shape.itemsize)
        for layer in shape.layers
    )
