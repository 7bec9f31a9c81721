"""Work on the model that waits in an engine's queue as a prompt does, such as reading a document."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from winnowkv.engine.request import free_frames
from winnowkv.errors import WinnowError
from winnowkv.types import Between

T = TypeVar("T")


class StoppedError(WinnowError):
    """What was being read is not wanted any more."""


class Job(Generic[T]):
    """One piece of work.

    Parameters
    ----------
    work: does it. It is given a function that it has the caches call between their layers
        (``CompactCache(between=)``): requests decode meanwhile.
    peak: most bytes of keys and values that it holds until it is done; what it returns is its caller's to count.

    Attributes
    ----------
    future: of what ``work`` returns or raises. stopped: whether it is not wanted any more.
    """

    def __init__(self, work: Callable[[Between], T], peak: int) -> None:
        self._work: Callable[[Between], T] | None = work
        self.peak, self.stopped = peak, False
        self.future: Future[T] = Future()

    def stop(self) -> None:
        """Cancel it: at once if it waits, between two layers if it is being done."""
        self.stopped = True
        self.future.cancel()

    def run(self, between: Between) -> None:
        """Do it; its result or its error is the future's. Raises what is no error of this work, such as Ctrl-C."""
        work, self._work = self._work, None
        if work is None or not self.future.set_running_or_notify_cancel():
            return
        try:
            result = work(between)
        except BaseException as error:
            free_frames(error)
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(result)
