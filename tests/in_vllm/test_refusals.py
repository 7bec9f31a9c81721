"""What cannot be served on a context fails by itself, in vLLM: never as text, and no request beside it is harmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm has an environment of its own")

from support.vllm_engine import Stored, engine, failed, generate, sampling, scheduler, tokens, worker
from winnowkv.contexts.store import ContextStore

LABEL = "snapkv-256"
Refusal = Callable[[Stored], tuple[dict[str, Any], Any]]


def named(context: str, **options: Any) -> Any:
    return sampling(**options, extra_args={"kv_transfer_params": {"winnow_context": context}})


def refusal(change: Callable[[Any], dict[str, Any]], **options: Any) -> Refusal:
    """A good request with other inputs, or with other sampling parameters."""

    def request(one: Stored) -> tuple[dict[str, Any], Any]:
        prompt = one.prompts[0]
        return {**prompt.inputs, **change(prompt)}, sampling(prompt, **options)

    return request


REFUSED: dict[str, Refusal] = {
    "prompt_logprobs": refusal(lambda prompt: {}, prompt_logprobs=1),
    "unknown": lambda one: (one.prompts[0].inputs, named("0" * 32)),
    "no id": lambda one: (one.prompts[0].inputs, named("../" + "0" * 29)),
    "cut off": refusal(lambda prompt: {"prompt_token_ids": prompt.ids[:100]}),
    "placeholders alone": refusal(lambda prompt: {"prompt_token_ids": prompt.ids[:256]}),
    "one token": refusal(lambda prompt: {"prompt_token_ids": prompt.ids[:1]}, max_tokens=1),
    "other placeholders": refusal(lambda prompt: {"prompt_token_ids": [1, *prompt.ids[1:]]}),
    "another salt": refusal(lambda prompt: {"cache_salt": "mine"}),
    "no salt": lambda one: ({"prompt_token_ids": one.prompts[0].ids}, sampling(one.prompts[0])),
    "salt alone, of a context that is gone": lambda one: (
        {"prompt_token_ids": one.prompts[0].ids, "cache_salt": "winnow:" + "0" * 64},
        sampling(),
    ),
}


@pytest.fixture(scope="module")
def llm(store: ContextStore, stored: dict[str, Stored]) -> Iterator[Any]:
    with engine(store) as llm:
        yield llm


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_fails_and_the_one_after_it_is_served(
    llm: Any, stored: dict[str, Stored], name: str, cold: bool
) -> None:
    """In one step with a good request on the same context that comes after it, whether its blocks are there or not."""
    one = stored[LABEL]
    llm.reset_prefix_cache()
    if not cold:
        generate(llm, one.prompts[:1])
    bad, good = generate(llm, [REFUSED[name](one), one.prompts[0]])
    assert failed(bad)
    assert not failed(good)
    assert tokens(good) == one.answers[0]


def test_all_refusals_at_once_leave_the_engine_as_it_was(llm: Any, stored: dict[str, Stored]) -> None:
    one = stored[LABEL]
    llm.reset_prefix_cache()
    for _ in range(2):
        outs = generate(llm, [*(make(one) for make in REFUSED.values()), *one.prompts])
        assert all(failed(out) for out in outs[:-2])
        assert [tokens(out) for out in outs[-2:]] == one.answers


def test_a_salt_alone_names_a_context(llm: Any, stored: dict[str, Stored]) -> None:
    """A front end may drop the parameters; the salt says that the ids are placeholders."""
    one = stored[LABEL]
    (out,) = generate(llm, [(one.prompts[0].inputs, sampling())])
    assert tokens(out) == one.answers[0]


def test_another_digest_as_salt_names_none(llm: Any, stored: dict[str, Stored]) -> None:
    """Salts are often hashes; a plain request with one is left alone."""
    whole = stored["full"].whole(0)
    (out,) = generate(llm, [({"prompt_token_ids": whole, "cache_salt": "5e" * 32}, sampling())])
    assert tokens(out) == stored["full"].answers[0]


def test_an_end_token_does_not_let_a_refused_token_pass(llm: Any, stored: dict[str, Stored]) -> None:
    """A prompt of one token can only fail in its second step: the first may not end it."""
    one = stored[LABEL]
    (first,) = generate(llm, [one.prompts[0].ids[:1]], max_tokens=1)
    end = tokens(first)[0]
    bad = (
        {**one.prompts[0].inputs, "prompt_token_ids": one.prompts[0].ids[:1]},
        sampling(one.prompts[0], stop_token_ids=[end]),
    )
    (out,) = generate(llm, [bad])
    assert failed(out)


def test_a_deleted_context_fails_only_its_requests(llm: Any, store: ContextStore, stored: dict[str, Stored]) -> None:
    """Before a request comes, and between its coming and its step; the file is put back for the other tests."""
    one, other = stored[LABEL], stored["second"]
    file = Path(store.place) / f"{one.context.id}.context"
    data = file.read_bytes()
    llm.reset_prefix_cache()
    try:
        file.unlink()
        outs = generate(llm, [one.prompts[0], other.prompts[0], stored["full"].whole(1), one.prompts[1]])
        assert [failed(out) for out in outs] == [True, False, False, True]
        assert tokens(outs[1]) == other.answers[0]
        assert tokens(outs[2]) == stored["full"].answers[1]
    finally:
        file.write_bytes(data)
    assert [tokens(out) for out in generate(llm, one.prompts)] == one.answers


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_file_that_cannot_be_read_in_the_step_fails_only_its_requests(
    llm: Any, store: ContextStore, stored: dict[str, Stored], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler still found it, the worker does not, or not whole."""
    one, other = stored[LABEL], stored["second"]
    file = Path(store.place) / f"{one.context.id}.context"
    data = file.read_bytes()
    llm.reset_prefix_cache()
    worker(llm)._memory._held.clear()
    planner = scheduler(llm).connector._scheduler
    checked = planner._checked

    def then_damaged(request: Any, asked: Any) -> Any:
        found = checked(request, asked)
        if found.id == one.context.id:
            file.unlink() if damage == "gone" else file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return found

    monkeypatch.setattr(planner, "_checked", then_damaged)
    try:
        outs = generate(llm, [one.prompts[0], other.prompts[0]])
        assert [failed(out) for out in outs] == [True, False]
        assert tokens(outs[1]) == other.answers[0]
    finally:
        monkeypatch.undo()
        file.write_bytes(data)
    assert [tokens(out) for out in generate(llm, one.prompts)] == one.answers
