"""Replicas of the tiny server: as Ray Serve deploys them, and in this process behind what looks like Ray Serve's handle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI

from support.models import built
from support.tokenizers import ChatLetters
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Event
from winnowkv.scale.replica import Call, Replica
from winnowkv.serve.app import make_app
from winnowkv.serve.serving import Serving
from winnowkv.serve.settings import ServeSettings

STEP_SECONDS = 0.005


def slow_engine() -> Engine:
    """An engine that steps slowly enough to be stopped in mid-stream, with a tokenizer that contexts can be made with."""
    engine = Engine(built("llama"), ChatLetters(), policy="snapkv:observe=4", budget=40)
    step = engine.step

    def slow() -> list[Event]:
        time.sleep(STEP_SECONDS)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    return engine


def build_slow(settings: ServeSettings, loaded: Callable[[Serving], None]) -> FastAPI:
    """The application of a replica."""
    return make_app(slow_engine, settings, loaded=loaded)


class LocalReplica(Replica):
    """A replica without Ray."""

    def __init__(self, app: FastAPI, name: str) -> None:
        self.name, self._app, self.serving = name, app, app.state.serving
        self._running = set()

    def __del__(self) -> None:  # type: ignore[override]
        """Nothing: the test ends the application."""


class LocalAnswer:
    """Stands for Ray Serve's generator of an answer; ``fail``: raised after so many of its items."""

    def __init__(self, items: AsyncIterator[Any], fail: tuple[int, Exception] | None) -> None:
        self._items, self._fail, self._given = items, fail, 0
        self._cancelled = asyncio.Event()
        self.cancelled = False

    def __aiter__(self) -> LocalAnswer:
        return self

    async def __anext__(self) -> Any:
        from ray.serve.exceptions import RequestCancelledError

        if self._fail is not None and self._given == self._fail[0]:
            raise self._fail[1]
        self._given += 1
        item, stop = asyncio.ensure_future(anext(self._items)), asyncio.ensure_future(self._cancelled.wait())
        await asyncio.wait({item, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if item.done():
            return item.result()
        item.cancel()
        await asyncio.wait({item})
        raise RequestCancelledError("r")

    def cancel(self) -> None:
        """As Ray does it: the replica's generator is cancelled."""
        self.cancelled = True
        self._cancelled.set()


class LocalHandle:
    """Stands for Ray Serve's handle: all requests go to one replica.

    ``sessions``: the ``session_id`` of each request. ``answers``: all of them. ``fail``: see :class:`LocalAnswer`.
    """

    def __init__(self, replica: Replica, fail: tuple[int, Exception] | None = None) -> None:
        self._replica, self._fail = replica, fail
        self.sessions: list[str] = []
        self.answers: list[LocalAnswer] = []

    def options(self, session_id: str | None = None, **_: Any) -> LocalHandle:
        """The handle itself."""
        if session_id is not None:
            self.sessions.append(session_id)
        return self

    def remote(self, call: Call) -> LocalAnswer:
        """A request."""
        self.answers.append(LocalAnswer(self._replica.answer(call), self._fail))
        return self.answers[-1]

    def broadcast(self, method: str) -> LocalHandle:
        """A call of all replicas."""
        self._method = method
        return self

    async def results_async(self, **_: Any) -> list[Any]:
        """Its results."""
        return [await getattr(self._replica, self._method)()]
