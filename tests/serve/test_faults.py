"""Bodies that were damaged, and how often the engine's thread and the event loop meet."""

from __future__ import annotations

import asyncio
import json
import random
import runpy
from typing import Any

import httpx
import pytest

from support.paths import BENCHMARKS
from support.serving import MODEL, chat, tiny_app, tiny_engine, with_client, words
from winnowkv.engine.sampling import Sampling

DAMAGE = runpy.run_path(str(BENCHMARKS / "soak" / "damage.py"))
PLACES = {"/v1/chat/completions": chat(words(9), max_tokens=2), "/v1/completions": {
    "model": MODEL, "prompt": words(5), "max_tokens": 2, "stop": ["w9"], "n": 1, "winnow": {"budget": 0.5},
}}  # fmt: skip
BODIES = 150


@pytest.mark.parametrize("path", PLACES)
def test_damaged_bodies_are_answered_or_refused_with_their_id(path: str) -> None:
    draw = random.Random(7)
    ways = [*DAMAGE["BYTES"], *[DAMAGE["change_json"]] * 6]
    bodies = [draw.choice(ways)(json.dumps(PLACES[path]).encode(), draw) for _ in range(BODIES)]

    async def send(client: httpx.AsyncClient) -> list[httpx.Response]:
        headers = {"content-type": "application/json"}
        return [await client.post(path, content=body, headers=headers) for body in bodies]

    statuses = set()
    for answer, body in zip(with_client(tiny_app(max_new_tokens=8), send), bodies, strict=True):
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), body
        if answer.status_code != 200:
            assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert {200, 400} <= statuses


def test_events_of_a_step_are_handed_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    app, rows, tokens = tiny_app(), 6, 20
    handed = 0

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        deliver = app.state.serving.loop._deliver

        def counting(callback: Any, *args: Any, **more: Any) -> Any:
            nonlocal handed
            handed += callback == deliver
            return call(callback, *args, **more)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
        body = {"model": MODEL, "prompt": [words(5)], "n": rows, "max_tokens": tokens, "temperature": 1, "seed": 1}
        return [await client.post("/v1/completions", json={**body, "ignore_eos": True})]

    answer = with_client(app, ask)[0]
    assert answer.json()["usage"]["completion_tokens"] == rows * tokens
    assert 1 < handed <= 2 * tokens  # before and after each step, not once for each of the rows


def test_the_engine_tells_of_every_step_those_between_layers_included() -> None:
    engine = tiny_engine(interleave=8)
    told: list[int] = []
    request = engine.submit(words(6), Sampling(max_new_tokens=40))
    engine.step()
    engine.stepped = lambda: told.append(len(request.tokens))
    engine.submit(words(64), Sampling(max_new_tokens=1))
    before = len(request.tokens)
    engine.step()
    steps = len(request.tokens) - before
    assert steps > 1  # some of them while the second prompt was read
    assert sorted(set(told)) == list(range(before, before + steps + 1))
    while engine.active:
        engine.step()
