"""From an engine's events to OpenAI's objects and server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import winnowkv
from winnowkv.engine.detokenizer import REPLACEMENT_CHARACTER
from winnowkv.engine.request import Completion, Event
from winnowkv.engine.sampling import Logprob
from winnowkv.serve.errors import ApiError, ClientGoneError, failed
from winnowkv.serve.kept import kept_body
from winnowkv.serve.loop import CUT, MOST_RETRY
from winnowkv.serve.settings import ServeSettings
from winnowkv.serve.ticket import Ticket

Body = dict[str, Any]
FINGERPRINT = f"winnowkv-{winnowkv.__version__}"
LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"


def problem(ticket: Ticket, ended: Completion | None, settings: ServeSettings) -> ApiError:
    """Why a request has no answer; ``ended``: the choice that ended without one. Raises ClientGoneError if its client left."""
    if ticket.why in ("disconnected", "slow"):
        raise ClientGoneError
    if ticket.why == "timeout":
        why = f"the request was not answered within {settings.request_timeout:g} s, and was ended: ask for fewer tokens"
        return ApiError(504, why, code="request_timeout")
    if ticket.why is None and ended is not None and ended.finish_reason == "error":
        return failed(ended.error)
    return ApiError(503, CUT, code="stopping", retry_after=MOST_RETRY)


def sse(body: Body) -> bytes:
    """One server-sent event."""
    return b"data: " + dumped(body) + b"\n\n"


def dumped(body: Body) -> bytes:
    """JSON without blanks."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Answer(ABC):
    """Writes one request's answer, whole or in chunks. Chat and completions differ in :meth:`choice` and :meth:`delta`.

    Parameters
    ----------
    ticket: the request. tokenizer: writes single tokens of log probabilities. settings: for the model's name.
    include_usage: a last chunk with the usage.
    """

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, ticket: Ticket, tokenizer: Any, settings: ServeSettings, *, choices: int, include_usage: bool) -> None:
        self.ticket, self.tokenizer, self.settings = ticket, tokenizer, settings
        self.choices, self.include_usage = choices, include_usage
        self.completions: dict[int, Completion] = {}
        self.explained: Body = {}  # what an answer says more if ``winnow.explain`` was asked for
        self.id, self.created = f"{self.prefix}-{ticket.id.removeprefix('req-')}", int(time.time())
        # Every chunk begins and ends with the same bytes.
        self._before = b"data: " + dumped(self.head(self.chunk_kind))[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def take(self, events: Iterable[tuple[int, Event]]) -> ApiError | None:
        """Note the choices that have ended; the error if one has ended without an answer."""
        for at, event in events:
            ended = event.finished
            if ended is not None:
                if ended.finish_reason in ("cancelled", "error"):
                    return problem(self.ticket, ended, self.settings)
                self.completions[at * self.choices + ended.index] = ended
        return None

    def head(self, kind: str) -> Body:
        """What every object begins with."""
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.settings.model}
        return named | {"system_fingerprint": FINGERPRINT}

    async def explain(self) -> None:
        """Once all choices have ended: note what was kept of the prompt, if it was asked for."""
        if any(request.explain for request in self.ticket.requests):
            kept = await asyncio.to_thread(lambda: kept_body(self.completions[0].kept, self.tokenizer))
            self.explained = {"winnow_kept": kept}

    def whole(self) -> Body:
        """The whole answer, once all choices have ended."""
        choices = [self.choice(at, self.completions[at]) for at in sorted(self.completions)]
        return self.head(self.kind) | {"choices": choices, "usage": self.usage()} | self.explained

    def first(self) -> bytes:
        """What a stream begins with."""
        return b""

    def chunks(self, events: Iterable[tuple[int, Event]]) -> bytes:
        """Events as server-sent events, a chunk each."""
        return b"".join(self.chunk(self.delta(at * self.choices + event.index, event)) for at, event in events)

    def chunk(self, choice: Body) -> bytes:
        """A chunk of one choice."""
        return self._before + dumped(choice) + self._after

    def last(self, error: ApiError | None) -> bytes:
        """What a stream ends with: usage if it was asked for, or an error, and the terminator."""
        if error is not None:
            return sse(error.body(self.ticket.id)) + DONE
        if not (self.include_usage or self.explained):
            return DONE
        usage = {"usage": self.usage()} if self.include_usage else {}
        return sse(self.head(self.chunk_kind) | {"choices": []} | usage | self.explained) + DONE

    @abstractmethod
    def choice(self, index: int, ended: Completion) -> Body:
        """One choice of the whole answer."""

    @abstractmethod
    def delta(self, index: int, event: Event) -> Body:
        """One choice of a chunk."""

    def usage(self) -> Body:
        """Tokens, and what was kept."""
        prompts = self.ticket.prompts
        read = sum(len(prompt.ids) for prompt in prompts)
        cached = sum(prompt.context_tokens for prompt in prompts)
        new = sum(len(ended.tokens) for ended in self.completions.values())
        return {
            "prompt_tokens": read + cached, "completion_tokens": new, "total_tokens": read + cached + new,
            "prompt_tokens_details": {"cached_tokens": cached}, "winnow": self.kept(),
        }  # fmt: skip

    def kept(self) -> Body:
        """``usage.winnow``: of the first choice of each prompt, since all choices of one keep the same number of entries."""
        ends = [self.completions[at] for at in sorted(self.completions) if at % self.choices == 0]
        reports = [ended.report for ended in ends]
        entries = [count for report in reports for row in report.kept_entries for count in row]
        known = [seconds for ended in ends if (seconds := ended.first_token_seconds) is not None]
        queued = [seconds for ended in ends if (seconds := ended.queue_seconds) is not None]
        notes = dict.fromkeys([*self.ticket.notes, *(note for report in reports for note in (*report.looked, *report.notes))])
        return {
            "policy": reports[0].policy, "budget": reports[0].budget,
            "prompt_tokens": sum(ended.prompt_tokens for ended in ends),
            "kept_entries": {"min": min(entries), "mean": round(sum(entries) / len(entries), 2), "max": max(entries)}
            if entries else None,
            "kept_bytes": sum(report.kept_bytes for report in reports),
            "full_bytes": sum(report.full_bytes for report in reports),
            "seconds": {
                "queue": rounded(min(queued, default=None)), "first_token": rounded(min(known, default=None)),
                "total": rounded(time.perf_counter() - self.ticket.began),
            },
            "notes": list(notes), "context": self.ticket.prompts[0].context,
            "context_tokens": sum(prompt.context_tokens for prompt in self.ticket.prompts),
        }  # fmt: skip

    def token(self, token: int) -> str:
        """The text of one token."""
        text: str = self.tokenizer.decode([token])
        return text

    def shown(self, logprobs: Sequence[Logprob] | None, event_end: frozenset[int]) -> list[Logprob]:
        """The log probabilities of tokens that are text: without the end token's."""
        return [one for one in logprobs or () if one.token not in event_end]


def at_least(logprob: float) -> float:
    """A log probability that JSON can write: OpenAI's -9999 for that of a token that cannot come."""
    return max(logprob, LEAST_LOGPROB)


def rounded(seconds: float | None) -> float | None:
    """Seconds to the hundredth of a millisecond."""
    return None if seconds is None else round(seconds, 5)


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> bytes:
        """A chunk with the role for each choice."""
        delta = {"role": "assistant", "content": ""}
        choices = range(len(self.ticket.prompts) * self.choices)
        return b"".join(
            self.chunk({"index": at, "delta": delta, "logprobs": None, "finish_reason": None}) for at in choices
        )  # fmt: skip

    def choice(self, index: int, ended: Completion) -> Body:
        """A whole message."""
        request = self.ticket.requests[index // self.choices]
        said = {"role": "assistant", "content": ended.text, "refusal": None}
        logprobs = None if ended.logprobs is None else self.logprobs(self.shown(ended.logprobs, request.end_tokens))
        return {"index": index, "message": said, "logprobs": logprobs, "finish_reason": ended.finish_reason}

    def delta(self, index: int, event: Event) -> Body:
        """The text that became final with an event."""
        ended = event.finished.finish_reason if event.finished is not None else None
        delta = {"content": event.text} if event.text or ended is None else {}
        found = self.shown([event.logprob], event.request.end_tokens) if event.logprob is not None else []
        return {"index": index, "delta": delta, "logprobs": self.logprobs(found) if found else None, "finish_reason": ended}

    def logprobs(self, found: Iterable[Logprob]) -> Body:
        """Log probabilities of tokens."""
        content = [
            self.entry(one.token, one.logprob) | {"top_logprobs": [self.entry(*each) for each in one.top]} for one in found
        ]
        return {"content": content, "refusal": None}

    def entry(self, token: int, logprob: float) -> Body:
        """One token with its log probability and bytes."""
        text = self.token(token)
        return {
            "token": text, "logprob": at_least(logprob),
            "bytes": None if REPLACEMENT_CHARACTER in text else list(text.encode()),
        }  # fmt: skip


class TextAnswer(Answer):
    """Of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._offsets: dict[int, int] = {}  # characters of each choice's tokens so far

    def choice(self, index: int, ended: Completion) -> Body:
        """A whole completion."""
        request = self.ticket.requests[index // self.choices]
        found = None if ended.logprobs is None else self.shown(ended.logprobs, request.end_tokens)
        logprobs = None if found is None else self.logprobs(index, found)
        return {"index": index, "text": ended.text, "logprobs": logprobs, "finish_reason": ended.finish_reason}

    def delta(self, index: int, event: Event) -> Body:
        """The text that became final with an event."""
        found = self.shown([event.logprob], event.request.end_tokens) if event.logprob is not None else []
        ended = event.finished.finish_reason if event.finished is not None else None
        logprobs = self.logprobs(index, found) if found else None
        return {"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": ended}

    def logprobs(self, index: int, found: Iterable[Logprob]) -> Body:
        """Log probabilities of a choice's next tokens."""
        body: Body = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        at = self._offsets.get(index, 0)
        for one in found:
            text = self.token(one.token)
            body["tokens"].append(text)
            body["token_logprobs"].append(at_least(one.logprob))
            body["top_logprobs"].append({self.token(token): at_least(logprob) for token, logprob in one.top})
            body["text_offset"].append(at)
            at += len(text)
        self._offsets[index] = at
        return body
