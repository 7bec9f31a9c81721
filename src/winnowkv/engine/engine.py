"""The engine: prompts wait in a queue, are read one by one, compressed, placed in slots, and decode together.

A request's answer does not depend on the other requests: its prompt is read alone, its row of a step is its own, and so are
its draws and its text. Which requests wait and which run is decided by :class:`~winnowkv.engine.scheduler.Scheduler`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.api import read_tasks
from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.compression import Compression
from winnowkv.cache.looking import settle
from winnowkv.cache.reading import prefill
from winnowkv.cache.reports import new_report
from winnowkv.engine.admission import Admission
from winnowkv.engine.drafts import Drafts
from winnowkv.engine.looking import LookingSteps
from winnowkv.engine.request import Completion, Event, Request, Row, free_frames
from winnowkv.engine.sampling import Sampling, check_whole, choose
from winnowkv.engine.scheduler import Scheduler
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import GREEDY, advance
from winnowkv.errors import InputError, WinnowError
from winnowkv.memory.shape import shape_of
from winnowkv.memory.sizes import read_size
from winnowkv.models.info import end_tokens, position_limit, prompt_limit
from winnowkv.policies import Policy
from winnowkv.prompt.chat import AnyPrompt, token_ids
from winnowkv.prompt.task import TaskProfile


class Engine:
    """Answers many prompts at once with compressed caches. Every method may be called from any thread.

    First come, first served: a prompt is read as soon as the bytes of keys and values that it needs, while it is read and
    afterwards with all its new tokens, fit beside what is held. One prompt is read at a time.

    Parameters
    ----------
    model, policy, budget, quality: as for :class:`CompactCache`.
    tokenizer: reads prompts and writes text; policies that score by task or structure decode prompts with it.
    kv_memory: most bytes of keys and values, as a number or ``"512MiB"``; None for no limit. The copy of a layer that
        exists while its buffers grow or shrink comes on top, one layer at a time.
    max_rows: most choices (of all requests) that decode together.
    prefill_chunk, prefill_ceiling: read prompts in chunks (:func:`winnowkv.cache.reading.prefill`).
    compile: compiled decode steps (:class:`Slots`); :meth:`warm_up` compiles them before the first request.
    task: of all prompts that are submitted without one; None classifies each prompt, if the policy asks for a task.

    Raises
    ------
    PolicyError, BudgetError, ProfileError, UnsupportedModelError, InputError
        At once, for settings that can serve no prompt.

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
        quality: str | None = None,
    ) -> None:
        check_whole("max_rows", max_rows, 1)
        if prefill_ceiling is not None and prefill_chunk is None:
            raise InputError(f"prefill_ceiling={prefill_ceiling} limits what is held between chunks: give prefill_chunk, too")
        self.model, self.tokenizer = model, tokenizer
        limit = None if kv_memory is None else read_size(kv_memory, "kv_memory")
        self.max_rows = max_rows
        self._chunk, self._ceiling = prefill_chunk, prefill_ceiling
        self._task, self._compile = task, compile
        # Raises now what would be raised for every prompt.
        self._compression = Compression.of(model, policy, budget, task, task_is_known=task is not None, quality=quality)
        self._compression.heads.check_alone("the engine")
        self.policy, self.budget = self._compression.asked, self._compression.budget
        self.end_tokens = end_tokens(model, tokenizer)
        slots = Slots(model, compile=compile)  # while they live the model's attention goes through ours
        shape = shape_of(slots.layers, model)
        self._admission = Admission(shape, self._compression, limit, prefill_chunk, prefill_ceiling)
        drafts = Drafts(model)
        self._scheduler = Scheduler(slots, drafts, self._admission, max_rows)
        asked = self._scheduler.may_draft, self._scheduler.postprocess, self._scheduler.fail_looker
        self._looking = LookingSteps(model, drafts, *asked)

    @property
    def kv_memory(self) -> int | None:
        """Most bytes of keys and values; None for no limit."""
        return self._admission.kv_memory

    @property
    def waiting(self) -> int:
        """Requests whose prompt no forward pass has begun to read."""
        return self._scheduler.waiting

    @property
    def active(self) -> int:
        """Requests whose prompt is being read or that decode."""
        return self._scheduler.active

    @property
    def held_bytes(self) -> int:
        """Storage of keys and values now."""
        return self._scheduler.held_bytes

    @property
    def _slots(self) -> Slots:
        return self._scheduler.slots

    def warm_up(self, prompt_tokens: int, new_tokens: int = 128) -> float:
        """Compile the steps of up to ``max_rows`` prompts of that length, as many as fit; returns the seconds it took."""
        entries = self._admission.kept_entries(prompt_tokens, TaskProfile.of(self._task or "localization"))
        room = new_tokens - 1
        rows = self.max_rows
        if self.kv_memory is not None:
            most = max(self.kv_memory // self._slots.bytes_alone(entries, room), 1)
            rows = max(size for size in self._slots.graph_rows(min(rows, most)) if size <= most)
        with self._scheduler.turn():
            if self._scheduler.broken:
                self._scheduler.replace(Slots(self.model, compile=self._compile))
            return self._slots.warm_up(rows, entries[0], room)

    def submit(self, prompt: AnyPrompt, sampling: Sampling = GREEDY, *, task: TaskProfile | str | None = None) -> Request:
        """Queue a prompt: text as it is, chat messages, or token ids. :meth:`step` does the work.

        Raises
        ------
        InputError
            For a prompt that is empty, too long, or can never fit into ``kv_memory``; for more choices than ``max_rows``.
        BudgetError
            If a budget in entries cannot hold sinks and recent window of a prompt of this length.
        """
        return self._submit(prompt, sampling, task, None)

    def _submit(
        self, prompt: AnyPrompt, sampling: Sampling, task: TaskProfile | str | None, inbox: deque[Event] | None
    ) -> Request:
        if sampling.n > self.max_rows:
            raise InputError(
                f"n={sampling.n} choices decode together, and max_rows is {self.max_rows}: give Engine(max_rows={sampling.n}), "
                "or a lower n"
            )
        ids = self._read_prompt(prompt, sampling)
        given = self._task if task is None else task
        (profile,) = read_tasks(self.tokenizer, torch.tensor([ids]), None, given, self._compression.policy)
        claim = self._admission.accept(len(ids), sampling, profile, self._slots)
        made = {"tokenizer": self.tokenizer, "end_tokens": self.end_tokens, "device": self._slots.device, "inbox": inbox}
        request = Request(ids, sampling, profile, claim, new_report(self._compression), **made)
        self._scheduler.add(request)
        return request

    def cancel(self, request: Request, index: int | None = None) -> None:
        """End a request or one choice now. Its row is free at once, or as soon as the forward pass that is running ends."""
        if index is not None and not 0 <= index < len(request.choices):
            raise InputError(f"choice {index} is not there: the request has choices 0 to {len(request.choices) - 1}")
        self._scheduler.cancel(request, index)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Read the first waiting prompt if it fits, then do one decode step of all active requests; returns their events.

        A request whose policy looks takes its first tokens from its own whole cache, in a forward pass with the others that
        look, and then, with a draft, waits while that is decoded, a token a step, together with those of others.

        An error that one prompt causes (a :class:`WinnowError` while it is read) ends that request alone, and its last
        event holds it. Any other error is raised, and ends all requests that were in the forward pass; their memory is
        free, and the next step goes on with the others.
        """
        with self._scheduler.turn():
            if self._scheduler.broken:
                self._scheduler.replace(Slots(self.model, compile=self._compile))
            events = self._prefill(self._scheduler.next_prompt())
            events += self._looking.run(self._scheduler.lookers())
            try:
                events += self._scheduler.place()
                events += self._decode(self._scheduler.rows())
            except BaseException as error:
                self._recover(error)
                raise
            return events

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        task: TaskProfile | str | None = None,
    ) -> list[Completion]:
        """Answer prompts and return a completion for each, in their order; one sampling for all, or one for each.

        A prompt that :meth:`submit` refuses is answered by a completion with the error, as is one that fails while it is read
        (``finish_reason="error"``): the others do not suffer. With ``n`` above 1 a completion is that of choice 0, and its
        ``choices`` are all. An exception, Ctrl-C included, cancels what is left.
        """
        if isinstance(prompts, str):
            raise InputError("generate() takes a list of prompts: give [prompt]")
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise InputError(f"{len(each)} samplings for {len(prompts)} prompts: give one for each, or one")
        asked: list[Request | Completion] = []
        try:
            for prompt, how in zip(prompts, each, strict=True):
                try:
                    asked.append(self.submit(prompt, how, task=task))
                except WinnowError as error:
                    asked.append(self._refused(how, error))
            while any(one.completion is None for one in asked if isinstance(one, Request)):
                self.step()
        except BaseException:
            for one in asked:
                if isinstance(one, Request):
                    self.cancel(one)
            raise
        ended = [one.completion if isinstance(one, Request) else one for one in asked]
        return [one for one in ended if one is not None]

    def stream(
        self, prompt: AnyPrompt, sampling: Sampling = GREEDY, *, task: TaskProfile | str | None = None
    ) -> Iterator[Event]:
        """The events of one prompt as they come, the last one of each choice with its completion; closing it cancels."""
        inbox: deque[Event] = deque()
        request, going = self._submit(prompt, sampling, task, inbox), sampling.n
        try:
            while going:
                while inbox:
                    event = inbox.popleft()
                    going -= event.finished is not None
                    yield event
                if going:
                    self.step()
        finally:
            self.cancel(request)

    def _prefill(self, request: Request | None) -> list[Event]:
        """Read a prompt into a cache and choose the first new token."""
        if request is None:
            return []
        request.started = time.perf_counter()
        cache: CompactCache | None = None
        try:
            compression = self._compression if request.claim.note is None else self._admission.lean
            cache = CompactCache(self.model, compression.policy, self.budget, task=request.task, hold=False)
            cache.report.policy = self.policy  # as it was asked: looking it up again takes longer than a decode step
            request.report = cache.report
            self._scheduler.begin(request, cache)
            logits, rows = self._prompt_logits(request, cache), request.rows
            if request.claim.note is not None:
                cache.report.notes.append(request.claim.note)
            if cache.looking is not None and not cache.looking.evicts:
                settle(cache, cache.looking.choose())
            chosen = choose(logits.expand(len(rows), -1), [row.sampler for row in rows]) if rows else []
            if cache.looking is not None:
                self._scheduler.look(request, cache)
        except BaseException as error:
            cache = None  # else the error, which has a way to this frame, would keep it
            free_frames(error)
            events = self._scheduler.fail_prompt(request, error)
            if isinstance(error, WinnowError):
                return events
            raise
        return self._scheduler.postprocess(rows, chosen)

    def _prompt_logits(self, request: Request, cache: CompactCache) -> Tensor:
        """Logits of the first new token, ``[1, vocabulary]``."""
        ids = torch.tensor([request.prompt], device=self._slots.device)
        return prefill(self.model, ids, cache, chunk=self._chunk, ceiling=self._ceiling)

    def _decode(self, rows: list[Row]) -> list[Event]:
        """One forward pass of all rows."""
        if not rows:
            return []
        return self._scheduler.postprocess(rows, advance(self._slots, [row.sampler for row in rows]))

    def _recover(self, error: BaseException) -> None:
        """Free all rows after an error: some layers may have the new tokens and some not, so that none can go on.

        If there is no memory for new slots either, the next step tries again.
        """
        free_frames(error)
        self._scheduler.fail_rows(error)
        try:
            self._scheduler.replace(Slots(self.model, compile=self._compile))
        except Exception as second:
            free_frames(second)
            second.__context__, error.__context__ = error.__context__, second

    def _refused(self, sampling: Sampling, error: WinnowError) -> Completion:
        """The answer to a prompt that was not accepted."""
        free_frames(error)
        ended = Completion(0, [], "", "error", None, new_report(self._compression), None, None, error)
        return replace(ended, others=tuple(replace(ended, index=index) for index in range(1, sampling.n)))

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
