"""The middleware: what it passes as it came, what it rewrites, whom it asks, and what it answers itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.asgi import KEY, Vllm, call
from support.contexts import TEXT, drawn_context
from support.tokenizers import ChatLetters
from winnowkv.contexts.context import Context
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import InputError
from winnowkv.integrations.vllm import own_server
from winnowkv.integrations.vllm.middleware import ELSEWHERE, STORE_VARIABLE, ContextMiddleware
from winnowkv.integrations.vllm.requests import CHAT_PATH, COMPLETIONS_PATH, CONTEXTS_PATH
from winnowkv.prompt.chat import user_message

QUESTION = "Who wrote it?"


@pytest.fixture
def vllm() -> Vllm:
    return Vllm(adapters=("lora",))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def context(store: Path) -> Context:
    return drawn_context(store, ChatLetters())


@pytest.fixture
def app(vllm: Vllm, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ContextMiddleware]:
    monkeypatch.setenv(STORE_VARIABLE, str(store))
    made = ContextMiddleware(vllm)
    yield made
    made._threads.shutdown()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("root", ["", "/llm"])
def test_a_request_on_a_context_is_rewritten(
    app: ContextMiddleware, vllm: Vllm, context: Context, parts: int, root: str
) -> None:
    expected = context.ask(ChatLetters(), QUESTION)
    body = {"model": "base", "messages": user_message(QUESTION), "winnow_context": context.id, "stream": True}
    answer = call(app, "POST", root + CHAT_PATH, body, parts=parts, root_path=root)
    assert (answer.status, answer.json["path"]) == (200, root + CHAT_PATH)
    params = {"winnow_context": context.id, "prompt_token_ids": expected.ids}
    del body["winnow_context"]
    assert json.loads(answer.json["sent"]) == {**body, "cache_salt": context.salt, "kv_transfer_params": params}
    body = {"prompt": QUESTION, "winnow_context": context.id}
    answer = call(app, "POST", root + COMPLETIONS_PATH, body, parts=parts, root_path=root)
    assert json.loads(answer.json["sent"]) == expected.body


@pytest.mark.parametrize(
    "body",
    [
        {"messages": user_message("hi"), "kv_transfer_params": {"winnow_context": "x"}},
        {"messages": user_message('say "winnow_context"')},
        {"winnow_context": None},
        b'{"winnow_context": ',
        b'["winnow_context"]',
        b'\xff"winnow_context"',
        b"",
    ],
)
def test_other_requests_pass_as_they_came(app: ContextMiddleware, vllm: Vllm, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body, indent=3).encode()
    for path in (CHAT_PATH, COMPLETIONS_PATH, *ELSEWHERE):
        try:
            answer = call(app, "POST", path, data, parts=2)
        except UnicodeDecodeError:  # of the application that shows what it was sent
            assert b"\xff" in data
        else:
            assert answer.json == {"path": path, "sent": data.decode()}
        assert vllm.asked.pop() == path
        assert vllm.asked == []


def test_other_paths_and_methods_are_not_read(app: ContextMiddleware, vllm: Vllm) -> None:
    body = {"winnow_context": "x"}
    for method, path in (("POST", "/v1/embeddings"), ("GET", CHAT_PATH), ("POST", CONTEXTS_PATH), ("PUT", COMPLETIONS_PATH)):
        assert call(app, method, path, body).json == {"path": path, "sent": json.dumps(body)}
    received: list[Any] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        received.append((scope, receive, send))

    app.app = behind
    lifespan = ({"type": "lifespan"}, object(), object())
    asyncio.run(app(*lifespan))
    assert received == [lifespan]


@pytest.mark.parametrize("path", ELSEWHERE)
def test_where_contexts_are_not_served_they_are_refused(
    app: ContextMiddleware, vllm: Vllm, context: Context, path: str
) -> None:
    answer = call(app, "POST", path, {"winnow_context": context.id, "input": "hi"})
    assert (answer.status, answer.json["error"]["param"]) == (400, "winnow_context")
    assert f"{path} serves no contexts: ask at /v1/chat/completions" in answer.json["error"]["message"]
    assert path not in vllm.asked


def test_refusals_are_errors_as_openai_writes_them(app: ContextMiddleware, vllm: Vllm, context: Context) -> None:
    body = {"messages": user_message(QUESTION), "winnow_context": context.id, "prompt_logprobs": 1}
    answer = call(app, "POST", CHAT_PATH, body)
    error = answer.json["error"]
    assert (answer.status, answer.headers["content-type"]) == (400, "application/json")
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "prompt_logprobs", 400)
    assert error["message"].startswith("winnowkv: prompt_logprobs=1 cannot be honoured")
    answer = call(app, "POST", CHAT_PATH, {"messages": user_message("x"), "winnow_context": context.id, "model": "other"})
    assert (answer.status, answer.json["error"]["type"]) == (404, "NotFoundError")
    body = {"messages": user_message(QUESTION), "winnow_context": context.id, "chat_template": "mine"}
    assert "untrusted chat template" in call(app, "POST", CHAT_PATH, body).json["error"]["message"]
    body = {"messages": user_message(QUESTION), "winnow_context": context.id, "model": "lora"}
    assert "LoRA adapter" in call(app, "POST", CHAT_PATH, body).json["error"]["message"]
    body = {"messages": user_message("x" * 990), "winnow_context": context.id}
    assert "pass the server's 1000 tokens" in call(app, "POST", CHAT_PATH, body).json["error"]["message"]
    assert CHAT_PATH not in vllm.asked


def test_nothing_is_told_without_the_servers_key(app: ContextMiddleware, vllm: Vllm, context: Context) -> None:
    bad = {"authorization": "Bearer guess"}
    body = {"messages": user_message(QUESTION), "winnow_context": context.id}
    for method, path, sent in (("GET", CONTEXTS_PATH, None), ("POST", CHAT_PATH, body), ("POST", ELSEWHERE[0], body)):
        answer = call(app, method, path, sent, headers=bad)
        assert (answer.status, answer.json) == (401, {"error": "Unauthorized"})
    assert set(vllm.asked) == {"/v1/models"}
    assert call(app, "GET", CONTEXTS_PATH, headers={"authorization": f"Bearer {KEY}"}).status == 200


def test_the_store_is_listed(app: ContextMiddleware, store: Path) -> None:
    assert call(app, "GET", CONTEXTS_PATH).json == {"object": "list", "data": []}
    made = [drawn_context(store, ChatLetters(), name=name) for name in ("räume", "b")]
    found = call(app, "GET", CONTEXTS_PATH).json["data"]
    assert found == [{"object": "context", **one.to_dict()} for one in sorted(made, key=lambda one: one.id)]
    assert {"id", "name", "kept", "seen", "bytes", "policy", "budget"} <= set(found[0])


def test_a_second_question_asks_the_server_for_little(app: ContextMiddleware, vllm: Vllm, context: Context) -> None:
    counts = []
    for question in ("Who wrote it?", "When was it?"):
        vllm.asked.clear()
        call(app, "POST", CHAT_PATH, {"messages": user_message(question), "winnow_context": context.id})
        counts.append(vllm.asked.count("/tokenize"))
    assert counts[1] == 2  # the messages as they came, and the question after the document's end
    assert counts[0] > counts[1]


def test_what_is_remembered_is_bounded(app: ContextMiddleware, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_server, "REMEMBERED", 5)
    monkeypatch.setattr(own_server, "LONGEST_REMEMBERED", 200)
    for question in ("Who?", "Who? " * 40):
        body = {"messages": user_message(question), "winnow_context": context.id}
        expected = context.ask(ChatLetters(), question).ids
        answer = call(app, "POST", CHAT_PATH, body)
        assert json.loads(answer.json["sent"])["kv_transfer_params"]["prompt_token_ids"] == expected
        assert len(app.server._remembered) == 5


def test_a_client_that_left_is_noticed_behind(store: Path, context: Context) -> None:
    seen: list[str] = []

    class Waiting(Vllm):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == CHAT_PATH:
                seen.extend([(await receive())["type"], (await receive())["type"]])
            await super().__call__(scope, receive if scope["path"] != CHAT_PATH else empty, send)

    async def empty() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    app = ContextMiddleware(Waiting(), str(store))
    with pytest.raises(AssertionError):  # the application counts the bytes of a body that it did not get
        call(app, "POST", CHAT_PATH, {"messages": user_message(QUESTION), "winnow_context": context.id})
    assert seen == ["http.request", "http.disconnect"]


def test_a_store_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    with pytest.raises(InputError, match="WINNOW_STORE is not set"):
        ContextMiddleware(Vllm())


def test_many_at_once_get_their_own(app: ContextMiddleware, store: Path) -> None:
    contexts = [drawn_context(store, ChatLetters(), TEXT + f" Volume {n}.", name=str(n)) for n in range(4)]

    async def one(number: int) -> tuple[int, dict[str, Any]]:
        context = contexts[number % 4]
        data = json.dumps({"messages": user_message(f"Question {number}?"), "winnow_context": context.id}).encode()
        parts: list[bytes] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            parts.append(message.get("body", b""))

        headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-length", str(len(data)).encode())]
        await app({"type": "http", "method": "POST", "path": CHAT_PATH, "headers": headers}, receive, send)
        return number, json.loads(json.loads(b"".join(parts))["sent"])

    async def every() -> list[tuple[int, dict[str, Any]]]:
        return await asyncio.gather(*(one(number) for number in range(40)))

    for number, body in asyncio.run(every()):
        expected = contexts[number % 4].ask(ChatLetters(), f"Question {number}?")
        assert body["kv_transfer_params"]["prompt_token_ids"] == expected.ids
        assert body["cache_salt"] == ContextStore(store).context(contexts[number % 4].id).salt
