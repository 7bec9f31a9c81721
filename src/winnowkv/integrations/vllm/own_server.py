"""The server that a middleware stands before, asked through its own HTTP endpoints, inside the process.

So its tokenizer, chat template and their options are exactly those that its requests get, and nothing of vLLM's code has to
be known: ``/tokenize``, ``/detokenize`` and ``/v1/models`` are documented and always there.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchEncoding

from winnowkv.errors import InputError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REMEMBERED, LONGEST_REMEMBERED = 4096, 4096  # answers to /tokenize and /detokenize, and characters of what was asked
NOT_PASSED_ON = (b"content-length", b"content-type", b"content-encoding", b"transfer-encoding", b"accept-encoding", b"expect")


@dataclass(frozen=True)
class HttpAnswer:
    """Status, headers and body of an answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class OwnServer:
    """The application that the middleware wraps.

    Answers about short texts are remembered: the same few are asked for with every question on a context.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._remembered: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()

    async def ask(self, scope: Scope, method: str, path: str, body: Mapping[str, Any] | None = None) -> HttpAnswer:
        """One request with the headers of another (``scope``), such as its API key."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = [pair for pair in scope["headers"] if pair[0].lower() not in NOT_PASSED_ON]
        if body is not None:
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        full = scope.get("root_path", "") + path
        inner = {name: value for name, value in scope.items() if name not in ("extensions", "path_params", "endpoint", "route")}
        inner |= {"method": method, "path": full, "raw_path": full.encode(), "query_string": b"", "headers": headers}
        inner["state"] = dict(scope.get("state") or {})
        begin: dict[str, Any] = {}
        parts, sent = bytearray(), False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # the client stays
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                begin.update(message)
            elif message["type"] == "http.response.body":
                parts.extend(message.get("body", b""))

        await self.app(inner, receive, send)
        return HttpAnswer(begin["status"], list(begin.get("headers", ())), bytes(parts))

    async def json(self, scope: Scope, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What ``/tokenize`` or ``/detokenize`` answers. Raises InputError with what it says if it refuses."""
        key = (path, json.dumps(body, sort_keys=True))
        short = len(key[1]) <= LONGEST_REMEMBERED
        if short and key in self._remembered:
            self._remembered.move_to_end(key)
            return self._remembered[key]
        answer = await self.ask(scope, "POST", path, body)
        found: dict[str, Any] = json.loads(answer.body)
        if answer.status != 200:
            about = found.get("error")
            raise InputError(str(about.get("message") if isinstance(about, dict) else about or f"{path}: {answer.status}"))
        if short:
            self._remembered[key] = found
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return found


class OwnTokenizer:
    """The server's tokenizer, for a thread beside the server's event loop.

    It has what :mod:`winnowkv.prompt.chat` uses of one. ``options`` are the chat template's, as ``/tokenize`` takes them.
    """

    chat_template = "the server's own"

    def __init__(
        self, server: OwnServer, scope: Scope, loop: asyncio.AbstractEventLoop, options: Mapping[str, Any] | None = None
    ) -> None:
        self.server, self.scope, self.loop, self.options = server, scope, loop, dict(options or {})

    def __call__(self, text: str, add_special_tokens: bool = True) -> BatchEncoding:
        """Token ids of a text."""
        return self._encoded({"prompt": text, "add_special_tokens": add_special_tokens})

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> BatchEncoding:
        """Token ids of messages, up to where the answer begins."""
        return self._encoded({"messages": list(messages), **self.options})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._asked("/detokenize", {"tokens": list(ids)})["prompt"]
        return text

    def _encoded(self, body: Mapping[str, Any]) -> BatchEncoding:
        return BatchEncoding({"input_ids": list(self._asked("/tokenize", body)["tokens"])})

    def _asked(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return asyncio.run_coroutine_threadsafe(self.server.json(self.scope, path, body), self.loop).result()
