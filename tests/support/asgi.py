"""Requests to ASGI applications without a server, and one that answers as vLLM's does where the middleware asks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.tokenizers import ChatLetters

KEY = "secret"
Headers = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of an answer; ``json`` is the body, parsed."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def call(
    app: Any, method: str, path: str, body: Any = None, headers: Headers | None = None, parts: int = 1, **scope: Any
) -> Answer:
    """One request; the body is JSON of ``body``, or bytes as they are, sent in so many parts."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"authorization": f"Bearer {KEY}", "content-type": "application/json", "content-length": str(len(data))}
    named |= headers or {}
    size = -(-len(data) // parts) or 1
    pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": at + 1 < len(pieces)} for at, piece in enumerate(pieces)
    ]  # fmt: skip
    begin: dict[str, Any] = {}
    sent = bytearray()

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            begin.update(message)
        else:
            sent.extend(message["body"])

    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    asked = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"", **scope}
    asyncio.run(app(asked, receive, send))
    return Answer(begin["status"], {name.decode(): value.decode() for name, value in begin["headers"]}, bytes(sent))


@dataclass
class Vllm:
    """What the middleware wraps: models, a tokenizer of letters, and for all else what it was sent."""

    tokenizer: Any = field(default_factory=ChatLetters)
    adapters: Sequence[str] = ()
    max_model_len: int = 1000
    asked: list[str] = field(default_factory=list)  # paths, in order

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.asked.append(path)
        data, message = bytearray(), await receive()
        data.extend(message["body"])
        while message.get("more_body"):
            message = await receive()
            data.extend(message["body"])
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        assert int(headers.get("content-length", 0)) == len(data)
        status, answer = 200, None
        if path.endswith("/tokenize"):
            status, answer = self.tokenized(json.loads(data))
        elif path.endswith("/detokenize"):
            answer = {"prompt": self.tokenizer.decode(json.loads(data)["tokens"])}
        elif headers.get("authorization") != f"Bearer {KEY}":
            status, answer = 401, {"error": "Unauthorized"}
        elif path.endswith("/v1/models"):
            cards = [{"id": "base", "max_model_len": self.max_model_len, "parent": None}]
            answer = {"data": [*cards, *({"id": name, "parent": "base"} for name in self.adapters)]}
        else:
            answer = {"path": path, "sent": data.decode()}
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )  # fmt: skip
        await send({"type": "http.response.body", "body": json.dumps(answer).encode(), "more_body": False})

    def tokenized(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of ``/tokenize``; a template of the request's is refused, as vLLM does by default."""
        if body.get("chat_template"):
            return 400, {"error": {"message": "untrusted chat template"}}
        if "messages" in body:
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        else:
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return 200, {"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len}
