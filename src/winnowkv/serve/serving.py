"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from winnowkv.engine.engine import Engine
from winnowkv.serve.errors import ApiError
from winnowkv.serve.loop import MOST_RETRY, EngineLoop
from winnowkv.serve.metrics import Metrics
from winnowkv.serve.prompts import PromptReader
from winnowkv.serve.settings import ServeSettings

Part = TypeVar("Part")


@dataclass
class Serving:
    """One server, ``app.state.serving``; routers get it as an argument of the type :data:`ServingNow`.

    Attributes
    ----------
    settings, metrics: of the server.
    engine, loop, prompts: there once the model is loaded (:attr:`loaded`), and not before. ``prompts`` may be exchanged for
        a reader that knows stored contexts.
    state: "loading", "ready", "draining" or "failed". failure: what loading raised.
    created: when the server was made, in seconds since 1970.
    """

    settings: ServeSettings
    metrics: Metrics = field(default_factory=Metrics)
    failure: BaseException | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _engine: Engine | None = None
    _loop: EngineLoop | None = None
    _prompts: PromptReader | None = None

    @property
    def loaded(self) -> bool:
        """Whether engine, loop and prompts are there."""
        return self._loop is not None

    @property
    def state(self) -> str:
        """What ``/ready`` says."""
        if self.failure is not None or (self._loop is not None and not self._loop.alive and not self._loop.draining):
            return "failed"
        if self._loop is None:
            return "loading"
        return "draining" if self._loop.draining else "ready"

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._there(self._engine)

    @property
    def loop(self) -> EngineLoop:
        """The thread that steps it."""
        return self._there(self._loop)

    @property
    def prompts(self) -> PromptReader:
        """What reads the prompts of requests."""
        return self._there(self._prompts)

    def begin(self, engine: Engine, loop: EngineLoop, prompts: PromptReader) -> None:
        """The model is loaded."""
        self._engine, self._prompts, self._loop = engine, prompts, loop

    def _there(self, part: Part | None) -> Part:
        if part is None:
            raise ApiError(503, "the server is loading its model: try again", code="loading", retry_after=MOST_RETRY / 6)
        return part


def serving_of(request: Request) -> Serving:
    """The server of a request, loaded or not: its parts answer 503 until they are there."""
    serving: Serving = request.app.state.serving
    return serving


ServingNow = Annotated[Serving, Depends(serving_of)]
