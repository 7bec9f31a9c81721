"""A replica of ``winnow serve --ray``: the whole application of :mod:`winnowkv.serve.app` in an actor of Ray Serve.

No socket listens here: requests come and answers go through Ray, so that Ray Serve knows how many are in each replica.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnowkv.serve.allocator import give_large_blocks_back
from winnowkv.serve.context_prompts import ContextPrompts
from winnowkv.serve.serving import Serving
from winnowkv.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

Build = Callable[[ServeSettings, Callable[[Serving], None]], "FastAPI"]
Headers = tuple[tuple[bytes, bytes], ...]
MOST_REPORTED = 4096  # contexts that a replica says it has in memory


@dataclass(frozen=True)
class Call:
    """A request as the front hands it on: what ASGI's scope says of it, and its whole body."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers
    body: bytes
    client: tuple[str, int] | None


@dataclass(frozen=True)
class Taken:
    """First item of an answer: the replica that works on it."""

    replica: str


@dataclass(frozen=True)
class Started:
    """Second item of an answer; parts of its body follow, as bytes. ``route``: for logs and metrics, None for none."""

    status: int
    headers: Headers
    route: str | None


class Replica:
    """The class that Ray Serve deploys.

    Parameters
    ----------
    build: makes the application, whose lifespan loads the model and tells the callback when it is loaded or has failed.
    settings: of the server. folder: the working folder of the command. threads: of torch, None for its own choice.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it, on the event loop on which answers are made
        self, build: Build, settings: ServeSettings, folder: str, threads: int | None
    ) -> None:
        import torch
        from ray import serve

        if Path(folder).is_dir():
            os.chdir(folder)  # so that relative paths of models, profiles and the store are those of the command
        if threads is not None:
            torch.set_num_threads(threads)
        give_large_blocks_back()
        self.name: str = serve.get_replica_context().replica_id.unique_id
        self._running: set[asyncio.Task[None]] = set()
        loaded: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
        # The front answers browsers' questions about CORS.
        self._app = build(replace(settings, cors=(), insecure=True), loaded.set_result)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        self.serving = await loaded
        if self.serving.failure is not None:
            raise self.serving.failure

    async def answer(self, call: Call) -> AsyncIterator[Taken | Started | bytes]:
        """Answer a request: :class:`Taken`, :class:`Started`, then the body in parts."""
        yield Taken(self.name)
        gone = asyncio.Event()
        parts: asyncio.Queue[Any] = asyncio.Queue()
        task = asyncio.create_task(self._serve(call, gone, parts))
        self._running.add(task)  # else nothing holds it when the front has left
        task.add_done_callback(self._running.discard)
        try:
            while (part := await parts.get()) is not None:
                while isinstance(part, bytes) and not parts.empty():  # what came meanwhile goes along
                    more = parts.get_nowait()
                    if more is None:
                        parts.put_nowait(None)
                        break
                    part += more
                yield part
        finally:
            gone.set()

    async def _serve(self, call: Call, gone: asyncio.Event, parts: asyncio.Queue[Any]) -> None:
        """Run the application on a request; what it sends is put into ``parts``, and None at the end."""
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await gone.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": call.body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
                parts.put_nowait(Started(message["status"], headers, getattr(scope.get("route"), "path", None)))
            elif message.get("body"):
                parts.put_nowait(bytes(message["body"]))

        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "scheme": "http",
            "method": call.method, "path": call.path, "raw_path": call.raw_path, "query_string": call.query, "root_path": "",
            "headers": list(call.headers), "client": call.client, "server": None, "state": {},
        }  # fmt: skip
        try:
            await self._app(scope, receive, send)
        finally:
            parts.put_nowait(None)

    async def page(self) -> tuple[str, bytes]:
        """The replica's name, and its metrics in Prometheus' text format."""
        return self.name, await asyncio.to_thread(self.serving.metrics.page)

    def record_routing_stats(self) -> dict[str, Any]:
        """For :class:`winnowkv.scale.routing.ContextRouter`: the contexts that are in memory here."""
        contexts = self.serving.prompts.contexts.in_memory if isinstance(self.serving.prompts, ContextPrompts) else []
        return {"contexts": contexts[-MOST_REPORTED:]}

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that fails three times. Raises RuntimeError."""
        if self.serving.state == "failed":
            raise RuntimeError("the engine's thread has ended")

    async def __del__(self) -> None:
        """Called by Ray Serve once no request runs any more, or the time for that is over."""
        await self._lifespan.__aexit__(None, None, None)
