"""What listens in ``winnow serve --ray``: reads a request whole, hands it to a replica, and the answer back part by part."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from winnowkv.scale.replica import Call, Started, Taken
from winnowkv.serve.answers import DONE, sse
from winnowkv.serve.app import guard
from winnowkv.serve.errors import ApiError, ClientGoneError
from winnowkv.serve.loop import MOST_RETRY, STOPPING
from winnowkv.serve.metrics import CONTENT_TYPE, Metrics
from winnowkv.serve.settings import ServeSettings

logger = logging.getLogger("winnowkv.serve")
READY_SECONDS = 2.0  # in which some replica has to answer /ready
PAGE_SECONDS = 5.0  # in which replicas have to give their metrics
LOST_RETRY = 1  # seconds after which a request that a lost replica had may be sent again
CONTEXT_PATH = "/v1/contexts/"
REPLICA_HEADER = b"x-winnow-replica"


@dataclass
class Forwards:
    """Requests on their way, as :class:`winnowkv.serve.server.Server` stops them."""

    draining: bool = False
    running: set[asyncio.Task[Any]] = field(default_factory=set)
    responses: dict[asyncio.Task[Any], Any] = field(default_factory=dict)

    async def stop(self, seconds: float) -> None:
        """Take no new requests, let the running ones end for so many seconds, and cancel the rest."""
        self.draining = True
        if self.running:
            await asyncio.wait(set(self.running), timeout=seconds)
        self.cancel_all("stopping")

    def cancel_all(self, why: str) -> None:
        """Cancel every request."""
        for response in list(self.responses.values()):
            response.cancel()


@dataclass
class FrontServing:
    """What :class:`winnowkv.serve.server.Server` needs to know of an application."""

    settings: ServeSettings
    loop: Forwards = field(default_factory=Forwards)
    metrics: Metrics = field(default_factory=Metrics)
    loaded: bool = True
    failure: BaseException | None = None


def make_front(settings: ServeSettings, replicas: Any) -> Starlette:
    """The application, for :class:`winnowkv.serve.server.Server`.

    Parameters
    ----------
    settings: of the server; keys, CORS and limits of bodies are seen to here.
    replicas: Ray Serve's handle of the deployment of :class:`winnowkv.scale.replica.Replica`.
    """
    serving = FrontServing(settings)
    forward = Forward(serving, replicas)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        try:
            pages = await replicas.broadcast("page").results_async(timeout_s=PAGE_SECONDS, return_exceptions=True)
        except TimeoutError:
            pages = []
        own = ("front", await asyncio.to_thread(serving.metrics.page))
        return Response(merged([own, *(page for page in pages if isinstance(page, tuple))]), media_type=CONTENT_TYPE)

    app = Starlette(
        routes=[Route("/health", health), Route("/metrics", metrics), Route("/{path:path}", forward, methods=None)]
    )  # fmt: skip
    app.state.serving = serving
    guard(app, settings, serving.metrics)
    return app


class Forward:
    """ASGI: a request to a replica, its answer to the client."""

    def __init__(self, serving: FrontServing, replicas: Any) -> None:
        self.serving = serving
        self._replicas = replicas.options(method_name="answer", stream=True)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request. Raises ApiError as long as nothing of the answer was sent."""
        settings, forwards = self.serving.settings, self.serving.loop
        if forwards.draining:
            raise ApiError(503, STOPPING, code="stopping", retry_after=MOST_RETRY)
        task = asyncio.current_task()
        assert task is not None
        body = (await receive()).get("body", b"")  # whole: BodyLimit has read it
        context = context_of(scope["path"], body)
        response = self._replicas.options(session_id=context or "").remote(call_of(scope, body))
        forwards.running.add(task)
        forwards.responses[task] = response
        gone = asyncio.create_task(watch(receive, response))
        scope["route"] = None  # not the front's own, which stands for all
        answer = Answering(scope, response, settings, forwards, gone)
        try:
            await answer.run(send, READY_SECONDS if scope["path"] == "/ready" else settings.queue_deadline)
        finally:
            gone.cancel()
            forwards.running.discard(task)
            del forwards.responses[task]
            if not answer.complete:
                response.cancel()


class Answering:
    """One answer on its way from a replica to a client."""

    def __init__(
        self, scope: Any, response: Any, settings: ServeSettings, forwards: Forwards, gone: asyncio.Task[None]
    ) -> None:
        self._scope, self._state, self._response = scope, scope["state"], response
        self._settings, self._forwards, self._gone = settings, forwards, gone
        self.complete = False

    async def run(self, send: Any, seconds: float) -> None:
        """Send the answer; a replica must have taken the request within ``seconds``."""
        with self._errors():
            taken = await self._taken(seconds)
            started, first = await self._start()
        self._state["log"] = {"replica": taken.replica}
        self._scope["route"] = SimpleNamespace(path=started.route)
        headers = [(name, value) for name, value in started.headers if name != b"x-request-id"]
        headers.append((REPLICA_HEADER, taken.replica.encode()))
        stream = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
        await send({"type": "http.response.start", "status": started.status, "headers": headers})
        try:
            await self._write(send, first, more=True)
            with self._errors():
                async for part in self._response:
                    await self._write(send, part, more=True)
        except ApiError as error:
            self._state["log"]["error_code"] = error.code
            if not stream:
                raise ClientGoneError from error  # half of an answer is out: all that is left is to close the connection
            await self._write(send, sse(error.body(self._state["request_id"])) + DONE, more=False)
            return
        self.complete = True
        await self._write(send, b"", more=False)

    async def _taken(self, seconds: float) -> Taken:
        try:
            async with asyncio.timeout(seconds):
                taken = await anext(self._response)
        except TimeoutError:
            raise ApiError(
                503, f"no replica took the request within {seconds:g} s: try again", code="no_replica",
                retry_after=MOST_RETRY / 6,
            ) from None  # fmt: skip
        assert isinstance(taken, Taken)
        return taken

    async def _start(self) -> tuple[Started, bytes]:
        """Status and headers, and the first part of the body: an answer that is not streamed has no other."""
        started = await anext(self._response)
        assert isinstance(started, Started)
        return started, await anext(self._response, b"")

    async def _write(self, send: Any, data: bytes, more: bool) -> None:
        try:
            async with asyncio.timeout(self._settings.write_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientGoneError from None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What happens to a request in a replica, as an error that says whether it may be sent again."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            yield
        except (ApiError, ClientGoneError):
            raise
        except (RayError, RayServeException, StopAsyncIteration) as error:
            if self._gone.done():
                raise ClientGoneError from None
            if self._forwards.draining:
                raise ApiError(503, STOPPING, code="stopping", retry_after=MOST_RETRY) from None
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            logger.warning("replica lost", extra={"request_id": self._state["request_id"], "why": why})
            raise ApiError(
                503, "the replica that answered was lost: send the request again", code="replica_lost", retry_after=LOST_RETRY
            ) from None  # fmt: skip


async def watch(receive: Any, response: Any) -> None:
    """Cancel a request as soon as its client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    response.cancel()


def call_of(scope: Any, body: bytes) -> Call:
    """A request of ASGI, as a replica gets it: under the id that the front has given it."""
    headers = [(name, value) for name, value in scope["headers"] if name not in (b"x-request-id", b"transfer-encoding")]
    headers.append((b"x-request-id", scope["state"]["request_id"].encode()))
    raw = scope.get("raw_path") or scope["path"].encode()
    client = tuple(scope["client"]) if scope.get("client") else None
    return Call(scope["method"], scope["path"], raw, scope["query_string"], tuple(headers), body, client)


def context_of(path: str, body: bytes) -> str | None:
    """The id of the context that a request names, in its path, as ``winnow_context`` or as ``winnow.context``."""
    if path.startswith(CONTEXT_PATH):
        return path.removeprefix(CONTEXT_PATH).split("/")[0] or None
    if b'context"' not in body:
        return None
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    inner = asked.get("winnow")
    named = asked.get("winnow_context") or (inner.get("context") if isinstance(inner, dict) else None)
    return named if isinstance(named, str) else None


def merged(pages: list[tuple[str, bytes]]) -> bytes:
    """Pages of Prometheus' text format as one, each sample with the name of its replica as a label."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    for replica, page in pages:
        for family in text_string_to_metric_families(page.decode()):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            lines = found.setdefault(name, (family.type, family.documentation, []))[2]
            for sample in family.samples:
                labels = ",".join(f"{key}={json.dumps(value)}" for key, value in {**sample.labels, "replica": replica}.items())
                lines.append(f"{sample.name}{{{labels}}} {sample.value}")
    texts = (
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n" + "\n".join(lines) + "\n" for name, (kind, text, lines) in found.items()
    )  # fmt: skip
    return "".join(texts).encode()
