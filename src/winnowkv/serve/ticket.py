"""A request on its way: what it asks of the engine, and its events as the event loop sees them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from winnowkv.engine.request import Event, Request
from winnowkv.engine.sampling import Sampling
from winnowkv.serve.prompts import Prompt

if TYPE_CHECKING:
    from winnowkv.serve.loop import EngineLoop


@dataclass(frozen=True)
class How:
    """How a prompt is continued.

    ``options``: of :meth:`Engine.submit`, such as task, policy, budget, quality, decode_budget. ``note``: what the user should
    know of them.
    """

    sampling: Sampling
    options: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a request asks of the engine.

    ``read``: makes the prompts. ``how``: how one of them is continued. Both are called in a thread, and raise ApiError or
    WinnowError. ``prompts``: how many there will be. ``choices``: of each.
    """

    read: Callable[[], list[Prompt]]
    how: Callable[[Prompt], How]
    prompts: int = 1
    choices: int = 1


class Ticket:
    """A request on its way, as the event loop sees it. Made by :meth:`EngineLoop.submit`.

    Attributes
    ----------
    id: of the request. prompts: that it has. requests: of the engine, one for each prompt.
    notes: on how they are served.
    why: why it was cancelled: ``disconnected``, ``timeout``, ``queue``, ``stopping`` or ``slow``; None if it was not.
    left: choices that have not ended. generated: tokens so far. began: when it was submitted, by ``time.perf_counter()``.
    """

    def __init__(self, id: str, asked: Asked, loop: EngineLoop) -> None:
        self.id, self.began = id, time.perf_counter()
        self.prompts: list[Prompt] = []
        self.requests: list[Request] = []
        self.notes: list[str] = []
        self.unread = asked.prompts  # prompts that the engine does not have yet
        self.left, self.generated = asked.prompts * asked.choices, 0
        self.why: str | None = None
        self._loop, self._asked = loop, asked
        self._lock = threading.Lock()
        self._events: deque[tuple[int, Event]] = deque()
        self._there = asyncio.Event()
        self._last: dict[tuple[int, int], float] = {}
        self.timer: asyncio.TimerHandle | None = None

    @property
    def started(self) -> bool:
        """Whether the engine has begun to read one of the prompts."""
        return any(request.started for request in self.requests)

    async def wait(self) -> None:
        """Until an event is there that :meth:`events` has not returned, or all choices have ended."""
        if not self._events and self.left:
            self._there.clear()
            await self._there.wait()

    async def events(self) -> list[tuple[int, Event]]:
        """All events that are there, at least one, each with the number of its prompt; none once every choice has ended."""
        await self.wait()
        taken = list(self._events)
        self._events.clear()
        return taken

    def cancel(self, why: str) -> None:
        """End what has not ended; its last events come as ever. May be called from any thread, and often."""
        with self._lock:
            if self.why is not None or not self.left:
                return
            self.why = why
            requests = list(self.requests)
        for request in requests:
            self._loop.engine.cancel(request)

    def _submit(self) -> None:
        """Read the prompts and hand them to the engine; all or none. In a thread."""
        self.prompts = self._asked.read()
        every = [self._asked.how(prompt) for prompt in self.prompts]
        self.notes = [how.note for how in every if how.note is not None]
        for at, (prompt, how) in enumerate(zip(self.prompts, every, strict=True)):
            if self.why is not None:
                return
            listener = partial(self._loop.post, self, at)
            request = self._loop.engine.submit(prompt.ids, how.sampling, after=prompt.after, listener=listener, **how.options)
            self.count_read(1)
            with self._lock:
                self.requests.append(request)
                late = self.why is not None
            if late:
                self._loop.engine.cancel(request)

    def count_read(self, prompts: int) -> None:
        """Prompts that the engine has now, or will never have. Any thread."""
        with self._lock:
            prompts = min(prompts, self.unread)
            self.unread -= prompts
        self._loop._count_reading(-prompts)

    def _take(self, at: int, event: Event) -> None:
        """On the event loop."""
        metrics, now = self._loop.metrics, time.perf_counter()
        if event.token is not None:
            self.generated += 1
            place = at, event.index
            if place in self._last:
                metrics.between_tokens.observe(now - self._last[place])
            elif event.request.started:
                metrics.first_token.observe(now - self.began)
                metrics.queue_seconds.observe(event.request.started - event.request.submitted)
            self._last[place] = now
            self._let_go(at)
        self._events.append((at, event))
        if event.finished is not None:
            self.left -= 1
            if not self.left:
                self._loop.ended(self)
        self._there.set()

    def _let_go(self, at: int) -> None:
        """A prompt was read: what it went on from may leave the memory."""
        prompt = self.prompts[at]
        if prompt.release is not None:
            self.prompts[at] = replace(prompt, after=None, release=None)
            prompt.release()
