"""Contexts over HTTP: made, listed, asked and deleted; what is refused, and what never mixes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import winnowkv as wk
from support.models import built
from support.serving import MODEL, Gate, asking, chunks_of, tiny_app, with_client
from support.tokenizers import ChatLetters
from winnowkv.contexts.export import export_context
from winnowkv.contexts.store import ContextStore
from winnowkv.engine.engine import Engine
from winnowkv.policies import policy as make_policy
from winnowkv.serve.context_routes import ContextObject, MadeContext
from winnowkv.serve.keys import owner_name

POLICY = "snapkv:observe=4"
TEXT = "The archive of Oakham was founded in 1712. Its first keeper, Mary Lund, wrote its history in nine volumes. " * 2
QUESTION = "Who wrote it?"
KEYS = ("anne-anne", "bert-bert")
Client = httpx.AsyncClient


def letters(**options: Any) -> Engine:
    return Engine(built("llama"), ChatLetters(), **{"policy": POLICY, "budget": 40, **options})


def app_of(store: Path | str, engine: Engine | None = None, **settings: Any) -> FastAPI:
    return tiny_app(engine or letters(), store=str(store), **settings)


async def make(client: Client, text: str = TEXT, headers: Any = None, **fields: Any) -> dict[str, Any]:
    body = {"text": text, "policy": POLICY, "budget": 128, **fields}
    answer = await client.post("/v1/contexts", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def question(text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 6}
    return body | fields


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def answered() -> str:
    """What the document answers, read and asked without any server."""
    return wk.read(built("llama"), ChatLetters(), TEXT, POLICY, 128).ask(QUESTION, 6).text


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "saved"])
def test_a_context_is_made_listed_asked_and_deleted(tmp_path: Path, portable: bool) -> None:
    """The answer is the document's own, whole prompt or question, streamed or not."""

    async def all_of_it(client: Client) -> None:
        made = await make(client, name="archive", portable=portable)
        MadeContext.model_validate(made)
        assert (made["name"], made["portable"], made["kept"], made["shared"]) == ("archive", portable, 128, False)
        assert made["seen"] == len(TEXT.rstrip()) + 3
        assert made["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
        name = made["id"]
        (listed,) = (await client.get("/v1/contexts")).json()["data"]
        assert listed == (await client.get(f"/v1/contexts/{name}")).json()
        assert {**listed, "seconds": made["seconds"], "notes": []} == made
        ContextObject.model_validate(listed)
        whole = f"{TEXT.rstrip()}\n\n{QUESTION}"
        bodies = [question(winnow_context=name), question(whole, winnow_context=name), question(winnow={"context": name})]
        for body in bodies:
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            assert answer["choices"][0]["message"]["content"] == answered()
            usage = answer["usage"]
            assert (usage["winnow"]["context"], usage["winnow"]["context_tokens"]) == (name, made["seen"])
            assert usage["winnow"]["kept_entries"]["mean"] == 128
            assert usage["prompt_tokens_details"]["cached_tokens"] == made["seen"]
            assert usage["prompt_tokens"] - made["seen"] == usage["winnow"]["prompt_tokens"] < 40
        stream = (await client.post("/v1/chat/completions", json=question(winnow_context=name, stream=True))).text
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks_of(stream)) == answered()
        body = {"model": MODEL, "prompt": QUESTION, "winnow_context": name, "temperature": 0, "max_tokens": 6}
        assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == answered()
        gone = await client.delete(f"/v1/contexts/{name}")
        assert gone.json() == {"id": name, "object": "context.deleted", "deleted": True}
        assert (await client.get("/v1/contexts")).json()["data"] == []
        for missing in (
            await client.get(f"/v1/contexts/{name}"),
            await client.delete(f"/v1/contexts/{name}"),
            await client.post("/v1/chat/completions", json=question(winnow_context=name)),
        ):
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "context_not_found"

    with_client(app_of(tmp_path), all_of_it)


def test_what_the_command_stored_is_served_and_the_other_way_round(tmp_path: Path) -> None:
    doc = wk.read(built("llama"), ChatLetters(), TEXT, POLICY, 128)
    context = export_context(doc, tmp_path, name="by the operator")

    async def ask(client: Client) -> None:
        (listed,) = (await client.get("/v1/contexts")).json()["data"]
        assert (listed["id"], listed["name"]) == (context.id, "by the operator")
        answer = (await client.post("/v1/chat/completions", json=question(winnow_context=context.id))).json()
        assert answer["choices"][0]["message"]["content"] == answered()
        made = await make(client, "Another text of some words, which is longer than the budget that it has. " * 3)
        assert made["id"] in ContextStore(tmp_path)

    with_client(app_of(tmp_path), ask)


def test_contexts_survive_the_server(tmp_path: Path) -> None:
    async def both(client: Client) -> list[str]:
        return [(await make(client, portable=portable))["id"] for portable in (True, False)]

    names = with_client(app_of(tmp_path), both)

    async def ask(client: Client) -> list[str]:
        bodies = [question(winnow_context=name) for name in names]
        answers = [(await client.post("/v1/chat/completions", json=body)).json() for body in bodies]
        return [answer["choices"][0]["message"]["content"] for answer in answers]

    assert with_client(app_of(tmp_path), ask) == [answered()] * 2


def test_many_ask_at_once_and_the_file_is_read_once(tmp_path: Path) -> None:
    app = app_of(tmp_path)

    async def ask(client: Client) -> None:
        made = await make(client)
        body = question(winnow_context=made["id"])
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(12)))
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {answered()}
        contexts = app.state.serving.prompts.contexts
        assert contexts.reads == 1
        assert all(not held.uses for held in contexts._held.values())

    with_client(app, ask)


def test_a_text_is_studied_or_hinted_as_it_is_asked(tmp_path: Path) -> None:
    async def ask(client: Client) -> None:
        for fields, policy in (
            ({}, "winnow:observe=context:equal=true"),
            ({"study": "none"}, "winnow:observe=context:equal=true"),
            ({"hint": QUESTION}, "winnow:equal=true"),
            ({"portable": False}, "winnow:observe=context:refit=true"),
            ({"portable": False, "study": "none"}, "winnow:observe=context"),
            ({"portable": False, "hint": QUESTION}, "winnow"),
        ):
            answer = await client.post("/v1/contexts", json={"text": TEXT, "budget": 0.3, **fields})
            assert answer.status_code == 200, answer.text
            assert answer.json()["policy"] == make_policy(policy).spec
            body = question(winnow_context=answer.json()["id"])
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        system = await make(client, system="Answer briefly.")
        assert system["seen"] == len(TEXT.rstrip()) + 3 + len("<s>Answer briefly.|")

    with_client(app_of(tmp_path, letters(kv_memory="64MiB")), ask)


REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"text": ""}, 400, "invalid_value", "text"),
    ({"text": " \n"}, 400, "invalid_value", None),
    ({"name": "n" * 201}, 400, "invalid_value", "name"),
    ({"study": "deep"}, 400, "invalid_value", "study"),
    ({"policy": "nosuch"}, 400, "invalid_policy", "policy"),
    ({"policy": "compresskv:profile=/etc/passwd"}, 400, "invalid_policy", "policy"),
    ({"policy": "pyramidkv:observe=4"}, 400, "invalid_policy", "policy"),
    ({"budget": 0}, 400, "invalid_budget", "budget"),
    ({"budget": "auto:0.9:/etc/passwd"}, 400, "invalid_budget", "budget"),
    ({"budget": "auto:0.9"}, 400, "invalid_budget", "budget"),
    ({"file": "/etc/passwd"}, 400, "unknown_field", "file"),
    ({"text": "long " * 300}, 400, "context_length_exceeded", "text"),
    ({"text": "\ud800"}, 400, "invalid_value", "text"),
]


def test_what_cannot_be_made_is_refused_by_its_field(tmp_path: Path) -> None:
    async def ask(client: Client) -> None:
        for fields, status, code, param in REFUSED:
            body = json.dumps({"text": TEXT, "policy": POLICY, "budget": 128, **fields})
            answer = await client.post("/v1/contexts", content=body, headers={"content-type": "application/json"})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
            assert error["request_id"] == answer.headers["x-request-id"]

    with_client(app_of(tmp_path), ask)
    assert not list(tmp_path.iterdir())


def test_requests_on_contexts_that_cannot_be_honoured_are_refused(tmp_path: Path) -> None:
    async def ask(client: Client) -> None:
        name = (await make(client))["id"]
        changed = TEXT.replace("1712", "1812").rstrip()
        for body, code, param, why in (
            (question(winnow_context="../../etc/passwd"), "invalid_value", "winnow_context", "is no context's id"),
            (question(winnow_context=name, winnow={"context": "0" * 32}), "invalid_value", "winnow_context", "contradicts"),
            (question(winnow_context=name, winnow={"policy": "snapkv"}), None, None, "was compressed when it was read"),
            (question(f"{changed}\n\n{QUESTION}", winnow_context=name), "invalid_value", "messages", "begins with"),
            (question(" ", winnow_context=name), "invalid_value", "messages", "the question is empty"),
        ):
            answer = await client.post("/v1/chat/completions", json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, code, param), answer.text
            assert why in error["message"]
        for path in ("..%2F..%2Fetc%2Fpasswd", "A" * 32, "x"):
            for answer in (await client.get(f"/v1/contexts/{path}"), await client.delete(f"/v1/contexts/{path}")):
                assert answer.status_code in (400, 404)

    with_client(app_of(tmp_path), ask)


def test_a_server_without_a_store_keeps_no_contexts() -> None:
    async def ask(client: Client) -> None:
        for answer in (
            await client.get("/v1/contexts"),
            await client.post("/v1/contexts", json={"text": TEXT}),
            await client.post("/v1/chat/completions", json=question(winnow_context="0" * 32)),
        ):
            assert answer.status_code == 404
            assert "keeps no contexts" in answer.json()["error"]["message"]

    with_client(tiny_app(letters()), ask)


def test_keys_see_their_own_contexts_and_the_operators(tmp_path: Path) -> None:
    anne, bert = map(bearer, KEYS)
    export_context(wk.read(built("llama"), ChatLetters(), "By the operator. " * 20, POLICY, 128), tmp_path)

    async def ask(client: Client) -> None:
        made = await make(client, headers=anne)
        assert (tmp_path / owner_name(KEYS[0]) / f"{made['id']}.context").exists()
        lists = [(await client.get("/v1/contexts", headers=key)).json()["data"] for key in (anne, bert)]
        assert [[one["shared"] for one in each] for each in lists] == [[False, True], [True]]
        (operators,) = lists[1]
        for method, path, body in (
            ("GET", f"/v1/contexts/{made['id']}", None),
            ("DELETE", f"/v1/contexts/{made['id']}", None),
            ("POST", "/v1/chat/completions", question(winnow_context=made["id"])),
        ):
            assert (await client.request(method, path, json=body, headers=bert)).status_code == 404
        refused = await client.delete(f"/v1/contexts/{operators['id']}", headers=bert)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_yours")
        body = question(winnow_context=operators["id"])
        assert (await client.post("/v1/chat/completions", json=body, headers=bert)).status_code == 200
        assert (await client.get("/v1/contexts")).status_code == 401
        assert (await client.delete(f"/v1/contexts/{made['id']}", headers=anne)).status_code == 200

    with_client(app_of(tmp_path, api_keys=KEYS), ask)


def test_a_chat_that_begins_with_a_context_goes_on_from_it_if_the_server_does_so(tmp_path: Path) -> None:
    """Its own key's or the operator's and no other key's, and not with a policy of its own."""
    anne, bert = map(bearer, KEYS)
    whole = f"{TEXT.rstrip()}\n\n{QUESTION}"

    def context_of(answer: httpx.Response) -> str | None:
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["winnow"]["context"]

    async def ask(client: Client) -> None:
        async def chat(key: dict[str, str], text: str = whole, **fields: Any) -> httpx.Response:
            return await client.post("/v1/chat/completions", json=question(text, **fields), headers=key)

        short = await make(client, TEXT[: len(TEXT) // 2], headers=anne, budget=1.0)
        made = await make(client, headers=anne, portable=False)
        named = await chat(anne, winnow_context=made["id"])
        begun = await chat(anne)
        assert context_of(begun) == made["id"] != short["id"]
        assert begun.json()["choices"] == named.json()["choices"]
        assert context_of(await chat(bert)) is None
        assert context_of(await chat(anne, winnow={"policy": "full"})) is None
        assert context_of(await chat(anne, "Another question?")) is None
        assert context_of(await chat(anne, TEXT.rstrip() + "!")) == made["id"]

    with_client(app_of(tmp_path / "store", api_keys=KEYS, context_auto=True), ask)

    async def never(client: Client) -> None:
        await make(client)
        assert context_of(await client.post("/v1/chat/completions", json=question(whole))) is None

    with_client(app_of(tmp_path / "other"), never)


def test_a_context_that_cannot_be_read_does_not_fail_a_plain_chat(tmp_path: Path) -> None:
    async def ask(client: Client) -> None:
        made = await make(client)
        (file,) = tmp_path.glob("*.context")
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        body = question(f"{TEXT.rstrip()}\n\n{QUESTION}")
        answer = await client.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["usage"]["winnow"]["context"]) == (200, None)
        named = await client.post("/v1/chat/completions", json=question(winnow_context=made["id"]))
        assert (named.status_code, named.json()["error"]["code"]) == (500, "context_damaged")
        assert named.json()["error"]["request_id"]

    with_client(app_of(tmp_path, context_auto=True), ask)


def test_limits_of_disk_and_memory_are_told(tmp_path: Path) -> None:
    async def disk(client: Client) -> None:
        made = await make(client)
        answer = await client.post("/v1/contexts", json={"text": f"More. {TEXT}", "policy": POLICY, "budget": 128})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (507, "store_full")
        assert "delete one with DELETE" in error["message"]
        assert (await client.get("/v1/contexts")).json()["data"][0]["id"] == made["id"]
        await client.delete(f"/v1/contexts/{made['id']}")
        await make(client, f"More. {TEXT}")

    with_client(app_of(tmp_path, context_disk="128KiB"), disk)

    async def memory(client: Client) -> None:
        answer = await client.post("/v1/contexts", json={"text": TEXT, "policy": POLICY, "budget": 128})
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "context_too_large")

    with_client(app_of(tmp_path / "new", context_memory="10KiB"), memory)


def test_a_full_disk_is_told_and_the_server_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(files: Any, path: str, data: bytes, fail: Any) -> None:
        raise fail("cannot be written: No space left on device")

    async def ask(client: Client) -> None:
        for portable, module in ((True, "store"), (False, "saved")):
            with monkeypatch.context() as patch:
                patch.setattr(f"winnowkv.contexts.{module}.write_whole", full)
                body = {"text": TEXT, "policy": POLICY, "budget": 128, "portable": portable}
                answer = await client.post("/v1/contexts", json=body)
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (507, "store_failed")
                assert "No space left on device" in error["message"]
                assert str(tmp_path) not in error["message"]
            await make(client, portable=portable)

    with_client(app_of(tmp_path), ask)


def test_a_text_that_is_too_large_for_the_engine_is_refused(tmp_path: Path) -> None:
    async def ask(client: Client) -> None:
        answer = await client.post("/v1/contexts", json={"text": TEXT, "policy": POLICY, "budget": 128})
        assert answer.status_code == 400
        assert "bytes of keys and values, kv_memory is" in answer.json()["error"]["message"]

    with_client(app_of(tmp_path, letters(kv_memory="64KiB")), ask)


def test_requests_decode_while_a_text_is_read(tmp_path: Path) -> None:
    """Tokens of a stream come between the layers of the document's forward pass."""
    engine = letters(interleave=16)
    layers: list[str] = []

    async def ask(client: Client) -> None:
        body = question("Say something long.", max_tokens=60, ignore_eos=True)
        stream = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await make(client)
        answer = await stream
        assert answer.json()["usage"]["completion_tokens"] == 60

    step = engine._decode

    def noting(rows: Any) -> Any:
        layers.append("job" if engine._scheduler._job is not None else "step")
        return step(rows)

    engine._decode = noting  # type: ignore[method-assign]
    with_client(app_of(tmp_path, engine), ask)
    assert "job" in layers


def test_a_context_may_leave_the_memory_as_soon_as_its_question_is_read(tmp_path: Path) -> None:
    """While the answer is still being generated; what is held in memory is told among the metrics."""
    engine = letters()
    app = app_of(tmp_path, engine)

    async def ask(client: Client) -> None:
        made = await make(client)
        contexts, gate = app.state.serving.prompts.contexts, Gate(engine, 2)
        body = question(winnow_context=made["id"], max_tokens=30, ignore_eos=True)
        answer = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        while not any(ticket.generated for ticket in app.state.serving.loop._tickets):
            await asyncio.sleep(0)
        assert not answer.done()
        (held,) = contexts._held.values()
        assert (held.uses, contexts.used_bytes) == (0, held.size)
        metrics = (await client.get("/metrics")).text
        assert f"winnow_context_bytes {float(held.size)}" in metrics
        assert "winnow_context_reads 1.0" in metrics
        gate.open()
        assert (await answer).json()["usage"]["completion_tokens"] == 30

    with_client(app, ask)


def test_a_client_that_leaves_stops_the_reading(tmp_path: Path) -> None:
    app = app_of(tmp_path)

    async def leave() -> None:
        async with asking(app) as client:
            gate = Gate(app.state.serving.engine)
            task = asyncio.create_task(client.post("/v1/contexts", json={"text": TEXT, "policy": POLICY, "budget": 128}))
            while not app.state.serving.loop._jobs:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while app.state.serving.loop._jobs:
                await asyncio.sleep(0)
            gate.open()
            await make(client, f"Then. {TEXT}")
            assert app.state.serving.prompts.contexts.used_bytes == 0

    asyncio.run(leave())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_store_of_another_model_is_listed_and_not_served(tmp_path: Path) -> None:
    other = built("qwen2")
    doc = wk.read(other, ChatLetters(), TEXT, POLICY, 128)
    context = export_context(doc, tmp_path)

    async def ask(client: Client) -> None:
        answer = await client.post("/v1/chat/completions", json=question(winnow_context=context.id))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_of_another_model")

    with_client(app_of(tmp_path), ask)
