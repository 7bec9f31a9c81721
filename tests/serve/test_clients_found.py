"""What clients that no one here wrote found in the server (examples/clients): schemathesis above all."""

from __future__ import annotations

import json
import logging
import re
from itertools import product
from typing import Any

import httpx
import pytest

from support.serving import MODEL, ask, chat, chunks_of, tiny_app, with_client, words
from winnowkv.serve.objects import ChatChunk, TextCompletion

TEXT = words(30)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REFUSED = 400


def found(**settings: Any) -> dict[str, Any]:
    """The OpenAPI document of a server."""

    async def read(client: httpx.AsyncClient) -> Any:
        return (await client.get("/openapi.json")).json()

    document: dict[str, Any] = with_client(tiny_app(**settings), read)
    return document


def text_request(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6, **fields}


def test_a_wrong_method_is_answered_with_those_that_are_served() -> None:
    async def call(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get(CHAT), await client.request("TRACE", "/v1/models")]

    answers = with_client(tiny_app(), call)
    assert [(one.status_code, one.headers.get("allow")) for one in answers] == [(405, "POST"), (405, "GET")]


@pytest.mark.parametrize("field", ["n", "max_tokens", "max_completion_tokens"])
def test_the_document_states_the_servers_own_limits(field: str) -> None:
    schema = found(max_rows=3, max_new_tokens=5)["components"]["schemas"]["ChatRequest"]["properties"]
    assert schema["model"]["enum"] == [MODEL]
    (most,) = {one["maximum"] for one in (schema[field], *schema[field].get("anyOf", ())) if "maximum" in one}
    body = chat(TEXT, max_tokens=2 if field == "n" else None)
    for value, status in ((most, 200), (most + 1, REFUSED)):
        answer = ask(tiny_app(max_rows=3, max_new_tokens=5), body | {field: value})
        assert answer.status_code == status, answer.text


def test_every_reference_of_the_document_leads_somewhere() -> None:
    document = found()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert {"ChatChunk", "ErrorAnswer"} <= names <= set(document["components"]["schemas"])


@pytest.mark.parametrize(("path", "chunk"), [(CHAT, ChatChunk), (COMPLETIONS, TextCompletion)])
def test_the_events_of_streams_are_as_the_document_says(path: str, chunk: Any) -> None:
    content = found()["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    end, data = content["itemSchema"]["properties"]["data"]["anyOf"]
    assert end == {"const": "[DONE]"}
    assert data["contentSchema"]["anyOf"][0]["$ref"].endswith(f"/{chunk.__name__}")
    fields = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 1 if path == COMPLETIONS else True}
    answer = ask(tiny_app(), {**(chat(TEXT) if path == CHAT else text_request(TEXT)), **fields}, path)
    for event in chunks_of(answer.text):
        chunk.model_validate(event)


def test_the_documents_examples_are_accepted() -> None:
    options = found()["components"]["schemas"]["WinnowOptions"]["properties"]
    pairs = list(product(options["policy"]["examples"], options["budget"]["examples"]))
    assert len(pairs) > 1
    for policy, budget in pairs:
        answer = ask(tiny_app(), chat(words(80), winnow={"policy": policy, "budget": budget}))
        assert answer.status_code == 200, answer.text


def test_whole_numbers_may_be_written_with_a_point() -> None:
    plain = text_request([5, 6, 7, 8], n=2, seed=3)
    pointed = plain | {"prompt": [5.0, 6, 7.0, 8.0], "n": 2.0, "seed": 3.0, "max_tokens": 6.0}
    first, second = (ask(tiny_app(), body, COMPLETIONS).json()["choices"] for body in (plain, pointed))
    assert first == second
    for field, value in (("n", 1.5), ("max_tokens", True), ("prompt", [5.5])):
        answer = ask(tiny_app(), plain | {field: value}, COMPLETIONS)
        assert answer.status_code == REFUSED
        assert answer.json()["error"]["param"].startswith(field)


def test_a_temperature_that_is_almost_0_is_0() -> None:
    greedy, almost = (ask(tiny_app(), chat(TEXT, temperature=value)).json()["choices"] for value in (0, 1e-9))
    assert greedy == almost


def test_no_likeliest_tokens_need_no_log_probabilities() -> None:
    (choice,) = ask(tiny_app(), chat(TEXT, top_logprobs=0)).json()["choices"]
    assert choice["logprobs"] is None


@pytest.mark.parametrize(
    ("body", "param", "words_of_it"),
    [
        (chat(TEXT, stop=["a"] * 17), "stop", ["at most 16"]),
        (chat(TEXT, min_tokens=7), "min_tokens", ["min_tokens=7", "max_tokens=6"]),
        (text_request(""), "prompt", ["at least 1 character"]),
        (text_request([]), "prompt", ["at least 1 item"]),
        (text_request([10**30]), "prompt[0]", ["less than"]),
    ],
)
def test_an_error_says_what_is_wrong_with_the_value(body: Any, param: str, words_of_it: list[str]) -> None:
    answer = ask(tiny_app(), body, COMPLETIONS if "prompt" in body else CHAT)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (REFUSED, param)
    for word in words_of_it:
        assert word in error["message"]


def test_the_log_says_why_if_the_answer_does_not(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("winnowkv.serve"), "propagate", True)  # the command turns it off
    with caplog.at_level(logging.INFO, "winnowkv.serve"):
        answer = ask(tiny_app(), chat(words(80), winnow={"policy": "snapkv", "budget": "auto:0.95"}))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (REFUSED, "unsupported_value")
    # Other tests may have given the logger a handler: then a record is caught twice.
    record = next(one for one in caplog.records if one.message == "refused" and one.request_id == error["request_id"])
    assert (record.request_id, record.kind) == (error["request_id"], "ProfileError")
    assert "profile" in record.why
    assert record.why not in error["message"]
