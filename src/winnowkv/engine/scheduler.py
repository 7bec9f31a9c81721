"""The scheduler: which requests wait, whose prompt is read next, which requests decode, and when their rows are freed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from winnowkv.cache.cache import CompactCache
from winnowkv.engine.admission import Admission
from winnowkv.engine.request import Claim, Event, Reason, Request
from winnowkv.engine.sampling import Logprob
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import drop_ended


class Scheduler:
    """The requests of an engine, from the queue to their last token. First come, first served.

    A prompt may be read if there is a row for it and if its claim fits beside what is held, both while it is read and
    afterwards with all its new tokens. One prompt is read at a time; then it gets its row and decodes with the others.

    Locking. Two things are shared by threads, and each is protected in its own way:

    - The *requests* (queue, rows, prompt, and whether a request has ended) are changed only with ``_lock`` held, and only for
      moments, never during a forward pass: so :meth:`add` and :meth:`cancel` do not wait for the model.
    - The *model and the slots* belong to the thread that is inside :meth:`turn`, one at a time. It runs the model without
      the lock. A request that is cancelled meanwhile has ended at once, but its row is freed when the turn ends; if no
      thread has the turn, :meth:`cancel` frees the row itself, with the lock held so that no turn can begin.

    Methods that say "in a turn" may be called only by the thread that has it.

    Parameters
    ----------
    slots: rows that decode together. admission: decides by bytes. max_rows: most requests that decode together.
    """

    def __init__(self, slots: Slots, admission: Admission, max_rows: int) -> None:
        self.slots, self.admission, self.max_rows = slots, admission, max_rows
        self._lock = threading.Condition()
        self._in_turn = False
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []  # in the order of the slots' rows
        self._prompt: tuple[Request, CompactCache] | None = None  # being read, or read and waiting for its row

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests whose prompt is being read or that decode."""
        return len(self._rows) + (self._prompt is not None)

    @property
    def held_bytes(self) -> int:
        """Storage of keys and values now."""
        prompt = self._prompt
        return self.slots.held_bytes + (0 if prompt is None else prompt[1].held_bytes)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        with self._lock:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now, wherever it is; its row is free at once or, if a thread has the turn, when that ends."""
        with self._lock:
            if request.completion is not None:
                return
            if request in self._waiting:
                self._waiting.remove(request)
            request.end("cancelled")
            if not self._in_turn:
                self._free_ended()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The right to work with the model and the slots; requests that have ended by its end lose their rows."""
        with self._lock:
            self._lock.wait_for(lambda: not self._in_turn)
            self._in_turn = True
        try:
            yield
        finally:
            with self._lock:
                self._free_ended()
                self._in_turn = False
                self._lock.notify()

    def next_prompt(self) -> Request | None:
        """Take the first request from the queue, if there is a row for it and it fits. In a turn."""
        with self._lock:
            self._free_ended()
            if self._prompt is not None or len(self._rows) == self.max_rows or not self._waiting:
                return None
            return self._waiting.popleft() if self._fits(self._waiting[0].claim) else None

    def _fits(self, claim: Claim) -> bool:
        if not self.admission.can_read(claim, self.slots.held_bytes):
            self.slots.trim()  # gives back the rows of requests that have ended
        if not self.admission.can_read(claim, self.slots.held_bytes):
            return False
        return self.admission.can_place(claim.entries, claim.room, self.slots)

    def begin(self, request: Request, cache: CompactCache) -> None:
        """Note that a request's prompt is now read into a cache. In a turn."""
        with self._lock:
            self._prompt = request, cache

    def place(self) -> list[Event]:
        """Give the prompt that was read its row, and return its last event if it can never have one. In a turn.

        Layers that share a budget may turn out to need more than was claimed: the prompt then waits until other
        requests have ended.
        """
        if self._prompt is None:
            return []
        request, cache = self._prompt
        entries, room = [layer.length for layer in cache.compact_layers], request.claim.room
        if not self.admission.can_place(entries, room, self.slots):
            if self._rows:
                return []
            least = max(request.claim.peak, self.slots.bytes_alone(entries, room))
            return self.fail_prompt(request, self.admission.too_small(least, len(request.prompt), request.sampling))
        self.slots.place(cache, room)
        with self._lock:
            self._rows.append(request)
            self._prompt = None
        return []

    def rows(self) -> list[Request]:
        """The requests that decode, in the order of the slots' rows. In a turn."""
        with self._lock:
            self._free_ended()
            return list(self._rows)

    def postprocess(self, requests: Sequence[Request], chosen: Sequence[tuple[int, Logprob | None] | None]) -> list[Event]:
        """Continue requests with the tokens chosen for them; those that have ended meanwhile take none. In a turn."""
        with self._lock:
            events = [
                request.take(token) for request, token in zip(requests, chosen, strict=True) if request.completion is None
            ]
            self._free_ended()
            return events

    def fail_prompt(self, request: Request, error: BaseException) -> list[Event]:
        """End the request whose prompt is read. In a turn."""
        with self._lock:
            self._prompt = None
            return end_with(error, [request])

    def fail_rows(self, error: BaseException) -> list[Event]:
        """End every request that decodes. In a turn; the slots are no longer usable and have to be replaced."""
        with self._lock:
            failed, self._rows = self._rows, []
            return end_with(error, failed)

    def _free_ended(self) -> None:
        """Free what requests that have ended hold. Called with the lock."""
        drop_ended(self.slots, self._rows, lambda request: request.completion is not None)
        if self._prompt is not None and self._prompt[0].completion is not None:
            self._prompt = None


def end_with(error: BaseException, requests: Sequence[Request]) -> list[Event]:
    """End the requests that go on: with the error, or as cancelled if it is Ctrl-C or another exit."""
    reason: Reason = "error" if isinstance(error, Exception) else "cancelled"
    return [request.end(reason, error) for request in requests if request.completion is None]
