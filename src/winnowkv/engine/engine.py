"""The engine: prompts wait in a queue, are read one by one, compressed, placed in slots, and decode together.

A request's answer does not depend on the other requests: its prompt is read alone, its row of a step is its own, and so are
its draws and its text. Which requests wait and which run is decided by :class:`~winnowkv.engine.scheduler.Scheduler`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.looking import settle
from winnowkv.cache.reading import prefill
from winnowkv.engine.admission import Admission
from winnowkv.engine.drafts import Drafts
from winnowkv.engine.intake import Intake, Settings
from winnowkv.engine.interleaving import Interleaving
from winnowkv.engine.job import Job
from winnowkv.engine.looking import LookingSteps
from winnowkv.engine.request import Completion, Event, Listener, Request, Row, free_frames
from winnowkv.engine.sampling import Sampling, check_whole, choose
from winnowkv.engine.scheduler import Scheduler
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import GREEDY, advance
from winnowkv.errors import InputError, WinnowError
from winnowkv.memory.shape import shape_of
from winnowkv.memory.sizes import read_size
from winnowkv.models.info import cache_argument
from winnowkv.policies import Policy
from winnowkv.prompt.chat import AnyPrompt
from winnowkv.prompt.task import TaskProfile
from winnowkv.types import Between

T = TypeVar("T")


class Engine:
    """Answers many prompts at once with compressed caches. Every method may be called from any thread.

    First come, first served: a prompt is read as soon as the bytes of keys and values that it needs, while it is read and
    afterwards with all its new tokens, fit beside what is held. One prompt is read at a time; with ``interleave`` the others
    decode meanwhile.

    Parameters
    ----------
    model, policy, budget, quality: as for :class:`CompactCache`.
    tokenizer: reads prompts and writes text; policies that score by task or structure decode prompts with it.
    kv_memory: most bytes of keys and values, as a number or ``"512MiB"``; None for no limit. The copy of a layer that
        exists while its buffers grow or shrink comes on top, one layer at a time.
    max_rows: most choices (of all requests) that decode together.
    prefill_chunk, prefill_ceiling: read prompts in chunks (:func:`winnowkv.cache.reading.prefill`).
    interleave: tokens of a prompt that are read between two decode steps of the others, in whole layers (a prompt of twice as
        many tokens waits after each half of the layers). None: they wait until a prompt is read.
    compile: compiled decode steps (:class:`Slots`); :meth:`warm_up` compiles them before the first request.
    decode_budget: of each request's new tokens, as for :class:`CompactCache`: long answers take no more memory than that.
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
        interleave: int | None = None,
        decode_budget: int | None = None,
    ) -> None:
        check_whole("max_rows", max_rows, 1)
        if interleave is not None:
            check_whole("interleave", interleave, 1, ", or None")
        if prefill_ceiling is not None and prefill_chunk is None:
            raise InputError(f"prefill_ceiling={prefill_ceiling} limits what is held between chunks: give prefill_chunk, too")
        self.model, self.tokenizer = model, tokenizer
        limit = None if kv_memory is None else read_size(kv_memory, "kv_memory")
        self.max_rows = max_rows
        self._chunk, self._ceiling = prefill_chunk, prefill_ceiling
        self._compile, self._interleave = compile, interleave
        # Raises now what would be raised for every prompt.
        self._intake = Intake(model, tokenizer, Settings(policy, budget, quality, task), max_rows, decode_budget)
        self.policy, self.budget = self._intake.compression.asked, self._intake.compression.budget
        self.end_tokens = self._intake.end_tokens
        slots = Slots(model, compile=compile)  # while they live the model's attention goes through ours
        shape = shape_of(slots.layers, model)
        self._layers = len(shape.layers)
        self._admission = Admission(shape, limit, prefill_chunk, prefill_ceiling)
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
        entries = self._admission.kept_entries(
            self._intake.compression, prompt_tokens, TaskProfile.of(self._intake.settings.task or "localization")
        )
        room, rows, observe = new_tokens - 1, self.max_rows, 0
        if (limit := self._intake.limit(self._intake.compression)) is not None:
            room, observe = limit.columns(0, room), limit.observe
        if self.kv_memory is not None:
            most = max(self.kv_memory // self._slots.bytes_alone(entries, room, observe=observe), 1)
            rows = max(size for size in self._slots.graph_rows(min(rows, most)) if size <= most)
        with self._scheduler.turn():
            self._mend()
            return self._slots.warm_up(rows, entries[0], room, observe)

    def submit(
        self,
        prompt: AnyPrompt,
        sampling: Sampling = GREEDY,
        *,
        task: TaskProfile | str | None = None,
        policy: str | Policy | None = None,
        budget: Budget | int | float | str | None = None,
        quality: str | None = None,
        decode_budget: int | None = None,
        after: CompactCache | None = None,
        listener: Listener | None = None,
        explain: bool = False,
    ) -> Request:
        """Queue a prompt: text as it is, chat messages, or token ids. :meth:`step` does the work.

        Parameters
        ----------
        policy, budget, quality: of this prompt, in place of the engine's; a policy of its own has no quality but the one given.
        decode_budget: of its new tokens, in place of the engine's.
        after: the cache of a document (:attr:`winnowkv.Document.cache`). The prompt, token ids, goes on from it, and counts as
            new tokens in the decode budget (the request's, else the document's, else the engine's). It stays as it is.
        listener: called with each of the request's events by the thread that makes them, which holds a lock: hand them on only.
        explain: note which tokens of the prompt are kept: :attr:`Completion.kept`.

        Raises
        ------
        InputError
            For a prompt that is empty, too long, or can never fit into ``kv_memory``; for more choices than ``max_rows``; for
            a policy, or ``explain``, beside ``after``.
        BudgetError
            If a budget in entries cannot hold sinks and recent window of a prompt of this length.
        PolicyError, ProfileError, UnsupportedModelError
            For a policy of its own, as :class:`Engine`.
        CacheError
            For a cache that no row can go on from.
        """
        own = Settings(policy, budget, quality, task)
        where = self._admission, self._slots
        more: dict[str, Any] = {"decode_budget": decode_budget, "listener": listener, "explain": explain}
        request = self._intake.request(prompt, sampling, own, *where, after=after, **more)
        self._scheduler.add(request)
        return request

    def run_job(self, work: Callable[[Between], T], peak: int) -> Job[T]:
        """Queue work on the model, such as reading a document. It is done by :meth:`step`, when its turn has come.

        ``work`` is given a function for ``between=`` of the caches that it reads into (:func:`winnowkv.read` takes it):
        requests decode meanwhile. ``peak``: most bytes of keys and values that it holds (:meth:`whole_bytes`).
        Raises InputError for more bytes than ``kv_memory``.
        """
        self._admission.check_fits(peak, "this work")
        job = Job(work, peak)
        self._scheduler.add(job)
        return job

    def whole_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens of which nothing is evicted."""
        return self._admission.whole_bytes(tokens)

    def cancel(self, request: Request, index: int | None = None) -> None:
        """End a request or one choice now. Its row is free at once, or as soon as the forward pass that is running ends."""
        if index is not None and not 0 <= index < len(request.choices):
            raise InputError(f"choice {index} is not there: the request has choices 0 to {len(request.choices) - 1}")
        self._scheduler.cancel(request, index)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Read the first waiting prompt if it fits, then do one decode step of all active requests; returns their events.

        With ``interleave`` further decode steps are done while the prompt is read, and their events are among those returned.

        A request whose policy looks takes its first tokens from its own whole cache, in a forward pass with the others that
        look, and then, with a draft, waits while that is decoded, a token a step, together with those of others.

        An error that one prompt causes (a :class:`WinnowError` while it is read) ends that request alone, and its last
        event holds it. Any other error is raised, and ends all requests that were in the forward pass; their memory is
        free, and the next step goes on with the others.
        """
        events: list[Event] = []
        failed: list[Exception] = []  # decode steps while a prompt was read
        with self._scheduler.turn():
            self._mend()
            coming = self._scheduler.next_prompt()
            if isinstance(coming, Job):
                self._work(coming, events, failed)
            elif coming is not None:
                self._prefill(coming, events, failed)
            self._advance(events)
            if failed:
                raise failed[0]
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
                    asked.append(self._intake.refused(how, error))
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
        request, going = self.submit(prompt, sampling, task=task, listener=inbox.append), sampling.n
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

    def _advance(self, events: list[Event], reading: int | None = None) -> None:
        """One step of all that are not read; ``reading``: bytes that what is being read may still come to hold."""
        events += self._looking.run(self._scheduler.lookers())
        try:
            if reading is None:
                events += self._scheduler.place()
            else:
                self._scheduler.place_lookers(reading)
            events += self._decode(self._scheduler.rows())
        except BaseException as error:
            self._recover(error, reading=reading is not None)
            raise

    def _between(self, peak: int, stopped: Callable[[], bool], events: list[Event], failed: list[Exception]) -> Interleaving:
        """What a cache calls between the layers of what is read into it. A step that fails does not end the reading."""

        def step() -> None:
            try:
                self._mend()
                self._advance(events, peak)
            except Exception as error:
                failed.append(error)

        return Interleaving(self._interleave, self._layers, step, stopped)

    def _work(self, job: Job[Any], events: list[Event], failed: list[Exception]) -> None:
        """Do a job."""
        self._scheduler.work_on(job)
        try:
            job.run(self._between(job.peak, lambda: job.stopped, events, failed))
        finally:
            self._scheduler.work_on(None)

    def _prefill(self, request: Request, events: list[Event], failed: list[Exception]) -> None:
        """Read a prompt into a cache and choose the first new token."""
        request.started = time.perf_counter()
        cache: CompactCache | None = None
        try:
            cache = self._intake.new_cache(request)
            request.report = cache.report
            self._scheduler.begin(request, cache)
            cache.between = self._between(request.claim.peak, lambda: request.completion is not None, events, failed)
            logits, rows = self._prompt_logits(request, cache), request.rows
            request.held = cache.compact_layers[0].generated
            cache.between = None  # what a row that looks reads is a step of its own
            if request.claim.note is not None:
                cache.report.notes.append(request.claim.note)
            if cache.looking is not None and not cache.looking.evicts:
                settle(cache, cache.looking.choose())
            chosen = choose(logits.expand(len(rows), -1), [row.sampler for row in rows]) if rows else []
            if cache.looking is not None:
                self._scheduler.look(request, cache)
            else:
                request.note_kept(cache, rows)
        except BaseException as error:
            cache = None  # else the error, which has a way to this frame, would keep it
            free_frames(error)
            events += self._scheduler.fail_prompt(request, error)
            if not isinstance(error, WinnowError):
                raise
            return
        events += self._scheduler.postprocess(rows, chosen)

    def _prompt_logits(self, request: Request, cache: CompactCache) -> Tensor:
        """Logits of the first new token, ``[1, vocabulary]``."""
        ids = torch.tensor([request.prompt], device=self._slots.device)
        if cache.session is None:  # it goes on from a document
            for part in ids.split(self._chunk or ids.shape[1], 1):
                read = self.model(input_ids=part, **cache_argument(self.model, cache), use_cache=True, logits_to_keep=1)
            logits: Tensor = read.logits
            return logits[:, -1]
        return prefill(self.model, ids, cache, chunk=self._chunk, ceiling=self._ceiling)

    def _decode(self, rows: list[Row]) -> list[Event]:
        """One forward pass of all rows."""
        if not rows:
            return []
        return self._scheduler.postprocess(rows, advance(self._slots, [row.sampler for row in rows]))

    def _mend(self) -> None:
        """New slots in place of broken ones."""
        if self._scheduler.broken:
            self._scheduler.replace(Slots(self.model, compile=self._compile))

    def _recover(self, error: BaseException, *, reading: bool = False) -> None:
        """Free all rows after an error: some layers may have the new tokens and some not, so that none can go on.

        If there is no memory for new slots either, the next step tries again.
        """
        free_frames(error)
        self._scheduler.fail_rows(error, reading=reading)
        try:
            self._mend()
        except Exception as second:
            free_frames(second)
            second.__context__, error.__context__ = error.__context__, second
