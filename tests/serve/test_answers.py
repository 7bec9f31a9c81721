"""Answers equal those of the engine alone, whole and streamed, and have OpenAI's form."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from support.serving import MODEL, ask, asking, chat, chunks_of, tiny_app, tiny_engine, with_client, words
from winnowkv.engine.sampling import Sampling
from winnowkv.serve.objects import ChatChunk, ChatCompletion, TextCompletion

TEXT = words(60)
COMPLETIONS = "/v1/completions"


def alone(prompt: Any, **how: Any) -> Any:
    """The completion of a prompt in an engine of its own."""
    (done,) = tiny_engine().generate([prompt], Sampling(**{"max_new_tokens": 6, **how}))
    return done


def text_request(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6, **fields}


def test_a_chat_answer_is_what_the_engine_says_alone() -> None:
    truth = alone([{"role": "user", "content": TEXT}])
    answer = ask(tiny_app(), chat(TEXT))
    found = ChatCompletion.model_validate(answer.json())
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason, choice.logprobs) == (truth.text, "length", None)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (62, 6, 68)
    winnow, report = usage.winnow, truth.report
    assert (winnow.policy, winnow.budget) == (report.policy, 20)
    assert (winnow.kept_bytes, winnow.full_bytes) == (report.kept_bytes, report.full_bytes)
    assert (winnow.kept_entries.min, winnow.kept_entries.mean, winnow.kept_entries.max) == (20, 20, 20)
    assert 0 < winnow.seconds.queue < winnow.seconds.first_token < winnow.seconds.total
    assert answer.headers["x-request-id"].startswith("req-")


def test_a_streamed_answer_is_the_whole_one_in_pieces() -> None:
    truth = alone([{"role": "user", "content": TEXT}])
    answer = ask(tiny_app(), chat(TEXT, stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = [ChatChunk.model_validate(chunk) for chunk in chunks_of(answer.text)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == truth.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 6 + ["length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 7
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_any() -> None:
    assert all("usage" not in chunk for chunk in chunks_of(ask(tiny_app(), chat(TEXT, stream=True)).text))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_seeds_and_stops(stream: bool) -> None:
    how = {"temperature": 2.0, "seed": 5, "n": 3}
    truth = alone([{"role": "user", "content": TEXT}], **how)
    texts = [choice.text for choice in truth.choices]
    assert len(set(texts)) == 3
    stop = texts[1].split()[3]
    stopped = alone([{"role": "user", "content": TEXT}], stop=(stop,), **how)
    expected = {(one.index, one.text, one.finish_reason) for one in stopped.choices}
    assert (1, " ".join(texts[1].split()[:3]) + " ", "stop") in expected
    answer = ask(tiny_app(), chat(TEXT, stop=stop, stream=stream, **how))
    if not stream:
        found = {(one["index"], one["message"]["content"], one["finish_reason"]) for one in answer.json()["choices"]}
    else:
        each = [chunk["choices"][0] for chunk in chunks_of(answer.text)]
        found = {
            (index, "".join(one["delta"].get("content", "") for one in each if one["index"] == index),
             next(one["finish_reason"] for one in each if one["index"] == index and one["finish_reason"]))
            for index in range(3)
        }  # fmt: skip
    assert found == expected


def test_log_probabilities_of_chats() -> None:
    truth = alone([{"role": "user", "content": TEXT}], logprobs=2)
    whole = ask(tiny_app(), chat(TEXT, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
    streamed = chunks_of(ask(tiny_app(), chat(TEXT, logprobs=True, top_logprobs=2, stream=True)).text)
    entries = [entry for chunk in streamed for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert entries == whole
    assert [entry["token"] for entry in whole] == truth.text.split()
    assert [entry["bytes"] for entry in whole] == [list(word.encode()) for word in truth.text.split()]
    for entry, expected in zip(whole, truth.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
        assert [top["token"] for top in entry["top_logprobs"]] == [f"w{token}" for token, _ in expected.top]


def test_completions_take_texts_and_token_ids_one_or_several() -> None:
    ids = [int(word[1:]) for word in TEXT.split()]
    truth, other = alone(TEXT).text, alone(words(40, 5)).text
    for prompt, expected in (
        (TEXT, [truth]), (ids, [truth]), ([TEXT], [truth]), ([TEXT, words(40, 5)], [truth, other]), ([ids, ids], [truth] * 2)
    ):  # fmt: skip
        found = TextCompletion.model_validate(ask(tiny_app(), text_request(prompt), COMPLETIONS).json())
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == list(range(len(expected)))
        assert found.usage.completion_tokens == 6 * len(expected)
        assert found.usage.winnow.prompt_tokens == found.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_choices(stream: bool) -> None:
    prompts, how = [TEXT, words(40, 5)], {"temperature": 2.0, "seed": 5, "n": 2}
    expected = [choice.text for prompt in prompts for choice in alone(prompt, **how).choices]
    answer = ask(tiny_app(), text_request(prompts, stream=stream, logprobs=1, **how), COMPLETIONS)
    if not stream:
        choices = answer.json()["choices"]
        assert [choice["text"] for choice in choices] == expected
        offsets = choices[1]["logprobs"]["text_offset"]
        assert offsets[:2] == [0, len(choices[1]["logprobs"]["tokens"][0])]
        return
    each = [TextCompletion.model_validate(chunk).choices[0] for chunk in chunks_of(answer.text)]
    assert ["".join(one.text for one in each if one.index == index) for index in range(4)] == expected
    assert sum(len(one.logprobs.tokens) for one in each) == 4 * 6


def test_completions_have_openais_sixteen_tokens_by_default() -> None:
    body = text_request(TEXT)
    del body["max_tokens"]
    assert ask(tiny_app(), body, COMPLETIONS).json()["usage"]["completion_tokens"] == 16


def test_chats_have_the_servers_default_and_what_positions_leave() -> None:
    body = chat(TEXT)
    del body["max_tokens"]
    assert ask(tiny_app(default_new_tokens=7), body).json()["usage"]["completion_tokens"] == 7
    long = chat(words(1015))  # of 1,024 positions
    del long["max_tokens"]
    assert ask(tiny_app(default_new_tokens=100), long).json()["usage"]["completion_tokens"] == 1024 - 1017


def test_a_request_has_its_own_policy_and_budget() -> None:
    answer = ask(tiny_app(), chat(TEXT, winnow={"policy": "streaming", "budget": 0.5})).json()
    truth = tiny_engine(policy="streaming", budget=0.5).generate([[{"role": "user", "content": TEXT}]], Sampling(6))[0]
    assert answer["choices"][0]["message"]["content"] == truth.text
    winnow = answer["usage"]["winnow"]
    assert (winnow["policy"], winnow["budget"], winnow["kept_entries"]["mean"]) == ("streaming", 0.5, 31)


def test_short_prompts_are_kept_whole_unless_the_request_says_otherwise() -> None:
    app = tiny_app(keep_whole=62)
    winnow = ask(app, chat(TEXT)).json()["usage"]["winnow"]
    assert (winnow["policy"], winnow["kept_entries"]["mean"]) == ("full", 62)
    assert any("62 are kept whole" in note for note in winnow["notes"])
    for other in (chat(TEXT + " w5"), chat(TEXT, winnow={"budget": 20})):
        assert ask(tiny_app(keep_whole=62), other).json()["usage"]["winnow"]["kept_entries"]["mean"] == 20


def test_lookahead_is_an_option_of_the_requests_policy() -> None:
    answer = ask(tiny_app(), chat(TEXT, winnow={"lookahead": 2}))
    winnow = answer.json()["usage"]["winnow"]
    assert winnow["policy"] == "snapkv:observe=8:kernel=3:lookahead=2"
    assert any("the first 2 tokens are the full cache's" in note for note in winnow["notes"])


def test_many_requests_at_once_are_each_what_they_are_alone() -> None:
    prompts = [words(30 + 5 * at, at) for at in range(12)]
    truth = [alone(prompt, max_new_tokens=9).text for prompt in prompts]

    async def all_at_once(client: httpx.AsyncClient) -> list[str]:
        bodies = [text_request(prompt, max_tokens=9, stream=bool(at % 2)) for at, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))
        return [
            "".join(chunk["choices"][0]["text"] for chunk in chunks_of(one.text))
            if at % 2
            else one.json()["choices"][0]["text"]
            for at, one in enumerate(answers)
        ]

    assert with_client(tiny_app(), all_at_once) == truth


def test_models_health_ready_and_openapi() -> None:
    async def look() -> None:
        async with asking(tiny_app()) as client:
            (card,) = (await client.get("/v1/models")).json()["data"]
            assert (card["id"], card["max_model_len"]) == (MODEL, 1024)
            assert (await client.get(f"/v1/models/{MODEL}")).json() == card
            assert (await client.get("/v1/models/other/one")).json()["error"]["code"] == "model_not_found"
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/ready")).json() == {"status": "ready"}
            page = (await client.get("/openapi.json")).json()
            for path in ("/v1/chat/completions", "/v1/completions"):
                answers = page["paths"][path]["post"]["responses"]
                assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= set(answers)
                assert "422" not in answers
                assert answers["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
                assert "text/event-stream" in answers["200"]["content"]

    asyncio.run(look())
