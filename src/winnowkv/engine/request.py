"""One request of an engine, from its prompt to its completion, token by token; it has one choice or several."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.compression import Compression
from winnowkv.cache.kept import KeptTokens, NotedPrompt, note_kept
from winnowkv.cache.reports import report_decode
from winnowkv.engine.detokenizer import TextStream
from winnowkv.engine.sampling import Logprob, Sampler, Sampling
from winnowkv.engine.slot_row import DecodeLimit
from winnowkv.errors import InputError
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import Report

Reason = Literal["stop", "length", "cancelled", "error"]
NOT_FINITE = "the model's largest logit is not a finite number: load it in bfloat16 or float32"


@dataclass(frozen=True)
class Completion:
    """How a choice ended; of a request with several, its first one, from which ``choices`` leads to all.

    Attributes
    ----------
    prompt_tokens: of the prompt; 0 if it was refused.
    tokens: all that were chosen, the end token and those of a stop string included.
    text: of the tokens, without the end token and the stop string.
    finish_reason: ``stop`` after an end token or a stop string, ``length`` after ``max_new_tokens``, ``cancelled``, or
        ``error`` (see ``error``).
    logprobs: of each token, if they were asked for.
    report: what was kept of the prompt; a choice's own for what came after it.
    document_tokens: those before the prompt, of a document that it goes on from; they were not read again.
    queue_seconds, first_token_seconds: from submission until the engine began to read the prompt, and until the first
        token was chosen; None if the request ended before.
    index: which of the ``n`` choices this is, from 0. others: the choices after this one, of a whole request's completion.
    noted: what :attr:`kept` is read from.
    """

    prompt_tokens: int
    tokens: list[int]
    text: str
    finish_reason: Reason
    logprobs: list[Logprob] | None
    report: Report
    queue_seconds: float | None
    first_token_seconds: float | None
    error: BaseException | None = None
    index: int = 0
    others: tuple[Completion, ...] = field(default=(), repr=False)
    document_tokens: int = 0
    noted: NotedPrompt | None = field(default=None, repr=False)

    @property
    def kept(self) -> KeptTokens | None:
        """Which tokens of the prompt were kept; None if it was not asked for, or if the choice ended before it was decided."""
        return None if self.noted is None else self.noted.kept(0)

    @property
    def choices(self) -> tuple[Completion, ...]:
        """Every choice of the request, ``n`` of them, in order; this one is the first."""
        return self, *self.others


@dataclass(frozen=True)
class Event:
    """A new token of a request, or its end, or both.

    ``text`` is the text that became final with this event; the events of a choice joined give its text. ``token`` is None if
    the choice ends without one. ``index``: which choice, from 0; ``finished`` is its own completion.
    """

    request: Request
    token: int | None
    text: str
    logprob: Logprob | None
    finished: Completion | None
    index: int = 0


Listener = Callable[[Event], None]  # called with the scheduler's lock held: it only hands the event on


@dataclass(frozen=True)
class Ahead:
    """What a choice that has no row yet holds meanwhile and needs then.

    ``cache``: most bytes of its own cache, with the queries that its policy chooses by. ``columns``: entries and room that it
    needs of each compressed layer in the slots. ``draft``: those of its draft in the slots of drafts, none without a draft.
    ``observe``: queries that it keeps in the slots, if it has a decode budget.
    """

    cache: int
    columns: Sequence[int]
    draft: Sequence[int] = ()
    observe: int = 0


@dataclass(frozen=True)
class Claim:
    """The memory that one request needs, and the ``compression`` that it is served with.

    ``peak``: most bytes while its prompt is read. ``entries``: of each compressed layer afterwards. ``room``: entries of
    new tokens, no more than ``limit``, its decode budget, holds. Each choice needs entries and room of its own. ``looking``:
    what a choice needs until it has its row, if the policy looks. ``note``: why the request is served without lookahead, draft
    and refit, if it is.
    """

    compression: Compression
    peak: int
    entries: list[int]
    room: int
    looking: Ahead | None = None
    note: str | None = None
    limit: DecodeLimit | None = None

    @property
    def observe(self) -> int:
        """Queries that each choice keeps in the slots."""
        return 0 if self.limit is None else self.limit.observe

    @property
    def columns(self) -> list[int]:
        """Entries and room of each compressed layer."""
        return [entries + self.room for entries in self.entries]


class Choice:
    """One continuation of a request's prompt, which depends on no other. ``completion`` is None until it has ended."""

    def __init__(self, sampling: Sampling, tokenizer: Any, end_tokens: frozenset[int], device: torch.device) -> None:
        self.sampler = Sampler(sampling, end_tokens, device)
        self.text = TextStream(tokenizer, sampling.stop, sampling.min_new_tokens)
        self.logprobs: list[Logprob] = []
        self.first = 0.0  # when its first token was chosen
        self.report: Report | None = None  # its own, if what stays of the prompt is chosen by its own tokens
        self.noted: NotedPrompt | None = None  # what was kept of the prompt, once it is decided and if it was asked for
        self.completion: Completion | None = None


class Request:
    """One prompt on its way through an engine.

    Attributes
    ----------
    prompt: its token ids. sampling: how it is continued. choices: its ``sampling.n`` continuations.
    after: the cache of a document that the prompt goes on from, until it is read. document_tokens: those that it has seen.
    completion: None until all choices have ended; then that of the first, whose ``choices`` are all.
    explain: whether its completions say which tokens of the prompt were kept.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        task: TaskProfile,
        claim: Claim,
        report: Report,
        *,
        tokenizer: Any,
        end_tokens: frozenset[int],
        device: torch.device,
        after: CompactCache | None = None,
        listener: Listener | None = None,
        explain: bool = False,
    ) -> None:
        self.explain = explain
        self.prompt, self.sampling, self.task, self.claim, self.report = prompt, sampling, task, claim, report
        self.after, self.document_tokens = after, 0 if after is None else after.get_seq_length()
        self.completion: Completion | None = None
        self.submitted, self.started = time.perf_counter(), 0.0
        self.held = 0  # entries of tokens after the document when its first token is chosen
        self.end_tokens = frozenset[int]() if sampling.ignore_eos else end_tokens
        each = (sampling.choice(index) for index in range(sampling.n))
        self.choices = [Choice(one, tokenizer, self.end_tokens, device) for one in each]
        self._listener = listener

    @property
    def tokens(self) -> list[int]:
        """Those of its first choice that were chosen so far."""
        return self.choices[0].sampler.tokens

    @property
    def rows(self) -> list[Row]:
        """The choices that have not ended."""
        return [Row(self, index) for index, choice in enumerate(self.choices) if choice.completion is None]

    def note_kept(self, cache: CompactCache, rows: Sequence[Row]) -> None:
        """What stays of the prompt is decided in this cache, for these choices: note it if it was asked for."""
        if self.explain:
            noted = note_kept(cache, torch.tensor([self.prompt]))
            for row in rows:
                self.choices[row.number].noted = noted

    def take(self, index: int, chosen: tuple[int, Logprob | None] | None) -> Event:
        """Continue a choice with a token that its sampler chose; None ends it with an error."""
        if chosen is None:
            return self.end(index, "error", InputError(NOT_FINITE))
        choice, (token, logprob) = self.choices[index], chosen
        choice.first = choice.first or time.perf_counter()
        if logprob is not None:
            choice.logprobs.append(logprob)
        ended = token in self.end_tokens
        piece = choice.text.flush() if ended else choice.text.push(token)
        if ended or choice.text.stopped:
            return self._event(index, token, piece, logprob, self._complete(index, "stop"))
        if len(choice.sampler.tokens) < self.sampling.max_new_tokens:
            return self._event(index, token, piece, logprob, None)
        piece += choice.text.flush()
        return self._event(index, token, piece, logprob, self._complete(index, "length"))

    def end(self, index: int, reason: Reason, error: BaseException | None = None) -> Event:
        """End a choice without a token; text that is held back is dropped."""
        return self._event(index, None, "", None, self._complete(index, reason, error))

    def _complete(self, index: int, reason: Reason, error: BaseException | None = None) -> Completion:
        choice = self.choices[index]
        tokens = choice.sampler.tokens
        now, steps = time.perf_counter(), max(len(tokens) - 1, 0)
        report = choice.report or (self.report if len(self.choices) == 1 else copy.deepcopy(self.report))
        limit = self.claim.limit
        held = steps if limit is None else limit.after(self.held, steps)
        report_decode(report, steps, held, now - choice.first if steps else 0.0)
        choice.completion = Completion(
            prompt_tokens=len(self.prompt),
            tokens=tokens,
            text=choice.text.text,
            finish_reason=reason,
            logprobs=None if self.sampling.logprobs is None else choice.logprobs,
            report=report,
            queue_seconds=self.started - self.submitted if self.started else None,
            first_token_seconds=choice.first - self.submitted if choice.first else None,
            error=error,
            index=index,
            document_tokens=self.document_tokens,
            noted=choice.noted,
        )
        each = [one.completion for one in self.choices if one.completion is not None]
        if len(each) == len(self.choices):
            self.completion = replace(each[0], others=tuple(each[1:])) if len(each) > 1 else each[0]
        return choice.completion

    def _event(self, index: int, token: int | None, text: str, logprob: Logprob | None, finished: Completion | None) -> Event:
        event = Event(self, token, text, logprob, finished, index)
        if self._listener is not None:
            self._listener(event)
        return event


class Row(NamedTuple):
    """One choice of a request on its way: what decodes in a row of the slots."""

    request: Request
    number: int  # of the choice, from 0

    @property
    def sampler(self) -> Sampler:
        """What chooses its tokens."""
        return self.request.choices[self.number].sampler

    @property
    def ended(self) -> bool:
        """Whether it has a completion."""
        return self.request.choices[self.number].completion is not None


def free_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, such as keys and values: a completion keeps its error for long."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
