"""Requests on contexts before vLLM reads them: whole prompts and questions give the same ids, everything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import winnowkv as wk
from support.contexts import TEXT, drawn_context
from support.tokenizers import ChatLetters, Letters, byte_tokenizer
from winnowkv.contexts.context import Context
from winnowkv.contexts.store import ContextStore
from winnowkv.integrations.vllm.requests import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    REFUSED,
    Contexts,
    RefusedError,
    Served,
    rewritten,
    template_options,
)
from winnowkv.prompt.chat import apply_template, user_message

QUESTION = "Who wrote it?"
ASKED = f"{TEXT}\n\n{QUESTION}"
SYSTEM = "You are a librarian."
SERVED = Served(frozenset({"base"}), frozenset({"lora"}), 1000, {"architecture": "Tiny"})


@pytest.fixture
def store(tmp_path: Path) -> ContextStore:
    return ContextStore(tmp_path / "store")


def sent(
    store: ContextStore, path: str, body: dict[str, Any], tokenizer: Any = None, served: Served = SERVED
) -> dict[str, Any]:
    return rewritten(path, body, Contexts(store), lambda options: tokenizer or ChatLetters(), served)


def ids_of(context: Context, body: dict[str, Any]) -> list[int]:
    """The ids that follow the placeholders in a body that vLLM is sent, chat or not."""
    params = body["kv_transfer_params"]
    ids = params.get("prompt_token_ids") or body["prompt"]
    assert params["winnow_context"] == context.id
    assert body["cache_salt"] == context.salt
    assert "winnow_context" not in body
    assert ids[: context.kept] == context.placeholders
    return ids[context.kept :]


def test_a_question_and_the_whole_prompt_become_the_same_request(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters())
    expected = context.ask(ChatLetters(), QUESTION).ids[context.kept :]
    for said in (QUESTION, ASKED, f"  {QUESTION}\n"):
        chat = {"model": "base", "messages": user_message(said), "winnow_context": context.id, "temperature": 0}
        new = sent(store, CHAT_PATH, chat)
        assert ids_of(context, new) == expected, said
        assert {name: new[name] for name in ("model", "messages", "temperature")} == {
            name: chat[name] for name in ("model", "messages", "temperature")
        }
    whole = apply_template(ChatLetters(), user_message(ASKED))
    for prompt in (QUESTION, [QUESTION], "<u>" + ASKED + "|<a>", whole, expected, [expected]):
        new = sent(store, COMPLETIONS_PATH, {"prompt": prompt, "winnow_context": context.id, "max_tokens": 4})
        assert ids_of(context, new) == expected, prompt
        assert new["max_tokens"] == 4


def test_parts_of_text_are_joined(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters())
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "wrote it?"}]
    new = sent(store, CHAT_PATH, {"messages": user_message(parts), "winnow_context": context.id})
    assert ids_of(context, new) == context.ask(ChatLetters(), "Who\nwrote it?").ids[context.kept :]


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_later_turns_follow_the_first_question(store: ContextStore, system: str | None) -> None:
    context = drawn_context(store.place, ChatLetters(), system=system)
    before = [] if system is None else [{"role": "system", "content": system}]
    later = [{"role": "assistant", "content": "Mary Lund"}, *user_message("When?")]
    whole = apply_template(ChatLetters(), [*before, *user_message(ASKED), *later])
    for messages in ([*before, *user_message(QUESTION), *later], [*user_message(QUESTION), *later],
                     [*before, *user_message(ASKED), *later]):  # fmt: skip
        new = sent(store, CHAT_PATH, {"messages": messages, "winnow_context": context.id})
        assert list(context.tokens) + ids_of(context, new) == whole


@pytest.mark.parametrize("stored", [None, "You are a judge."])
def test_a_system_message_with_which_the_document_was_not_stored_is_refused(store: ContextStore, stored: str | None) -> None:
    context = drawn_context(store.place, ChatLetters(), system=stored)
    messages = [{"role": "system", "content": SYSTEM}, *user_message(QUESTION)]
    with pytest.raises(RefusedError, match=r"'system' message stands before the document.*--system"):
        sent(store, CHAT_PATH, {"messages": messages, "winnow_context": context.id})


def test_a_prompt_that_changes_the_document_is_refused(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters())
    changed = ASKED.replace("Mary", "Anna")
    at = len("<u>") + changed.index("Anna")
    for path, body in (
        (CHAT_PATH, {"messages": user_message(changed)}),
        (COMPLETIONS_PATH, {"prompt": f"<u>{changed}"}),
        (COMPLETIONS_PATH, {"prompt": list(context.tokens[:at])}),
    ):
        with pytest.raises(RefusedError, match=f"of the document's {context.seen} tokens it begins with {at}"):
            sent(store, path, {**body, "winnow_context": context.id})
    with pytest.raises(RefusedError, match="the prompt is the document alone"):
        sent(store, COMPLETIONS_PATH, {"prompt": list(context.tokens), "winnow_context": context.id})
    closed = sent(store, CHAT_PATH, {"messages": user_message(TEXT), "winnow_context": context.id})
    assert ids_of(context, closed) == ChatLetters()("|<a>").input_ids  # a message that is the document alone is a whole prompt


def test_a_document_after_something_else_is_refused(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters())
    for messages in (user_message(f"Read this. {ASKED}"), [*user_message(QUESTION), *user_message(TEXT)]):
        with pytest.raises(RefusedError, match=r"holds the document .* put it first, unchanged, or send what follows it alone"):
            sent(store, CHAT_PATH, {"messages": messages, "winnow_context": context.id})


def test_a_question_may_quote_the_document(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters())
    question = f"Is it true? {TEXT[20:-20]}"
    new = sent(store, CHAT_PATH, {"messages": user_message(question[:80]), "winnow_context": context.id})
    assert ids_of(context, new) == context.ask(ChatLetters(), question[:80]).ids[context.kept :]


def test_a_question_may_begin_as_the_document_does(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters())
    question = "The archive of Oakham: how old?"
    new = sent(store, CHAT_PATH, {"messages": user_message(question), "winnow_context": context.id})
    assert ids_of(context, new) == context.ask(ChatLetters(), question).ids[context.kept :]


def test_text_that_was_stored_as_it_is_is_asked_at_completions_alone(store: ContextStore) -> None:
    tokenizer = Letters()
    context = drawn_context(store.place, tokenizer, chat=False)
    expected = tokenizer(f"\n\n{QUESTION}").input_ids
    for prompt in (QUESTION, ASKED, tokenizer(ASKED).input_ids):
        new = sent(store, COMPLETIONS_PATH, {"prompt": prompt, "winnow_context": context.id}, tokenizer)
        assert ids_of(context, new) == expected
    with pytest.raises(RefusedError, match="stored without the chat template: ask it at /v1/completions"):
        sent(store, CHAT_PATH, {"messages": user_message(QUESTION), "winnow_context": context.id})


def test_a_token_before_the_text_is_the_documents(store: ContextStore) -> None:
    tokenizer = byte_tokenizer(bos=True)
    context = drawn_context(store.place, tokenizer, chat=False)
    body = {"prompt": ASKED, "winnow_context": context.id}
    expected = tokenizer(f"\n\n{QUESTION}", add_special_tokens=False).input_ids
    assert ids_of(context, sent(store, COMPLETIONS_PATH, body, tokenizer)) == expected
    for other in ({"add_special_tokens": False}, {"prompt": tokenizer(ASKED, add_special_tokens=False).input_ids}):
        with pytest.raises(RefusedError, match=r"holds the document .* \(with another first token"):
            sent(store, COMPLETIONS_PATH, {**body, **other}, tokenizer)


ASKED_FOR = {
    "prompt_logprobs": 0, "echo": True, "return_prompt_text": True, "truncate_prompt_tokens": -1, "prompt_embeds": "x",
    "suffix": "", "use_beam_search": True, "tools": [{"type": "function"}], "documents": [{"text": "x"}],
    "continue_final_message": True, "add_generation_prompt": False, "cache_salt": "mine", "kv_transfer_params": {},
}  # fmt: skip
HARMLESS = {
    "prompt_logprobs": None, "echo": False, "return_prompt_text": None, "truncate_prompt_tokens": None, "prompt_embeds": None,
    "suffix": None, "use_beam_search": False, "tools": [], "documents": None, "continue_final_message": False,
    "add_generation_prompt": True, "cache_salt": None, "kv_transfer_params": None,
}  # fmt: skip


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETIONS_PATH])
def test_fields_that_cannot_be_honoured_are_refused_by_name(store: ContextStore, path: str) -> None:
    context = drawn_context(store.place, ChatLetters())
    body = {"messages": user_message(QUESTION), "prompt": QUESTION, "winnow_context": context.id}
    assert set(ASKED_FOR) == set(HARMLESS) == set(REFUSED)
    for field, value in ASKED_FOR.items():
        with pytest.raises(RefusedError, match=f"^{field}=.* cannot be honoured on a context: .*: ") as refused:
            sent(store, path, {**body, field: value})
        assert refused.value.field == field
    assert sent(store, path, {**body, **HARMLESS})["cache_salt"] == context.salt


@pytest.mark.parametrize(
    ("body", "field", "why"),
    [
        ({"messages": []}, "messages", "give a list with a message of the user"),
        ({"messages": "hello"}, "messages", "give a list with a message of the user"),
        ({}, "messages", "messages None"),
        ({"messages": [{"content": "x"}]}, "messages", "has no role"),
        ({"messages": user_message([{"type": "image_url", "image_url": {"url": "x"}}])}, "messages", "text alone"),
        ({"messages": user_message(None)}, "messages", "content None"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "no message of the user"),
        ({"messages": user_message("  ")}, "messages", "the question is empty"),
        ({"messages": user_message("x"), "model": "lora"}, "model", "'lora' is a LoRA adapter"),
        ({"messages": user_message("x"), "model": "other"}, "model", "'other' does not exist: there is base"),
        ({"messages": user_message("x"), "add_special_tokens": True}, "add_special_tokens", "before the document"),
        ({"messages": user_message("x"), "max_tokens": 990}, "max_tokens", "8 entries .* 990 new ones pass .* 1000 tokens"),
        ({"messages": user_message("x"), "max_completion_tokens": 990}, "max_completion_tokens", "990 new ones"),
        ({"messages": user_message("x" * 1000)}, "messages", "and 1 new ones pass the server's 1000 tokens"),
        ({"messages": user_message("x"), "winnow_context": "f" * 32}, "winnow_context", "no context f+ in the server's store"),
        ({"messages": user_message("x"), "winnow_context": "../../etc"}, "winnow_context", "is no context's id"),
        ({"messages": user_message("x"), "winnow_context": ["a"]}, "winnow_context", "is no context's id"),
    ],
)  # fmt: skip
def test_chat_requests_that_are_refused(store: ContextStore, body: dict[str, Any], field: str, why: str) -> None:
    context = drawn_context(store.place, ChatLetters())
    with pytest.raises(RefusedError, match=why) as refused:
        sent(store, CHAT_PATH, {"winnow_context": context.id, **body})
    assert refused.value.field == field
    assert refused.value.status == (404 if "does not exist" in why else 400)


@pytest.mark.parametrize("prompt", [None, ["a", "b"], [[1], [2]], [True], {"a": 1}, [], "", " "])
def test_completions_take_one_prompt(store: ContextStore, prompt: Any) -> None:
    context = drawn_context(store.place, ChatLetters())
    with pytest.raises(RefusedError, match=r"one text, or the token ids|no token follows|question is empty") as refused:
        sent(store, COMPLETIONS_PATH, {"prompt": prompt, "winnow_context": context.id})
    assert refused.value.field == "prompt"


def test_a_context_of_another_model_is_refused(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters(), model={"architecture": "Other"})
    body = {"messages": user_message(QUESTION), "winnow_context": context.id}
    with pytest.raises(RefusedError, match="of another model: its model's architecture is Other, here Tiny"):
        sent(store, CHAT_PATH, body)
    assert ids_of(context, sent(store, CHAT_PATH, body, served=Served()))  # the connector tells


def test_a_damaged_or_deleted_file_is_refused_without_the_stores_place(store: ContextStore) -> None:
    context = drawn_context(store.place, ChatLetters())
    other = drawn_context(store.place, ChatLetters(), kept=9, name="other")
    contexts = Contexts(store)
    body = {"messages": user_message(QUESTION), "winnow_context": context.id}
    rewritten(CHAT_PATH, body, contexts, lambda options: ChatLetters(), SERVED)
    file = Path(store.place) / f"{context.id}.context"
    data = file.read_bytes()
    file.write_bytes(data[:4] + b"\xff" + data[5:])
    fresh = Contexts(store)
    with pytest.raises(RefusedError, match="cannot be used, the server's log says why") as refused:
        rewritten(CHAT_PATH, body, fresh, lambda options: ChatLetters(), SERVED)
    assert store.place not in str(refused.value)
    rows = {row["id"]: row for row in fresh.listed()}
    assert "cannot be used" in rows[context.id]["error"]
    assert rows[other.id] == {"object": "context", **other.to_dict()}
    store.remove(other.id)
    file.unlink()
    with pytest.raises(RefusedError, match="no context"):
        rewritten(CHAT_PATH, body, contexts, lambda options: ChatLetters(), SERVED)
    assert contexts.listed() == []


def test_a_request_says_to_its_template_what_it_would_without_a_context() -> None:
    assert template_options({"messages": [], "temperature": 0}) == {}
    assert template_options({"chat_template": "x", "chat_template_kwargs": {"a": 1}}) == {
        "chat_template": "x", "chat_template_kwargs": {"a": 1},
    }  # fmt: skip
    assert template_options({"reasoning_effort": "none"}) == {
        "chat_template_kwargs": {"reasoning_effort": "none", "enable_thinking": False}
    }
    assert template_options({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}) == {
        "chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": False}
    }


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_a_real_template_gives_what_it_gives_for_the_whole_prompt(store: ContextStore, system: str | None) -> None:
    _, tokenizer = wk.load("embedded", device="cpu")
    context = drawn_context(store.place, tokenizer, TEXT * 3, system=system)
    before = [] if system is None else [{"role": "system", "content": system}]
    later = [{"role": "assistant", "content": "Mary Lund"}, *user_message("When?")]
    for after in ([], later):
        whole = apply_template(tokenizer, [*before, *user_message(f"{TEXT * 3}\n\n{QUESTION}"), *after])
        for messages in ([*before, *user_message(QUESTION), *after], [*user_message(QUESTION), *after],
                         [*before, *user_message(f"{TEXT * 3}\n\n{QUESTION}"), *after]):  # fmt: skip
            new = sent(store, CHAT_PATH, {"messages": messages, "winnow_context": context.id}, tokenizer)
            assert list(context.tokens) + ids_of(context, new) == whole
    other = [{"role": "system", "content": "Be a bear."}, *user_message(QUESTION)]
    with pytest.raises(RefusedError, match="stands before the document"):
        sent(store, CHAT_PATH, {"messages": other, "winnow_context": context.id}, tokenizer)
