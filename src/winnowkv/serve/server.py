"""uvicorn with what it lacks: a time limit for the head of a request, and a stop that lets running requests end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from winnowkv.errors import InputError
from winnowkv.serve.serving import Serving
from winnowkv.serve.settings import ServeSettings

LONGEST_HEAD = 32 * 2**10  # bytes of a request line with its headers
KEEP_ALIVE = 30  # seconds that a connection may be idle between two requests
LAST_WRITES = 5  # seconds that answers have to be sent once every request has ended


class HeadTimeout(H11Protocol):
    """A connection that is closed if the head of a request is not there ``seconds`` after its first byte, or none comes."""

    seconds = 30.0
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._forget_head()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being served
            self._forget_head()
        elif self._head is None:
            self._head = asyncio.get_running_loop().call_later(self.seconds, self._too_slow)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        self._head = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Serves an application of :func:`winnowkv.serve.app.make_app`.

    The first SIGTERM or Ctrl-C begins to drain: new requests are answered with 503, running ones have ``settings.drain``
    seconds; then the server ends. A second one ends the running requests at once, a third everything.
    """

    def __init__(self, app: Starlette) -> None:
        self.serving: Serving = app.state.serving
        settings = self.serving.settings
        protocol = type("Protocol", (HeadTimeout,), {"seconds": settings.body_timeout})
        super().__init__(
            uvicorn.Config(
                app, http=protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
                proxy_headers=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=LAST_WRITES,
                h11_max_incomplete_event_size=LONGEST_HEAD,
            )
        )  # fmt: skip
        self._signals = 0
        self._events: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._events = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        self._signals += 1
        if self._events is None or self._signals > 2:
            self.should_exit = True
            self.force_exit = self._signals > 2 and sig == signal.SIGINT
            return
        self._events.call_soon_threadsafe(self.begin_stop if self._signals == 1 else self.hasten)

    def begin_stop(self) -> None:
        """Let the running requests end, then stop. On the event loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    def hasten(self) -> None:
        """End the running requests now. On the event loop."""
        if self.serving.loaded:
            self.serving.loop.cancel_all("stopping")

    async def _drain(self) -> None:
        if self.serving.loaded:
            await self.serving.loop.stop(self.serving.settings.drain)
        self.should_exit = True


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that is bound to the host and port, and not listened on yet.

    Raises InputError for a port that is taken or not allowed, and for a host that is not this machine's.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind)
    except OSError as error:
        raise InputError(f"--host {host} cannot be listened on: {error.strerror}") from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            way_out = "give another with --port, or 0 for any that is free"
            raise InputError(f"port {port} of {host} is in use: {way_out}") from None
        raise InputError(f"port {port} of {host} cannot be listened on: {error.strerror}") from None
    return found


def address_of(bound: socket.socket, settings: ServeSettings) -> str:
    """Where a server on the socket is reached from this machine: ``http://127.0.0.1:8000``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
