"""Who may ask, from where, and what a server is allowed to be started with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends

from support.serving import MODEL, chat, tiny_app, tiny_engine, with_client, words
from winnowkv.errors import WinnowError
from winnowkv.serve.app import make_app
from winnowkv.serve.keys import NO_KEY, Keys, Owner, owner_name, owner_of, read_keys
from winnowkv.serve.serving import ServingNow
from winnowkv.serve.settings import ServeSettings

FIRST, SECOND = "first-key-1", "second-key-2"
CHAT = "/v1/chat/completions"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_are_told_apart_by_owners_that_do_not_reveal_them() -> None:
    keys = Keys([FIRST, SECOND])
    assert keys.owner(f"Bearer {FIRST}") == owner_name(FIRST) != owner_name(SECOND) == keys.owner(f"bearer  {SECOND} ")
    for bad in (None, "", FIRST, f"Basic {FIRST}", f"Bearer {FIRST}x", "Bearer", "Bearer \xff"):
        assert keys.owner(bad) is None
    assert FIRST not in owner_name(FIRST)


def test_every_key_is_compared_whatever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    same = __import__("hmac").compare_digest
    monkeypatch.setattr("winnowkv.serve.keys.hmac.compare_digest", lambda a, b: compared.append(same(a, b)) or compared[-1])
    Keys([FIRST, SECOND]).owner(f"Bearer {FIRST}")
    assert compared == [True, False]


def test_without_a_known_key_nothing_is_served_but_the_states() -> None:
    app = tiny_app(api_keys=(FIRST, SECOND), host="0.0.0.0")

    async def look(client: httpx.AsyncClient) -> None:
        for path in ("/health", "/ready", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        for headers in ({}, bearer("wrong-key"), {"authorization": "Bearer \xff"}):
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            for answer in (
                await client.get("/v1/models", headers=raw), await client.get("/metrics", headers=raw),
                await client.post(CHAT, json=chat("w1"), headers=raw), await client.get("/nothing", headers=raw),
            ):  # fmt: skip
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert "wrong-key" not in answer.text
        for key in (FIRST, SECOND):
            assert (await client.post(CHAT, json=chat(words(30)), headers=bearer(key))).status_code == 200
            assert (await client.get("/metrics", headers=bearer(key))).status_code == 200

    with_client(app, look)


def test_routers_of_others_get_the_server_the_owner_and_openais_errors() -> None:
    router = APIRouter()

    @router.get("/v1/mine")
    async def mine(owner: Owner, serving: ServingNow, also: Annotated[str, Depends(owner_of)]) -> dict[str, Any]:
        return {"owner": owner, "also": also, "model": serving.settings.model, "waiting": serving.loop.waiting}

    @router.get("/v1/broken")
    async def broken() -> None:
        raise RuntimeError("/secret/place")

    @router.get("/v1/refused")
    async def refused() -> None:
        raise WinnowError("/secret/place cannot be read")

    settings = ServeSettings(model=MODEL, api_keys=(FIRST,))
    app = make_app(tiny_engine(), settings, routers=[router])

    async def look(client: httpx.AsyncClient) -> None:
        found = (await client.get("/v1/mine", headers=bearer(FIRST))).json()
        assert found == {"owner": owner_name(FIRST), "also": owner_name(FIRST), "model": MODEL, "waiting": 0}
        for path, status in (("broken", 500), ("refused", 400)):
            answer = await client.get(f"/v1/{path}", headers={**bearer(FIRST), "x-request-id": "the-id"})
            assert (answer.status_code, answer.json()["error"]["request_id"]) == (status, "the-id")
            assert "secret" not in answer.text

    with_client(app, look)


def test_without_keys_everybody_is_nobody() -> None:
    router = APIRouter()
    router.add_api_route("/mine", lambda owner: {"owner": owner}, dependencies=[])
    seen: list[str] = []

    async def mine(owner: Owner) -> None:
        seen.append(owner)

    router.routes.clear()
    router.add_api_route("/mine", mine)
    app = make_app(tiny_engine(), ServeSettings(model=MODEL), routers=[router])

    async def look(client: httpx.AsyncClient) -> None:
        await client.get("/mine", headers=bearer("whatever"))

    with_client(app, look)
    assert seen == [NO_KEY]


def test_no_origin_is_allowed_unless_named() -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}

    async def look(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        return await client.options(CHAT, headers=ask), await client.get("/v1/models", headers={"origin": "https://a.example"})

    for answer in with_client(tiny_app(), look):
        assert "access-control-allow-origin" not in answer.headers
    for answer in with_client(tiny_app(cors=("https://a.example",), api_keys=(FIRST,)), look):
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
    for answer in with_client(tiny_app(cors=("https://b.example",)), look):
        assert "access-control-allow-origin" not in answer.headers


def test_a_file_of_keys_has_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{FIRST}\n\n  {SECOND}  \n")
    assert read_keys(file) == (FIRST, SECOND)
    file.write_text("# none\n")
    with pytest.raises(WinnowError, match="has no key"):
        read_keys(file)
    with pytest.raises(WinnowError, match="--api-key-file"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"host": "192.0.2.1"}, "no API key"),
        ({"api_keys": ("short",)}, "at least 8"),
        ({"api_keys": ("with a blank",)}, "printable"),
        ({"kv_memory": "much"}, "kv_memory 'much' is not a size"),
        ({"max_body": 0}, "max_body 0"),
        ({"budget": 0}, "budget"),
        ({"quality": "great"}, "quality"),
        ({"queue": 0}, "queue=0"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"interleave": 0}, "interleave=0"),
        ({"drain": -1}, "drain=-1"),
        ({"queue_deadline": 0}, "queue_deadline=0"),
        ({"request_timeout": float("inf")}, "request_timeout=inf"),
        ({"port": 70000}, "port=70000"),
        ({"cors": ("a.example",)}, "https://example.org"),
        ({"model": ""}, "model name"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(WinnowError, match=message.replace("(", r"\(")):
        ServeSettings(**given)


def test_settings_that_are_fine() -> None:
    assert ServeSettings(kv_memory="1GiB", max_body="1KiB").kv_memory == 2**30
    assert not ServeSettings(host="0.0.0.0", insecure=True).loopback
    assert ServeSettings(host="0.0.0.0", api_keys=(FIRST,)).api_keys == (FIRST,)
    assert FIRST not in repr(ServeSettings(api_keys=(FIRST,)))
