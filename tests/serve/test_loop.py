"""The thread that owns the engine: it outlives errors, does jobs, and says when it cannot go on."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import httpx
import pytest

from support.serving import Gate, asking, chat, chunks_of, tiny_app, tiny_engine, with_client, words
from winnowkv.cache.cache import CompactCache
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Event
from winnowkv.engine.sampling import Sampling
from winnowkv.errors import CacheError, InputError
from winnowkv.serve.errors import ApiError
from winnowkv.serve.prompts import Prompt
from winnowkv.serve.serving import Serving

TEXT = words(40)
CHAT = "/v1/chat/completions"


class Failing:
    """An engine's steps, of which the one with this number raises, after it has done its work or in a forward pass."""

    def __init__(self, engine: Engine, at: int, error: BaseException) -> None:
        self.count, self.at, self.error, self._forward = 0, at, error, engine._decode
        engine._decode = self._decode  # type: ignore[method-assign]

    def _decode(self, rows: Any) -> list[Event]:
        self.count += bool(rows)
        if rows and self.count == self.at:
            raise self.error
        return self._forward(rows)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_error_ends_its_requests_with_an_id_and_the_loop_goes_on(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine()
    Failing(engine, 60, RuntimeError("/secret/place is broken"))

    headers = {"x-request-id": "the-id"}

    async def twice(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        first = await client.post(CHAT, json=chat(TEXT, stream=stream, max_tokens=90), headers=headers)
        return first, await client.post(CHAT, json=chat(TEXT))

    failed, fine = with_client(tiny_app(engine), twice)
    if stream and failed.status_code == 200:  # else the first event that was seen was the last
        error = chunks_of(failed.text)[-1]["error"]
    else:
        assert failed.status_code == 500
        error = failed.json()["error"]
    assert (error["code"], error["request_id"]) == ("engine", "the-id")
    assert "secret" not in failed.text
    (record,) = [one for one in caplog.records if one.message == "engine step failed"]
    assert (record.requests, record.levelno) == (["the-id"], logging.ERROR)
    assert "secret" in caplog.text
    assert fine.status_code == 200


def test_an_exit_in_the_thread_ends_it_and_is_seen() -> None:
    engine, hook = tiny_engine(), threading.excepthook
    seen: list[Any] = []
    threading.excepthook = lambda args: seen.append(args.exc_type)
    Failing(engine, 2, SystemExit(3))

    async def look(client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT, json=chat(TEXT))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
        client_app: Any = client._transport.app  # type: ignore[attr-defined]
        client_app.state.serving.loop._thread.join(20)
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        assert (await client.post(CHAT, json=chat(TEXT))).status_code == 503

    try:
        with_client(tiny_app(engine), look)
    finally:
        threading.excepthook = hook


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    def load() -> Engine:
        raise InputError("/secret/place has no model")

    told: list[Serving] = []
    from winnowkv.serve.app import make_app

    app = make_app(load, loaded=told.append)

    async def look() -> None:
        async with asking(app) as client:
            while not told:
                await asyncio.sleep(0)
            answer = await client.get("/ready")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "failed")

    asyncio.run(look())
    assert isinstance(told[0].failure, InputError)


def test_while_the_model_is_loaded_requests_are_told_to_come_back() -> None:
    from winnowkv.serve.app import make_app
    from winnowkv.serve.settings import ServeSettings

    go, engine = threading.Event(), tiny_engine()
    app = make_app(lambda: go.wait(20) and engine, ServeSettings(model="tiny"))  # type: ignore[arg-type,return-value]

    async def look(client: httpx.AsyncClient) -> None:
        for answer in (await client.post(CHAT, json=chat(TEXT)), await client.get("/ready"), await client.get("/v1/models")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
            assert "retry-after" in answer.headers
        assert (await client.get("/health")).status_code == 200
        go.set()
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.001)
        assert (await client.post(CHAT, json=chat(TEXT))).status_code == 200

    with_client(app, look)


def test_jobs_are_done_in_the_queue_and_stopped_with_the_server() -> None:
    app = tiny_app()

    async def look() -> None:
        async with asking(app) as client:
            loop = app.state.serving.loop
            asked = asyncio.create_task(client.post(CHAT, json=chat(TEXT)))
            assert await loop.run_job(lambda between: threading.current_thread().name, 1000) == "winnow-engine"
            with pytest.raises(CacheError, match="what the work raised"):
                await loop.run_job(fail, 1000)
            assert (await asked).status_code == 200
            gate = Gate(loop.engine)
            waiting = asyncio.create_task(loop.run_job(lambda between: 1, 1000))
            await asyncio.sleep(0)
            stopping = asyncio.create_task(loop.stop(0))
            with pytest.raises(ApiError, match="is stopping"):
                await waiting
            gate.open()
            await stopping
            with pytest.raises(ApiError, match="is stopping"):
                await loop.run_job(lambda between: 1, 1000)

    asyncio.run(look())


def fail(between: Any) -> None:
    raise CacheError("what the work raised")


class Stored:
    """A reader of prompts with one stored document, whose cache all of them go on from."""

    def __init__(self, engine: Engine) -> None:
        self.cache = CompactCache(engine.model, "snapkv:observe=8:kernel=3", 20)
        self.released: list[str | None] = []
        ids = engine.tokenizer(words(60)).input_ids
        import torch

        with torch.no_grad():
            engine.model(torch.tensor([ids]), past_key_values=self.cache)
        self.tokenizer, self.seen = engine.tokenizer, len(ids)

    def chat(self, messages: Any, context: str | None, owner: str, *, own: bool = False) -> Prompt:
        if context == "broken":
            raise InputError("it is broken")
        ids = self.tokenizer(messages[0]["content"]).input_ids
        return Prompt(ids, self.cache, context, self.seen, release=lambda: self.released.append(context))

    def text(self, prompt: Any, context: str | None, owner: str) -> Prompt:
        return self.chat([{"content": prompt}], context, owner)


def test_prompts_go_on_from_a_stored_context_and_let_go_of_it() -> None:
    engine = tiny_engine()
    stored = Stored(engine)
    request = engine.submit(engine.tokenizer("w5 w6 w7").input_ids, Sampling(6), after=stored.cache)
    while request.completion is None:
        engine.step()
    from winnowkv.serve.app import make_app
    from winnowkv.serve.settings import ServeSettings

    app = make_app(engine, ServeSettings(model="tiny", keep_whole=0), prompts=lambda serving, engine: stored)

    async def look(client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT, json=chat("w5 w6 w7", winnow_context="doc"))
        found = answer.json()
        assert found["choices"][0]["message"]["content"] == request.completion.text
        usage = found["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (63, {"cached_tokens": 60})
        assert usage["winnow"]["context"] == "doc"
        assert stored.released == ["doc"]
        refused = await client.post(CHAT, json=chat("w5", winnow_context="doc", winnow={"budget": 30}))
        assert (refused.status_code, stored.released) == (400, ["doc", "doc"])
        assert (await client.post(CHAT, json=chat("w5", winnow_context="broken"))).status_code == 400
        body = {"model": "tiny", "prompt": ["w5 w6 w7", "w5"], "winnow_context": "doc", "max_tokens": 6, "temperature": 0}
        several = (await client.post("/v1/completions", json=body)).json()
        assert several["choices"][0]["text"] == request.completion.text
        assert stored.released == ["doc"] * 4

    with_client(app, look)
