"""The server over a tiny model: in this process, or behind uvicorn on a port of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from support.models import built
from support.tokenizers import word_tokenizer
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Event
from winnowkv.serve.app import make_app
from winnowkv.serve.server import Server, listen
from winnowkv.serve.settings import ServeSettings

MODEL = "tiny"
TEMPLATE = "{% for message in messages %}w1 {{ message.content }} {% endfor %}w2"  # w1 before a message, w2 before the answer


def words(count: int, first: int = 3) -> str:
    """A text of so many tokens."""
    return " ".join(f"w{(first + 7 * at) % 120}" for at in range(count))


def tiny_engine(**options: Any) -> Engine:
    """An engine of the tiny model, with a chat template."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Engine(built("llama"), tokenizer, **{"policy": "snapkv:observe=8:kernel=3", "budget": 20, **options})


def tiny_app(engine: Engine | None = None, **settings: Any) -> FastAPI:
    """The application over an engine."""
    engine = engine or tiny_engine()
    return make_app(
        engine, ServeSettings(**{"model": MODEL, "policy": engine.policy, "budget": 20, "keep_whole": 0, **settings})
    )


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat request, greedy unless it says otherwise."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 6, **fields}


@asynccontextmanager
async def asking(app: FastAPI, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, started and stopped."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t", **options) as client,
    ):
        yield client


def with_client(app: FastAPI, ask: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    """What a coroutine returns that is given a client of the application; then nothing of a request may be left."""

    async def run() -> Any:
        async with asking(app, **options) as client:
            return await ask(client)

    found = asyncio.run(run())
    check_nothing_left(app)
    return found


def ask(app: FastAPI, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    """The answer to one request."""

    async def post(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, **({"content": body} if isinstance(body, bytes) else {"json": body}), **options)

    return with_client(app, post)


def check_nothing_left(app: FastAPI) -> None:
    """No row, no byte and no request is left in a server's engine."""
    engine = app.state.serving.engine
    assert (engine.active, engine.waiting, engine.held_bytes) == (0, 0, 0)
    assert not app.state.serving.loop._tickets


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with its terminator."""
    events = text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


class Gate:
    """Holds an engine's steps back until it is opened, or lets so many pass."""

    def __init__(self, engine: Engine, passing: int = 0) -> None:
        self._step, self._free = engine.step, threading.Semaphore(passing)
        self._open = threading.Event()
        engine.step = self._held  # type: ignore[method-assign]

    def _held(self) -> list[Event]:
        while not self._open.is_set() and not self._free.acquire(timeout=0.01):
            pass
        return self._step()

    def open(self) -> None:
        """Let every step pass from now on."""
        self._open.set()


class Running:
    """A server behind uvicorn. ``url``: without a path. ``app``, ``engine``, ``server``: of it."""

    def __init__(self, app: FastAPI) -> None:
        self.app, self.server = app, Server(app)
        self.engine: Engine = app.state.serving.engine if app.state.serving.loaded else None
        self.bound = listen(ServeSettings(port=0))
        self.port = self.bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextmanager
def running(app: FastAPI) -> Iterator[Running]:
    """Serve an application on a free port; then nothing of a request may be left."""
    one = Running(app)
    thread = threading.Thread(target=one.server.run, kwargs={"sockets": [one.bound]}, daemon=True)
    thread.start()
    wait_until(lambda: one.server.started)
    one.engine = app.state.serving.engine
    try:
        yield one
    finally:
        if one.server._events is not None and thread.is_alive():
            one.server._events.call_soon_threadsafe(one.server.begin_stop)
        thread.join(20)
    assert not thread.is_alive()
    check_nothing_left(app)


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Until something is true, which it must be within so many seconds."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if true():
            return
        pause.wait(0.005)
    raise AssertionError("it did not become true")
