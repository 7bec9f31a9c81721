"""One thread owns the engine and steps it; requests come from the event loop, and their events go back there."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from winnowkv.engine.engine import Engine
from winnowkv.engine.job import Job, StoppedError
from winnowkv.engine.request import Event
from winnowkv.serve.errors import ApiError
from winnowkv.serve.metrics import Metrics
from winnowkv.serve.prompts import release
from winnowkv.serve.settings import ServeSettings
from winnowkv.serve.ticket import Asked, Ticket
from winnowkv.types import Between

T = TypeVar("T")
logger = logging.getLogger("winnowkv.serve")
READERS = 4  # threads that turn texts into tokens
LONGEST_PAUSE = 5.0  # seconds before the engine is stepped again after errors one after the other
MOST_RETRY = 30  # seconds that a client is told to wait
STUCK_SECONDS = 0.005  # between two looks at a queue of which nothing can be begun
GATHER_SECONDS = 0.001  # in which the events of a step are gathered
END_SECONDS = 5.0  # in which requests that were cancelled have to end
STOPPING = "the server is stopping and takes no new requests: try again, it may be back soon"
CUT = "the server is stopping, and ended this request before its answer was whole: ask again, it may be back soon"


class EngineLoop:
    """Steps an engine in a thread of its own, and is the only one who does.

    Everything but :meth:`post` and :meth:`wake` is called on the event loop on which :meth:`start` was called.

    Parameters
    ----------
    engine: that requests are submitted to. settings: limits. metrics: what is counted.
    """

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.draining = False
        self._tickets: set[Ticket] = set()
        self._jobs: set[Job[Any]] = set()
        self._wake = threading.Condition()
        self._stop = False
        self._posted: deque[tuple[Ticket, int, Event]] = deque()
        self._scheduled = False
        self._failed: list[str] = []  # ids of requests that ended with an error in this step
        self._reading = 0  # prompts whose text is read
        self._pace = 1.0  # seconds that requests lately waited in the queue
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="winnow-read")
        self._thread = threading.Thread(target=self._run, name="winnow-engine", daemon=True)
        self._events: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to step; the running event loop gets the events."""
        self._events = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Prompts that the engine has not begun."""
        return self.engine.waiting + self._reading

    async def submit(self, request_id: str, asked: Asked) -> Ticket:
        """Queue a request; its prompts are read in a thread.

        Raises
        ------
        ApiError
            Of status 503 if the server stops, 429 if the queue is full.
        WinnowError
            What :meth:`Engine.submit` refuses.
        """
        self._check_open()
        if asked.prompts > self.settings.queue:
            raise ApiError(
                400, f"{asked.prompts} prompts in one request pass the queue's length of {self.settings.queue}: send fewer",
                code="too_many_prompts", param="prompt",
            )  # fmt: skip
        self._check_queue(asked.prompts)
        ticket = Ticket(request_id, asked, self)
        self._tickets.add(ticket)
        self._idle.clear()
        self._count_reading(asked.prompts)
        reading = asyncio.get_running_loop().run_in_executor(self._threads, ticket._submit)
        ticket.timer = asyncio.get_running_loop().call_later(self.settings.request_timeout, ticket.cancel, "timeout")
        try:
            await asyncio.shield(reading)
        except asyncio.CancelledError:
            ticket.cancel("disconnected")
            reading.add_done_callback(lambda _: self._abandon(ticket))
            raise
        except BaseException:
            ticket.cancel("refused")
            self._abandon(ticket)
            raise
        finally:
            ticket.count_read(ticket.unread)
        if ticket.why is not None and len(ticket.requests) < asked.prompts:  # cancelled before all were submitted
            self._abandon(ticket)
        self.wake()
        return ticket

    async def begin(self, ticket: Ticket) -> None:
        """Wait for a request's first event, for as long as the queue's deadline says.

        Raises ApiError of status 429 if no prompt of it was begun by then; it is cancelled.
        """
        try:
            async with asyncio.timeout(self.settings.queue_deadline):
                await ticket.wait()
        except TimeoutError:
            if not ticket.started:
                ticket.cancel("queue")
                raise ApiError(
                    429, f"the request was not begun within {self.settings.queue_deadline:g} s: try again later",
                    code="queue_deadline", retry_after=self.retry_after,
                ) from None  # fmt: skip
            await ticket.wait()

    def _count_reading(self, more: int) -> None:
        """Count prompts that are read, or, below 0, that the engine has now. Any thread."""
        with self._wake:
            self._reading += more

    async def run_job(self, work: Callable[[Between], T], peak: int) -> T:
        """Do work on the model when its turn in the queue has come (:meth:`Engine.run_job`), and return what it returns.

        It is stopped if the awaiting task is cancelled, or the server stops. Raises ApiError as :meth:`submit` does, InputError
        for more bytes than ``kv_memory``, and what the work raises.
        """
        self._check_open()
        self._check_queue(1)
        job = self.engine.run_job(work, peak)
        self._jobs.add(job)
        self._idle.clear()
        self.wake()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            stopped = job.stopped  # by stop(), not by whoever awaits this
            job.stop()
            if stopped:
                self._check_open()
            raise
        except StoppedError:
            self._check_open()
            raise
        finally:
            self._jobs.discard(job)
            self._note_idle()

    def _check_open(self) -> None:
        if self.draining or not self.alive:
            raise ApiError(503, STOPPING, code="stopping", retry_after=MOST_RETRY)

    def _check_queue(self, more: int) -> None:
        if self.waiting + more > self.settings.queue:
            raise ApiError(
                429, f"{self.waiting} prompts wait, and the queue holds {self.settings.queue}: try again later",
                code="queue_full", retry_after=self.retry_after,
            )  # fmt: skip

    @property
    def retry_after(self) -> float:
        """Seconds after which the queue may have room again: as long as requests waited lately."""
        return min(max(1, math.ceil(self._pace)), MOST_RETRY)

    def wake(self) -> None:
        """Let the engine's thread look for work; call it after work was given to the engine by another way. Any thread."""
        with self._wake:
            self._wake.notify()

    def post(self, ticket: Ticket, at: int, event: Event) -> None:
        """Hand an event of a ticket's prompt ``at`` to the event loop. Any thread; returns at once."""
        if event.finished is not None and event.finished.finish_reason == "error":
            self._failed.append(ticket.id)
        self._posted.append((ticket, at, event))
        if not self._scheduled and self._events is not None:  # else a delivery is coming that takes this event along
            self._scheduled = True
            try:
                self._events.call_soon_threadsafe(self._gather)
            except RuntimeError:  # the event loop is closed: no client listens any more
                self._scheduled = False

    def _gather(self) -> None:
        """Wait for the events of the other rows of the same step: to switch threads for each costs more than to deliver it."""
        assert self._events is not None
        self._events.call_later(GATHER_SECONDS, self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False  # before the events are taken, so that one posted from now on schedules again
        while self._posted:
            ticket, at, event = self._posted.popleft()
            ticket._take(at, event)

    def ended(self, ticket: Ticket) -> None:
        """All choices of a ticket have ended. On the event loop."""
        if ticket not in self._tickets:
            return
        self._tickets.discard(ticket)
        if ticket.timer is not None:
            ticket.timer.cancel()
        if ticket.why is not None:
            self.metrics.cancelled.labels(ticket.why).inc()
        self.metrics.generated.inc(ticket.generated)
        for request in ticket.requests:
            if request.started:
                self._pace += 0.2 * (request.started - request.submitted - self._pace)
                self.metrics.read(request)
        release(ticket.prompts)
        self._note_idle()

    def _note_idle(self) -> None:
        if not (self._tickets or self._jobs):
            self._idle.set()

    def _abandon(self, ticket: Ticket) -> None:
        """End a ticket of which not all prompts were submitted."""
        ticket.left = 0
        self.ended(ticket)
        ticket._there.set()

    def cancel_all(self, why: str) -> None:
        """Cancel every request."""
        for ticket in list(self._tickets):
            ticket.cancel(why)

    async def stop(self, seconds: float) -> None:
        """Take no new requests, let the running ones end for so many seconds, cancel the rest, and end the thread."""
        self.draining = True
        for each, last in ((seconds, False), (END_SECONDS, True)):
            if last:
                self.cancel_all("stopping")
                for job in list(self._jobs):
                    job.stop()
            try:
                async with asyncio.timeout(each):
                    await self._idle.wait()
                break
            except TimeoutError:
                pass
        with self._wake:
            self._stop = True
            self._wake.notify()
        if self.alive:
            await asyncio.to_thread(self._thread.join, END_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _has_work(self) -> bool:
        return bool(self.engine.waiting or self.engine.active)

    def _run(self) -> None:
        """The engine's thread."""
        errors = 0
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stop or self._has_work())
                    if errors:  # one after the other: do not burn the processor
                        self._wake.wait_for(lambda: self._stop, min(0.05 * 2 ** min(errors, 10), LONGEST_PAUSE))
                    if self._stop:
                        return
                self._failed.clear()
                try:
                    events = self.engine.step()
                    errors = 0
                except Exception:
                    errors += 1
                    logger.exception("engine step failed", extra={"requests": sorted(set(self._failed))})
                else:
                    if not (events or self.engine.active) and self.engine.waiting:  # what is first in the queue must wait
                        threading.Event().wait(STUCK_SECONDS)
        except BaseException:
            logger.critical("the engine's thread ends", exc_info=True)
            raise
        finally:
            if not self._stop and self._events is not None and not self._events.is_closed():
                self._events.call_soon_threadsafe(self.cancel_all, "stopping")
