"""One request of an engine, from its prompt to its completion, token by token."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch

from winnowkv.cache.reports import report_decode
from winnowkv.engine.detokenizer import TextStream
from winnowkv.engine.sampling import Logprob, Sampler, Sampling
from winnowkv.errors import InputError
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import Report

Reason = Literal["stop", "length", "cancelled", "error"]
NOT_FINITE = "the model's largest logit is not a finite number: load it in bfloat16 or float32"


@dataclass(frozen=True)
class Completion:
    """How a request ended.

    Attributes
    ----------
    tokens: all that were chosen, the end token and those of a stop string included.
    text: of the tokens, without the end token and the stop string.
    finish_reason: ``stop`` after an end token or a stop string, ``length`` after ``max_new_tokens``, ``cancelled``, or
        ``error`` (see ``error``).
    logprobs: of each token, if they were asked for.
    report: what was kept of the prompt.
    queue_seconds, first_token_seconds: from submission until the engine began to read the prompt, and until the first
        token was chosen; None if the request ended before.
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


@dataclass(frozen=True)
class Event:
    """A new token of a request, or its end, or both.

    ``text`` is the text that became final with this event; a request's events joined give its text. ``token`` is None if
    the request ends without one.
    """

    request: Request
    token: int | None
    text: str
    logprob: Logprob | None
    finished: Completion | None


@dataclass(frozen=True)
class Claim:
    """The memory that one request needs.

    ``peak``: most bytes while its prompt is read. ``entries``: of each compressed layer afterwards. ``room``: entries of
    new tokens.
    """

    peak: int
    entries: list[int]
    room: int


class Request:
    """One prompt on its way through an engine.

    Attributes
    ----------
    prompt: its token ids. sampling: how it is continued. completion: None until the request has ended.
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
        inbox: deque[Event] | None = None,
    ) -> None:
        self.prompt, self.sampling, self.task, self.claim, self.report = prompt, sampling, task, claim, report
        self.completion: Completion | None = None
        self.submitted, self.started, self.first = time.perf_counter(), 0.0, 0.0
        self.end_tokens = frozenset[int]() if sampling.ignore_eos else end_tokens
        self.sampler = Sampler(sampling, self.end_tokens, device)
        self._text = TextStream(tokenizer, sampling.stop, sampling.min_new_tokens)
        self._logprobs: list[Logprob] = []
        self._inbox = inbox

    @property
    def tokens(self) -> list[int]:
        """Those that were chosen so far."""
        return self.sampler.tokens

    def take(self, chosen: tuple[int, Logprob | None] | None) -> Event:
        """Continue with a token that the request's sampler chose; None ends the request with an error."""
        if chosen is None:
            return self.end("error", InputError(NOT_FINITE))
        token, logprob = chosen
        self.first = self.first or time.perf_counter()
        if logprob is not None:
            self._logprobs.append(logprob)
        ended = token in self.end_tokens
        piece = self._text.flush() if ended else self._text.push(token)
        if ended or self._text.stopped:
            return self._event(token, piece, logprob, self._complete("stop"))
        if len(self.tokens) < self.sampling.max_new_tokens:
            return self._event(token, piece, logprob, None)
        piece += self._text.flush()
        return self._event(token, piece, logprob, self._complete("length"))

    def end(self, reason: Reason, error: BaseException | None = None) -> Event:
        """End the request without a token; text that is held back is dropped."""
        return self._event(None, "", None, self._complete(reason, error))

    def _complete(self, reason: Reason, error: BaseException | None = None) -> Completion:
        now, steps = time.perf_counter(), max(len(self.tokens) - 1, 0)
        report_decode(self.report, steps, steps, now - self.first if steps else 0.0)
        self.completion = Completion(
            prompt_tokens=len(self.prompt),
            tokens=self.tokens,
            text=self._text.text,
            finish_reason=reason,
            logprobs=None if self.sampling.logprobs is None else self._logprobs,
            report=self.report,
            queue_seconds=self.started - self.submitted if self.started else None,
            first_token_seconds=self.first - self.submitted if self.first else None,
            error=error,
        )
        return self.completion

    def _event(self, token: int | None, text: str, logprob: Logprob | None, finished: Completion | None) -> Event:
        event = Event(self, token, text, logprob, finished)
        if self._inbox is not None:
            self._inbox.append(event)
        return event
