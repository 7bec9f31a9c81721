"""OpenAI's own client against a server behind uvicorn, and clients that leave, stall or send nonsense."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from support.serving import MODEL, Running, chat, running, tiny_app, tiny_engine, wait_until, words
from winnowkv.engine.sampling import Sampling

TEXT = words(60)
MESSAGES: Any = [{"role": "user", "content": TEXT}]
LONG = 900  # new tokens: long enough that whoever leaves does so in the middle


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(tiny_app(queue=512)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


def alone(prompt: Any = MESSAGES, **how: Any) -> Any:
    """The completion of a prompt in an engine of its own."""
    (done,) = tiny_engine().generate([prompt], Sampling(**{"max_new_tokens": 6, **how}))
    return done


def idle(server: Running) -> None:
    """Nothing runs, waits or is held any more."""
    wait_until(lambda: (server.engine.active, server.engine.waiting, server.engine.held_bytes) == (0, 0, 0))


def test_whole_answers_with_choices_seeds_stops_and_logprobs(client: openai.OpenAI) -> None:
    how: Any = {"temperature": 2.0, "seed": 5, "n": 2}
    truth = alone(stop=("w7",), logprobs=1, **how)
    found = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, stop=["w7"], logprobs=True, top_logprobs=1, **how
    )
    assert [(one.message.content, one.finish_reason) for one in found.choices] == [
        (one.text, one.finish_reason) for one in truth.choices
    ]
    entries = found.choices[1].logprobs.content
    assert [entry.token for entry in entries] == [f"w{one.token}" for one in truth.choices[1].logprobs]
    assert found.usage.completion_tokens == sum(len(one.tokens) for one in truth.choices)
    assert found.usage.winnow["kept_bytes"] == truth.report.kept_bytes


def test_streams(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    with client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == alone().text
    assert chunks[-1].usage.total_tokens == 68


def test_completions_models_and_raw_responses(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=[TEXT, words(9)], max_tokens=6, temperature=0)
    assert raw.headers["x-request-id"].startswith("req-")
    assert [one.text for one in raw.parse().choices] == [alone(TEXT).text, alone(words(9)).text]
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools are not served") as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[{"type": "function"}])  # type: ignore[list-item]
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_value")
    assert refused.value.request_id.startswith("req-")
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="1024 positions") as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": words(1025)}], stream=True)
    assert long.value.code == "context_length_exceeded"


def test_a_closed_stream_frees_its_row(server: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=LONG, temperature=0, stream=True)
    next(stream)
    stream.close()
    idle(server)
    assert 0 < server.app.state.serving.metrics.generated._value.get() < LONG


def test_a_client_that_leaves_before_the_answer_frees_its_row(server: Running) -> None:
    before = server.app.state.serving.metrics.cancelled.labels("disconnected")._value.get()
    send(server, chat(TEXT, max_tokens=LONG), then=lambda: wait_until(lambda: server.engine.active == 1)).close()
    idle(server)
    wait_until(lambda: server.app.state.serving.metrics.cancelled.labels("disconnected")._value.get() == before + 1)


def send(server: Running, body: Any, then: Any = None) -> socket.socket:
    """A connection on which a request was sent."""
    data = json.dumps(body).encode()
    connection = server.connect()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    if then is not None:
        then()
    return connection


def test_a_hundred_clients_that_leave_leave_nothing(server: Running, client: openai.OpenAI) -> None:
    def leave(number: int) -> None:
        connection = send(server, chat(words(20 + number), max_tokens=LONG, stream=bool(number % 2)))
        if number % 6 == 1:
            connection.recv(1)  # waits for the first event
        connection.close()

    kept = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=40, temperature=0, stream=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(99)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in kept) == alone(max_new_tokens=40).text
    idle(server)


def test_a_body_of_ten_megabytes_is_answered(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b"x" * 10_000_000, timeout=20)
    assert answer.status_code == 413


def test_nonsense_in_place_of_a_request_is_refused(server: Running) -> None:
    for data in (b"\x00\xff\r\n\r\n", b"POST /v1 HTTP/1.1\r\nhost: t\r\ncontent-length: x\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(data)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_slow_clients_are_closed_and_stop_nobody() -> None:
    with running(tiny_app(body_timeout=0.2)) as server:
        silent, head, body = server.connect(), server.connect(), server.connect()
        head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nx-slow: ")
        body.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 50\r\n\r\n{")
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat(TEXT), timeout=20)
        assert answer.json()["choices"][0]["message"]["content"] == alone().text
        assert silent.recv(100) == head.recv(100) == b""
        assert body.recv(100).startswith(b"HTTP/1.1 408")
        for connection in (silent, head, body):
            connection.close()


def test_a_client_that_reads_nothing_is_given_up() -> None:
    with running(tiny_app(write_timeout=0.1)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        data = json.dumps(chat(words(20), max_tokens=LONG, n=20, stream=True, logprobs=True, top_logprobs=20)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        cancelled = server.app.state.serving.metrics.cancelled.labels("slow")
        wait_until(lambda: cancelled._value.get() == 1)
        connection.close()


def test_a_stop_lets_running_streams_end() -> None:
    with running(tiny_app()) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, temperature=0, stream=True)
        next(stream)
        server.server.handle_exit(15, None)
        wait_until(lambda: server.app.state.serving.loop.draining)
        with pytest.raises(openai.InternalServerError, match="is stopping"):
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == alone(max_new_tokens=100).text


def test_async_clients_can_cancel(server: Running) -> None:
    async def cancel() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=LONG))
            while not server.engine.active:
                await asyncio.sleep(0.001)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(cancel())
    idle(server)
