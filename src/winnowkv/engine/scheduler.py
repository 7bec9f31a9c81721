"""The scheduler: which requests wait, whose prompt is read next, which requests decode, and when their rows are freed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.looking import fork_looking
from winnowkv.engine.admission import Admission
from winnowkv.engine.drafts import Drafts
from winnowkv.engine.job import Job
from winnowkv.engine.looking import Looker
from winnowkv.engine.request import Ahead, Event, Reason, Request, Row
from winnowkv.engine.sampling import Logprob
from winnowkv.engine.slot_row import SlotRow
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import drop_ended
from winnowkv.errors import InputError


class Scheduler:
    """The requests of an engine, from the queue to their last token. First come, first served.

    A request whose policy looks has *lookers* in place of a row, one for each choice, until what stays was chosen
    (:mod:`winnowkv.engine.looking`). What they hold, and what they will need when they have their rows, counts for everybody
    who wants to be read or placed meanwhile.

    A prompt may be read if there is a row for each of its choices and if its claim fits beside what is held, both while it
    is read and afterwards with all its new tokens. One prompt is read at a time; then it gets its rows and decodes.

    Locking. Two things are shared by threads, and each is protected in its own way:

    - The *requests* (queue, rows, prompt, and whether a choice has ended) are changed only with ``_lock`` held, and only for
      moments, never during a forward pass: so :meth:`add` and :meth:`cancel` do not wait for the model.
    - The *model and the slots* belong to the thread that is inside :meth:`turn`, one at a time. It runs the model without
      the lock. A request that is cancelled meanwhile has ended at once, but its row is freed when the turn ends; if no
      thread has the turn, :meth:`cancel` frees the row itself, with the lock held so that no turn can begin.

    Methods that say "in a turn" may be called only by the thread that has it.

    Parameters
    ----------
    slots: rows that decode together. drafts: of lookers. admission: decides by bytes. max_rows: most rows that decode together.

    Attributes
    ----------
    broken: whether the slots failed and were emptied: they hold nothing, and new ones have to take their place.
    """

    def __init__(self, slots: Slots, drafts: Drafts, admission: Admission, max_rows: int) -> None:
        self.slots, self.drafts, self.admission, self.max_rows = slots, drafts, admission, max_rows
        self._lock = threading.Condition()
        self._in_turn = False
        self._waiting: deque[Request | Job[Any]] = deque()
        self.broken = False
        self._rows: list[Row] = []  # in the order of the slots' rows
        self._lookers: list[Looker] = []  # first come, first
        self._prompt: tuple[Request, CompactCache] | None = None  # being read, or read and waiting for its row
        self._job: Job[Any] | None = None  # being done

    @property
    def waiting(self) -> int:
        """Requests and jobs in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests whose prompt is being read or that decode."""
        with self._lock:
            rows = [*self._rows, *(looker.row for looker in self._lookers)]
            return len({id(row.request) for row in rows}) + (self._prompt is not None) + (self._job is not None)

    @property
    def held_bytes(self) -> int:
        """Storage of keys and values now."""
        caches = [looker.cache for looker in list(self._lookers)]
        return self.slots.held_bytes + self.drafts.held_bytes + sum(cache.held_bytes for cache in caches) + self._prompt_bytes

    @property
    def _prompt_bytes(self) -> int:
        prompt, job = self._prompt, self._job
        if job is not None:
            return job.peak  # what it holds is its own affair
        return 0 if prompt is None else prompt[1].held_bytes

    def add(self, request: Request | Job[Any]) -> None:
        """Put a request or a job at the end of the queue."""
        with self._lock:
            self._waiting.append(request)

    def cancel(self, request: Request, index: int | None = None) -> None:
        """End a request or one choice now, wherever it is; its row is free at once, or when the turn of a thread ends."""
        with self._lock:
            rows = [row for row in request.rows if index in (None, row.number)]
            if not rows:
                return
            end_with(None, rows)
            if request.completion is not None and request in self._waiting:
                self._waiting.remove(request)
                request.after = None
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

    def next_prompt(self) -> Request | Job[Any] | None:
        """Take what is first in the queue, if there is a row for it and it fits. In a turn."""
        with self._lock:
            self._free_ended()
            self._waiting = deque(one for one in self._waiting if not (isinstance(one, Job) and one.stopped))
            if self._prompt is not None or not self._waiting:
                return None
            return self._waiting.popleft() if self._fits(self._waiting[0]) else None

    def _fits(self, request: Request | Job[Any]) -> bool:
        if isinstance(request, Job):
            return self._can_read(request.peak, self._ahead())
        claim, rows = request.claim, len(request.rows)
        if len(self._rows) + len(self._lookers) + rows > self.max_rows:
            return False
        ahead = self._ahead()
        if claim.looking is not None:
            coming = [*ahead, *[claim.looking] * rows]
            if not self.admission.can_place((), self.slots, 0, coming):
                self.slots.trim()  # gives back the rows of requests that have ended
            return self.admission.can_place((), self.slots, 0, coming)
        if not self._can_read(claim.peak, ahead):
            return False
        return self.admission.can_place(claim.columns, self.slots, rows, ahead, observe=claim.observe)

    def _can_read(self, peak: int, ahead: list[Ahead]) -> bool:
        beside = self.admission.most_bytes(self.slots, ahead) - self.slots.held_bytes if ahead else 0
        if not self.admission.can_read(peak, self.slots.held_bytes + beside):
            self.slots.trim()
        return self.admission.can_read(peak, self.slots.held_bytes + beside)

    def _ahead(self, beside: Looker | None = None) -> list[Ahead]:
        """What lookers hold and will need, but for one of them."""
        return [looker.ahead for looker in self._lookers if looker is not beside]

    def begin(self, request: Request, cache: CompactCache) -> None:
        """Note that a request's prompt is now read into a cache. In a turn."""
        with self._lock:
            self._prompt = request, cache

    def work_on(self, job: Job[Any] | None) -> None:
        """Note that a job is now done, or that none is any more. In a turn."""
        with self._lock:
            self._job = job

    def look(self, request: Request, cache: CompactCache) -> None:
        """From now on each choice of the request whose prompt was read looks by itself. In a turn."""
        rows = request.rows
        caches = [cache, *(fork_looking(cache) for _ in rows[1:])]
        with self._lock:
            if self._prompt is None:  # cancelled meanwhile
                return
            self._prompt = None
            for row, each in zip(rows, caches, strict=False):
                if len(rows) > 1:
                    request.choices[row.number].report = each.report
                self._lookers.append(Looker(row, each))

    def lookers(self) -> list[Looker]:
        """The choices that look, first come, first. In a turn."""
        with self._lock:
            self._free_ended()
            return list(self._lookers)

    def may_draft(self, looker: Looker) -> bool:
        """Whether a looker's draft fits now. Raises InputError if it never may. In a turn."""
        try:
            return self.admission.can_draft(looker.draft_columns(), self.drafts, self._ahead(), self.held_bytes, self.slots)
        except InputError:
            if self._prompt is None and self._job is None:
                raise
            return False  # it may fit once what is read now has its row

    def place(self) -> list[Event]:
        """Give all that have chosen what stays their rows, and return the last events of those that can never have them.

        Layers that share a budget may turn out to need more than was claimed: a prompt or a looker then waits until other
        requests have ended. In a turn.
        """
        with self._lock:
            self._free_ended()
        self.place_lookers(self._prompt_bytes)
        return self._fail_stuck() + self._place_prompt()

    def place_lookers(self, beside_bytes: int) -> None:
        """Give those that have chosen what stays their rows, as far as they fit beside so many more bytes. In a turn."""
        for looker in [one for one in self._lookers if one.settled]:
            ahead, beside = looker.ahead, self._ahead(looker)
            if self.admission.can_place(ahead.columns, self.slots, 1, beside, beside_bytes, ahead.observe):
                self.slots.place(looker.cache, looker.room)
                with self._lock:
                    self._lookers.remove(looker)
                    self._rows.append(looker.row)

    def _fail_stuck(self) -> list[Event]:
        stuck = not self._rows and self._lookers and all(looker.settled for looker in self._lookers)
        if not stuck:
            return []
        looker = self._lookers[0]
        request = looker.row.request
        least = self.slots.bytes_alone(looker.ahead.columns, 0, observe=looker.ahead.observe)
        return self.fail_looker(looker, self.admission.too_small(least, len(request.prompt), request.sampling))

    def _place_prompt(self) -> list[Event]:
        with self._lock:
            self._free_ended()  # another thread may have ended it just now
            if self._prompt is None:
                return []
            (request, cache), rows = self._prompt, self._prompt[0].rows
        room = request.sampling.max_new_tokens - 1
        needed = SlotRow.of(cache, room)
        if not self.admission.can_place(needed.columns, self.slots, len(rows), self._ahead(), observe=needed.observe):
            if self._rows or self._lookers:
                return []
            least = max(request.claim.peak, self.slots.bytes_alone(needed.columns, 0, len(rows), needed.observe))
            return self.fail_prompt(request, self.admission.too_small(least, len(request.prompt), request.sampling))
        self.slots.place(cache, room, len(rows))
        with self._lock:
            self._rows += rows
            self._prompt = None
        return []

    def rows(self) -> list[Row]:
        """The choices that decode, in the order of the slots' rows. In a turn."""
        with self._lock:
            self._free_ended()
            return list(self._rows)

    def postprocess(self, rows: Sequence[Row], chosen: Sequence[tuple[int, Logprob | None] | None]) -> list[Event]:
        """Continue choices with the tokens chosen for them; those that have ended meanwhile take none. In a turn."""
        with self._lock:
            events = [row.request.take(row.number, token) for row, token in zip(rows, chosen, strict=True) if not row.ended]
            self._free_ended()
            return events

    def fail_prompt(self, request: Request, error: BaseException) -> list[Event]:
        """End the request whose prompt is read. In a turn."""
        with self._lock:
            self._prompt = None
            return end_with(error, request.rows)

    def fail_looker(self, looker: Looker, error: BaseException) -> list[Event]:
        """End a choice that looks, and free what it holds. In a turn."""
        with self._lock:
            events = end_with(error, [looker.row])
            self._free_ended()
            return events

    def fail_rows(self, error: BaseException, *, reading: bool = False) -> None:
        """End everything that decodes or waits for its row, and free its bytes; not a prompt that is being read. In a turn."""
        with self._lock:
            failed, self._rows, self.broken = self._rows, [], True
            failed += [looker.row for looker in self._lookers if looker.settled]
            self._lookers = [looker for looker in self._lookers if not looker.settled]
            if self._prompt is not None and not reading:
                failed, self._prompt = [*failed, *self._prompt[0].rows], None
            end_with(error, failed)
            self.slots.clear()

    def replace(self, slots: Slots) -> None:
        """Go on with new slots in place of broken ones. In a turn."""
        with self._lock:
            self.slots, self.broken = slots, False

    def _free_ended(self) -> None:
        """Free what requests that have ended hold. Called with the lock."""
        drop_ended(self.slots, self._rows, lambda row: row.ended)
        gone = [looker for looker in self._lookers if looker.row.ended]
        if gone:
            self._lookers = [looker for looker in self._lookers if not looker.row.ended]
            self.drafts.drop(lambda draft: any(draft is looker.draft for looker in gone))
        if self._prompt is not None and self._prompt[0].completion is not None:
            self._prompt = None


def end_with(error: BaseException | None, rows: Sequence[Row]) -> list[Event]:
    """End the choices that go on: with the error, or as cancelled if it is Ctrl-C, another exit, or None."""
    reason: Reason = "error" if isinstance(error, Exception) else "cancelled"
    return [row.request.end(row.number, reason, error) for row in rows if not row.ended]
