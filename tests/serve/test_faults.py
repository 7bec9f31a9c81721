"""Bodies that were damaged: bytes that are no UTF-8, broken JSON, values of all kinds."""

from __future__ import annotations

import json
import random
import runpy

import httpx
import pytest

from support.paths import BENCHMARKS
from support.serving import MODEL, chat, tiny_app, with_client, words

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
