"""Limits on sizes, times and the queue; what is left after faults is nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from support.serving import Gate, ask, asking, chat, check_nothing_left, chunks_of, tiny_app, tiny_engine, with_client, words
from winnowkv.serve.limits import BodyLimit, Observed
from winnowkv.serve.metrics import Metrics

TEXT = words(40)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer of that status and code."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


def test_a_body_of_ten_megabytes_is_refused_with_the_limit() -> None:
    error = error_of(ask(tiny_app(), b" " * 10_000_000), 413, "body_too_large")
    assert str(4 * 2**20) in error["message"]


def test_a_body_at_its_limit_is_read() -> None:
    body = json.dumps(chat(TEXT)).encode()
    assert ask(tiny_app(max_body=len(body)), body, headers={"content-type": "application/json"}).status_code == 200
    error_of(ask(tiny_app(max_body=len(body) - 1), body, headers={"content-type": "application/json"}), 413, "body_too_large")


def test_a_slow_body_is_given_up() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()  # for ever
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError("the application is not asked")

    layers = Observed(BodyLimit(never, 100, 0.01), Metrics())
    asyncio.run(layers({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"
    assert (b"connection", b"close") in sent[0]["headers"]


def test_all_bodies_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnowkv.serve.limits.BODIES_AT_ONCE", 1)
    body = json.dumps(chat(TEXT)).encode()
    engine = tiny_engine()
    gate, app = Gate(engine), tiny_app(engine, max_body=len(body) + 10)

    async def two(client: httpx.AsyncClient) -> httpx.Response:
        how: dict[str, Any] = {"content": body, "headers": {"content-type": "application/json"}}
        first = asyncio.create_task(client.post(CHAT, **how))
        while not engine.waiting:
            await asyncio.sleep(0)
        error_of(await client.post(CHAT, **how), 429, "bodies_full")
        gate.open()
        assert (await first).status_code == 200
        return await client.post(CHAT, **how)

    assert with_client(app, two).status_code == 200


def test_prompts_that_are_too_long_name_the_limit() -> None:
    error = error_of(ask(tiny_app(max_prompt_tokens=41), chat(TEXT)), 400, "context_length_exceeded")
    assert (error["param"], "42 tokens" in error["message"], "41" in error["message"]) == ("messages", True, True)
    error = error_of(ask(tiny_app(), chat(words(1020))), 400, "context_length_exceeded")
    assert "1024 positions" in error["message"]
    assert ask(tiny_app(max_prompt_tokens=42), chat(TEXT)).status_code == 200


def test_what_can_never_fit_is_refused() -> None:
    answer = ask(tiny_app(tiny_engine(kv_memory=60_000)), chat(words(500)))
    assert answer.status_code == 400
    assert "kv_memory" in answer.json()["error"]["message"]


def test_more_new_tokens_than_allowed_are_refused() -> None:
    error = error_of(ask(tiny_app(max_new_tokens=5), chat(TEXT)), 400, "invalid_value")
    assert "5" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_answers_429_and_the_others_are_served(stream: bool) -> None:
    engine = tiny_engine()
    gate, app = Gate(engine), tiny_app(engine, queue=3)

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        waiting = []
        for _ in range(3):
            waiting.append(asyncio.create_task(client.post(CHAT, json=chat(TEXT, stream=stream))))
            while engine.waiting < len(waiting):
                await asyncio.sleep(0)
        refused = await client.post(CHAT, json=chat(TEXT, stream=stream))
        error_of(refused, 429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        error_of(await client.post(COMPLETIONS, json={"model": "tiny", "prompt": ["w1"] * 4}), 400, "too_many_prompts")
        gate.open()
        return await asyncio.gather(*waiting)

    assert [answer.status_code for answer in with_client(app, crowd)] == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_not_begun_in_time_gets_429(stream: bool) -> None:
    engine = tiny_engine()
    gate, app = Gate(engine), tiny_app(engine, queue_deadline=0.02)

    async def wait(client: httpx.AsyncClient) -> httpx.Response:
        answer = await client.post(CHAT, json=chat(TEXT, stream=stream))
        gate.open()
        return answer

    answer = with_client(app, wait)
    error_of(answer, 429, "queue_deadline")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize(("passing", "stream"), [(0, False), (2, False), (0, True)])
def test_a_request_ends_when_its_time_is_over(passing: int, stream: bool) -> None:
    engine = tiny_engine()
    gate, app = Gate(engine, passing), tiny_app(engine, request_timeout=0.1)

    async def wait(client: httpx.AsyncClient) -> httpx.Response:
        answer = await client.post(CHAT, json=chat(TEXT, stream=stream, max_tokens=50))
        gate.open()
        return answer

    answer = with_client(app, wait)
    error = error_of(answer, 504, "request_timeout")
    assert "0.1 s" in error["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_a_stream_ends_with_an_error_when_its_time_is_over() -> None:
    engine = tiny_engine()
    gate, app = Gate(engine, 2), tiny_app(engine)

    async def wait(client: httpx.AsyncClient) -> httpx.Response:
        asked = asyncio.create_task(client.post(CHAT, json=chat(TEXT, stream=True, max_tokens=50)))
        loop = app.state.serving.loop
        while not any(ticket.generated >= 2 and not ticket._events for ticket in loop._tickets):
            await asyncio.sleep(0)
        (ticket,) = loop._tickets
        ticket.cancel("timeout")  # as its timer does
        gate.open()
        return await asked

    answer = with_client(app, wait)
    *chunks, last = chunks_of(answer.text)
    assert answer.status_code == 200
    assert len(chunks) >= 2
    assert last["error"]["code"] == "request_timeout"
    metrics = app.state.serving.metrics.page().decode()
    assert 'winnow_cancelled_requests_total{reason="timeout"} 1.0' in metrics


def test_draining_refuses_new_requests_and_lets_running_ones_end() -> None:
    engine = tiny_engine()
    gate, app = Gate(engine, 2), tiny_app(engine)

    async def drain() -> None:
        async with asking(app) as client:
            running = asyncio.create_task(client.post(CHAT, json=chat(TEXT)))
            while not engine.active:
                await asyncio.sleep(0)
            loop = app.state.serving.loop
            stopping = asyncio.create_task(loop.stop(20))
            await asyncio.sleep(0)
            refused = await client.post(CHAT, json=chat(TEXT))
            error_of(refused, 503, "stopping")
            assert int(refused.headers["retry-after"]) > 0
            error_of(await client.get("/ready"), 503, "draining")
            assert (await client.get("/health")).status_code == 200
            gate.open()
            assert (await running).status_code == 200
            await stopping
            assert not loop.alive

    asyncio.run(drain())
    check_nothing_left(app)


def test_what_does_not_end_while_draining_is_cancelled() -> None:
    engine = tiny_engine()
    gate, app = Gate(engine, 2), tiny_app(engine)

    async def cut() -> list[httpx.Response]:
        async with asking(app) as client:
            asked = [asyncio.create_task(client.post(CHAT, json=chat(TEXT, stream=stream))) for stream in (False, True)]
            while app.state.serving.loop.waiting + engine.active < 2 or not engine.active:
                await asyncio.sleep(0)
            stopping = asyncio.create_task(app.state.serving.loop.stop(0.01))
            answers = await asyncio.gather(*asked)
            gate.open()
            await stopping
            return answers

    for answer in asyncio.run(cut()):
        if answer.status_code == 200:
            error = chunks_of(answer.text)[-1]["error"]
            assert error["code"] == "stopping"
            assert "before its answer was whole" in error["message"]
        else:
            error_of(answer, 503, "stopping")
    check_nothing_left(app)


def test_ids_are_honoured_if_they_are_sane_and_logged_without_prompts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "winnowkv.serve")
    assert ask(tiny_app(), chat(TEXT), headers={"x-request-id": "mine.1-a"}).headers["x-request-id"] == "mine.1-a"
    (record,) = [one for one in caplog.records if one.message == "request"]
    assert (record.request_id, record.status, record.prompt_tokens, record.generated_tokens) == ("mine.1-a", 200, 42, 6)
    for bad in ("a b", "x" * 65, "{}", "a\\n"):
        assert ask(tiny_app(), chat(TEXT), headers={"x-request-id": bad}).headers["x-request-id"].startswith("req-")
    assert not any(TEXT[:20] in str(vars(one)) for one in caplog.records)


def test_prompts_are_logged_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "winnowkv.serve")
    ask(tiny_app(log_prompts=True), chat(TEXT))
    assert any(TEXT in str(vars(one)) for one in caplog.records)


def test_metrics_count_what_was_served() -> None:
    app = tiny_app(tiny_engine(kv_memory="1MiB"))

    async def look(client: httpx.AsyncClient) -> str:
        await client.post(CHAT, json=chat(TEXT))
        await client.post(CHAT, json=chat(TEXT, n=0))
        return (await client.get("/metrics")).text

    page = with_client(app, look)
    for line in (
        'winnow_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'winnow_requests_total{route="/v1/chat/completions",status="400"} 1.0',
        "winnow_prompt_tokens_total 42.0", "winnow_kept_entries_total 20.0", "winnow_generated_tokens_total 6.0",
        "winnow_time_to_first_token_seconds_count 1.0", "winnow_inter_token_seconds_count 5.0",
        "winnow_queue_seconds_count 1.0",
        "winnow_queue_length 0.0", "winnow_active_requests 0.0", "winnow_kv_bytes 0.0", "winnow_kv_limit_bytes 1.048576e+06",
    ):  # fmt: skip
        assert line in page.splitlines(), line
    assert "process_resident_memory_bytes" in page
