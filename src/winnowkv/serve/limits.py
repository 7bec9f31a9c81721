"""Limits on what a client may send, and how slowly, and what is seen of each request: plain ASGI, below FastAPI."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from winnowkv.serve.errors import ApiError, ClientGoneError, send_error
from winnowkv.serve.logs import request_id
from winnowkv.serve.metrics import Metrics

logger = logging.getLogger("winnowkv.serve")
DISCARDED = 32 * 2**20  # bytes of a body that is too large are read up to here, so that the client reads the answer
BODIES_AT_ONCE = 32
GONE = 499  # status in logs and metrics of a request whose client left; nginx's number
QUIET = ("/health", "/ready", "/metrics")  # their requests are logged only if they fail


class Observed:
    """The outermost layer: gives each request an id, answers errors that no route caught, counts and logs."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), dict(scope["headers"])
        state = scope.setdefault("state", {})
        state["request_id"] = name = request_id(headers.get(b"x-request-id"))
        status = 0

        async def send_named(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except ClientGoneError:
            status = GONE
        except Exception:
            logger.exception("request failed", extra={"request_id": name})
            if not status:
                why = "the server failed on this request: its log says why under the request's id"
                await send_error(send_named, ApiError(500, why, code="internal_error"), name)
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            self.metrics.requests.labels(route, str(status)).inc()
            if route not in QUIET or status >= 400:
                more = {
                    "request_id": name, "method": scope["method"], "route": route, "status": status,
                    "seconds": round(time.perf_counter() - began, 4), "owner": state.get("owner") or None,
                    **state.get("log", {}),
                }  # fmt: skip
                logger.info("request", extra=more)


class BusyError(Exception):
    """There is no room for one more body."""


class Held:
    """Bytes of one request's body."""

    def __init__(self, limit: BodyLimit) -> None:
        self.limit, self.bytes = limit, 0

    def add(self, size: int) -> None:
        """Count so many more bytes. Raises BusyError if all bodies together have too many."""
        if size > 0 and self.limit.held + size > BODIES_AT_ONCE * self.limit.most:
            raise BusyError
        self.bytes += size
        self.limit.held += size


class BodyLimit:
    """Reads a body before anybody else does: at most so many bytes, in at most so many seconds.

    All bodies of requests that are being served have at most :data:`BODIES_AT_ONCE` times as many bytes together.
    """

    def __init__(self, app: Any, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds
        self.held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        mine = Held(self)
        try:
            await self._serve(scope, receive, send, mine)
        finally:
            self.held -= mine.bytes

    async def _serve(self, scope: Any, receive: Any, send: Any, mine: Held) -> None:
        name = scope["state"]["request_id"]
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(receive, mine)
        except BusyError:
            why = f"the bodies of all requests have more than {BODIES_AT_ONCE * self.most} bytes together: try again later"
            await send_error(send, ApiError(429, why, code="bodies_full", retry_after=1), name, close=True)
            return
        except TimeoutError:
            slow = ApiError(408, f"the body was not there after {self.seconds:g} s: send it faster", code="body_timeout")
            await send_error(send, slow, name, close=True)
            return
        if body is None:
            large = ApiError(
                413, f"the body is larger than the limit of {self.most} bytes: send less, or start the server with --max-body",
                code="body_too_large",
            )  # fmt: skip
            await send_error(send, large, name, close=True)
            return
        given = False

        async def again() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    async def _read(self, receive: Any, mine: Held) -> bytes | None:
        """The body; None if it is too large. Raises BusyError if there is no room for it now."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size += len(part)
            if size <= self.most:
                mine.add(len(part))
                parts.append(part)
            else:
                mine.add(-mine.bytes)
                parts.clear()
            if not message.get("more_body") or size > self.most + DISCARDED:
                return b"".join(parts) if size <= self.most else None
