"""Every field of a request is honoured, changes no answer, or is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from support.serving import MODEL, ask, chat, tiny_app, with_client, words

TEXT = words(30)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def answers(bodies: list[Any], path: str = CHAT) -> list[httpx.Response]:
    """The answer to each body."""

    async def each(client: httpx.AsyncClient) -> list[httpx.Response]:
        headers = {"content-type": "application/json"}
        datas = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
        return [await client.post(path, content=data, headers=headers) for data in datas]

    return with_client(tiny_app(max_new_tokens=64, max_rows=4), each)


def test_what_changes_no_answer_is_accepted() -> None:
    plain, *others = answers(
        [
            chat(TEXT),
            chat(TEXT, user="me", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="x"),
            chat(TEXT, prompt_cache_key="k", parallel_tool_calls=True, prediction={"type": "content", "content": "x"}),
            chat(TEXT, tools=[], tool_choice="none", functions=None, response_format={"type": "text"}, logit_bias={}),
            chat(TEXT, presence_penalty=0, frequency_penalty=0.0, best_of=1, stop=None, seed=None, n=None, winnow=None),
            chat(TEXT, stop="", top_k=-1, modalities=["text"], audio=None, reasoning_effort=None, stream=None),
            chat(TEXT, max_tokens=None, max_completion_tokens=6),
            chat(TEXT) | {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}], "name": None}]},
            chat(TEXT) | {"messages": [{"role": "developer", "content": TEXT}]},
        ]
    )
    assert plain.status_code == 200
    for other in others:
        assert other.status_code == 200, other.text
        assert other.json()["choices"] == plain.json()["choices"]


def test_an_answer_of_openais_client_can_be_sent_back() -> None:
    said = {"role": "assistant", "content": "w5", "refusal": None, "annotations": None, "audio": None, "tool_calls": None}
    messages = [{"role": "user", "content": TEXT}, said, {"role": "user", "content": "w9"}]
    (answer,) = answers([chat(TEXT) | {"messages": messages}])
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("functions", [{}]), ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}), ("logit_bias", {"5": 1}), ("presence_penalty", 0.5),
        ("frequency_penalty", -1), ("best_of", 2), ("audio", {}), ("modalities", ["audio"]), ("reasoning_effort", "high"),
        ("web_search_options", {}), ("stop_token_ids", [3]), ("repetition_penalty", 1.1), ("min_p", 0.1), ("verbosity", "low"),
        ("stream_options", {"include_usage": True}), ("top_logprobs", 2), ("max_completion_tokens", 5), ("max_tokens", 65),
        ("max_tokens", 0), ("n", 5), ("n", 0), ("temperature", 3), ("temperature", "1"), ("temperature", True), ("top_p", 0),
        ("seed", -1), ("seed", 10**30), ("stop", ["a"] * 17), ("stop", [""]), ("messages", []), ("messages", "w1"),
        ("min_tokens", 7), ("model", "other"), ("unheard_of", 1), ("stream", "yes"), ("winnow_context", "abc"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(field: str, value: Any) -> None:
    (answer,) = answers([chat(TEXT, **{field: value})])
    error = answer.json()["error"]
    assert answer.status_code == (404 if field in ("model", "winnow_context") else 400)
    named = {"max_completion_tokens": "max_tokens"}.get(field, field)
    assert error["param"].startswith(named)
    assert field in error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "w1", "tool_call_id": "x"}, "messages"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}, "messages"),
        ({"role": "user", "content": [{"type": "text", "text": "w1", "more": 1}]}, "messages[0].content[0].more"),
        ({"role": "user", "content": "w1", "name": "me"}, "name"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": "w1 \ud800"}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": "w1", "strange": 1}, "messages[0].strange"),
        ({"role": "king", "content": "w1"}, "messages[0].role"),
        ("w1", "messages[0]"),
    ],
)
def test_messages_that_are_no_text_are_refused(message: Any, param: str) -> None:
    (answer,) = answers([chat(TEXT) | {"messages": [message]}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    "prompt", [[], [[]], "", [5000], [-1], [1.5], ["w1", 5], [["w1"]], {"a": 1}, None, [True], ["w1", "\udc00"], [10**40]]
)
def test_prompts_that_are_none_are_refused(prompt: Any) -> None:
    (answer,) = answers([{"model": MODEL, "prompt": prompt}], COMPLETIONS)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", "w1"), ("logprobs", True), ("logprobs", 99)])
def test_what_completions_cannot_do_is_refused(field: str, value: Any) -> None:
    (answer,) = answers([{"model": MODEL, "prompt": TEXT, field: value}], COMPLETIONS)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("winnow", "param"),
    [
        ({"policy": "headkv:profile=/etc/passwd"}, "winnow.policy"),
        ({"policy": "headkv:profile=p.json"}, "winnow.policy"),
        ({"policy": "adakv:of=headkv:profile=p.json"}, "winnow.policy"),
        ({"policy": "../../etc"}, "winnow.policy"),
        ({"policy": "nosuch"}, "winnow.policy"),
        ({"policy": "snapkv:observe=x"}, "winnow.policy"),
        ({"budget": "auto:0.9:/etc/passwd"}, "winnow.budget"),
        ({"budget": "auto:0.9:p.json"}, "winnow.budget"),
        ({"budget": 0}, "winnow.budget"),
        ({"budget": 1.5}, "winnow.budget"),
        ({"budget": 3}, "winnow.budget"),
        ({"quality": "great"}, "winnow.quality"),
        ({"task": "dance"}, "winnow.task"),
        ({"lookahead": -1}, "winnow.lookahead"),
        ({"other": 1}, "winnow.other"),
    ],
)
def test_winnow_options_name_no_files_and_are_checked(winnow: Any, param: str) -> None:
    (answer,) = answers([chat(TEXT, winnow=winnow)])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_bodies_that_are_no_json_are_refused() -> None:
    bodies: list[Any] = [
        b"",
        b"{",
        b'{"model": "\xff"}',
        b"[" * 50_000,
        b"[]",
        b'"x"',
        b"null",
        b'{"n": 1' + b"0" * 5000 + b"}",
    ]
    for answer in answers([*bodies, b'{"model": "tiny", "messages": [], "temperature": NaN}']):
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_a_body_must_be_said_to_be_json() -> None:
    answer = ask(tiny_app(), json.dumps(chat(TEXT)).encode(), headers={"content-type": "text/plain"})
    assert answer.status_code == 400


def test_unknown_routes_and_methods_have_openais_form() -> None:
    async def look(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/v1/nothing"), await client.get(CHAT), await client.post("/v1/models")]

    found = with_client(tiny_app(), look)
    assert [one.status_code for one in found] == [404, 405, 405]
    assert [one.json()["error"]["code"] for one in found] == ["unknown_route", "unknown_method", "unknown_method"]
