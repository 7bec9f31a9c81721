"""``winnow.explain``: an answer says which tokens of its prompt were kept, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from support.serving import ask, chat, chunks_of, tiny_app, tiny_engine, words
from winnowkv.engine.sampling import Sampling
from winnowkv.serve import kept
from winnowkv.serve.objects import ChatCompletion, KeptPrompt

TEXT = words(60)
MESSAGES = [{"role": "user", "content": TEXT}]


def explained(**winnow: Any) -> dict[str, Any]:
    return {"winnow": {"explain": True, **winnow}}


def truth() -> dict[str, Any]:
    """What the engine alone says."""
    engine = tiny_engine()
    request = engine.submit(MESSAGES, Sampling(max_new_tokens=6), explain=True)
    while request.completion is None:
        engine.step()
    assert request.completion.kept is not None
    return request.completion.kept.to_dict()


def test_an_answer_says_what_was_kept() -> None:
    found = ChatCompletion.model_validate(ask(tiny_app(), chat(TEXT, **explained())).json()).winnow_kept
    assert found is not None
    assert found.model_dump(exclude={"texts"}) == truth()
    assert len(found.texts) == found.tokens == 62
    assert "".join(found.texts) == f"w1 {TEXT} w2"
    assert {count for layer in found.entries for count in layer} == {20}


def test_the_last_chunk_of_a_stream_says_what_was_kept() -> None:
    for options, fields in (({}, False), ({"stream_options": {"include_usage": True}}, True)):
        *chunks, last = chunks_of(ask(tiny_app(), chat(TEXT, stream=True, **explained(), **options)).text)
        assert not any("winnow_kept" in chunk for chunk in chunks)
        assert KeptPrompt.model_validate(last["winnow_kept"]).model_dump(exclude={"texts"}) == truth()
        assert (last["choices"], "usage" in last) == ([], fields)


def test_nobody_who_does_not_ask_is_told() -> None:
    assert "winnow_kept" not in ask(tiny_app(), chat(TEXT)).json()
    assert "winnow_kept" not in ask(tiny_app(), chat(TEXT, **explained() | {"winnow": {"explain": False}})).json()


def test_an_answer_that_ends_before_anything_was_chosen_says_so() -> None:
    answer = ask(tiny_app(), chat(TEXT, **explained(policy="snapkv:observe=8:kernel=3", lookahead=10)))
    assert answer.json()["winnow_kept"] is None


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("chat/completions", {"n": 2}, "of one prompt and one choice, and 2 were asked for"),
        ("completions", {"prompt": ["w1 w2", "w3 w4", "w5"]}, "of one prompt and one choice, and 3 were asked for"),
        ("chat/completions", {"winnow_context": "wk-1"}, "of a stored context was chosen when it was stored"),
        ("chat/completions", {}, "the prompt has 62 tokens, winnow.explain takes at most 61"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    path: str, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_EXPLAINED", 61)
    body = {**chat(TEXT, **explained()), **fields}
    if "prompt" in body:
        del body["messages"]
    answer = ask(tiny_app(), body, path=f"/v1/{path}")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "winnow.explain"
    assert message in error["message"]
    assert error["message"].endswith(("one by one", "leave explain out"))
