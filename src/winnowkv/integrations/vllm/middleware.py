"""An ASGI middleware with which vLLM's server takes plain OpenAI requests on contexts.

``vllm serve MODEL --kv-transfer-config '{...}' --middleware winnowkv.integrations.vllm.middleware.ContextMiddleware``

- ``POST /v1/chat/completions`` and ``POST /v1/completions`` with ``"winnow_context": ID``: requests.py says what becomes of
  them. Whatever cannot be honoured is refused with status 400.
- ``GET /v1/winnow/contexts`` lists the store.
- All other requests pass as they came.

The environment variable ``WINNOW_STORE`` names the store; ``winnow vllm`` sets it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from winnowkv.contexts.context import CONTEXT_PARAM
from winnowkv.contexts.fit import Fields, model_fields
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import InputError, WinnowError
from winnowkv.integrations.vllm.own_server import App, Message, OwnServer, OwnTokenizer, Receive, Scope, Send
from winnowkv.integrations.vllm.requests import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    CONTEXTS_PATH,
    Contexts,
    RefusedError,
    Served,
    error_body,
    rewritten,
)

STORE_VARIABLE = "WINNOW_STORE"
THREADS = 16  # requests that are read at a time
# Where a context would be ignored without a word: other endpoints that generate, or render for those that do.
ELSEWHERE = (
    "/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/completions/render",
    "/inference/v1/generate", "/invocations",
)  # fmt: skip


class ContextMiddleware:
    """Stands before vLLM's application.

    Raises InputError if neither ``store`` nor ``WINNOW_STORE`` names a store.
    """

    def __init__(self, app: App, store: str | None = None) -> None:
        place = store or os.environ.get(STORE_VARIABLE)
        if not place:
            raise InputError(f"{STORE_VARIABLE} is not set: set it to the folder or URL of the contexts, as winnow vllm does")
        self.app, self.server, self.contexts = app, OwnServer(app), Contexts(ContextStore(place))
        # Our own, since these threads wait for work that others of the server's do.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="winnowkv")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if scope["method"] == "GET" and path == CONTEXTS_PATH:
                await self._list(scope, send)
                return
            if scope["method"] == "POST" and path in (CHAT_PATH, COMPLETIONS_PATH, *ELSEWHERE):
                await self._post(path, scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _list(self, scope: Scope, send: Send) -> None:
        models = await self.server.ask(scope, "GET", "/v1/models")
        if models.status != 200:  # such as a missing API key
            await answer(send, models.status, models.body, models.headers)
            return
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._threads, self.contexts.listed)
        except WinnowError as error:
            await answer_json(send, 400, error_body(error))
            return
        await answer_json(send, 200, {"object": "list", "data": rows})

    async def _post(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        messages = await whole_body(receive)
        data = b"".join(message.get("body", b"") for message in messages)
        body = named(data)
        if body is None:
            await self.app(scope, replay(messages, receive), send)
            return
        models = await self.server.ask(scope, "GET", "/v1/models")
        if models.status != 200:
            await answer(send, models.status, models.body, models.headers)
            return
        loop = asyncio.get_running_loop()
        served = served_by(scope, json.loads(models.body))
        tokenizer = partial(OwnTokenizer, self.server, scope, loop)
        try:
            if path in ELSEWHERE:
                raise RefusedError(CONTEXT_PARAM, f"{path} serves no contexts: ask at {CHAT_PATH} or {COMPLETIONS_PATH}")
            # In a thread: files are read, and the tokenizer is asked through this event loop.
            new = await loop.run_in_executor(self._threads, rewritten, path, body, self.contexts, tokenizer, served)
        except WinnowError as error:
            await answer_json(send, getattr(error, "status", 400), error_body(error))
            return
        data = json.dumps(new).encode()
        headers = [pair for pair in scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(data)).encode())]}
        await self.app(scope, replay([{"type": "http.request", "body": data, "more_body": False}], receive), send)


def named(data: bytes) -> dict[str, Any] | None:
    """The body of a request that names a context, None for all others, JSON or not."""
    if f'"{CONTEXT_PARAM}"'.encode() not in data:
        return None
    try:
        body = json.loads(data)
    except ValueError:
        return None  # vLLM says what is wrong
    return body if isinstance(body, dict) and body.get(CONTEXT_PARAM) is not None else None


def served_by(scope: Scope, models: Mapping[str, Any]) -> Served:
    """What ``/v1/models`` and, if it is where it was, the server's configuration say."""
    cards: Sequence[Mapping[str, Any]] = models["data"]
    base = [card for card in cards if not card.get("parent")]
    return Served(
        frozenset(card["id"] for card in base),
        frozenset(card["id"] for card in cards if card.get("parent")),
        next((card["max_model_len"] for card in base if card.get("max_model_len")), None),
        fields_of(scope),
    )


def fields_of(scope: Scope) -> Fields | None:
    """What the connector compares contexts with, for a better message than an engine's; None if it is not to be found."""
    config = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
    hf_config = getattr(getattr(config, "model_config", None), "hf_config", None)
    return None if hf_config is None else model_fields(hf_config)


async def whole_body(receive: Receive) -> list[Message]:
    """The messages of a request's body, or up to where the client left."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def replay(messages: Sequence[Message], receive: Receive) -> Receive:
    """These messages, then what comes: the server learns from it that the client left."""
    left = list(messages)

    async def again() -> Message:
        return left.pop(0) if left else await receive()

    return again


async def answer_json(send: Send, status: int, body: Mapping[str, Any]) -> None:
    """Send an answer of our own."""
    await answer(send, status, json.dumps(body, ensure_ascii=False).encode(), [(b"content-type", b"application/json")])


async def answer(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Send a whole answer."""
    own = [pair for pair in headers if pair[0].lower() != b"content-length"]
    own.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body, "more_body": False})
