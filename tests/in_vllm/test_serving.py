"""Requests on contexts in an unmodified vLLM answer as our own cache with the same entries, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm has an environment of its own")

from support.vllm_engine import SETTINGS, Stored, engine, failed, generate, tokens, worker
from winnowkv.contexts.store import ContextStore

LABELS = [label for label, *_ in SETTINGS]


@pytest.fixture(scope="module")
def llm(store: ContextStore, stored: dict[str, Stored]) -> Iterator[Any]:
    with engine(store) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(store: ContextStore, stored: dict[str, Stored]) -> list[list[int]]:
    """What vLLM without the connector answers to the whole prompts of the first text."""
    with engine(None) as llm:
        return [tokens(out) for out in generate(llm, [stored["full"].whole(at) for at in range(2)])]


def test_all_entries_give_what_plain_vllm_gives(plain: list[list[int]], llm: Any, stored: dict[str, Stored]) -> None:
    """The whole document as a context: nothing is lost on the way through the store and the connector."""
    assert [tokens(out) for out in generate(llm, stored["full"].prompts)] == plain
    assert [tokens(out) for out in generate(llm, [stored["full"].whole(at) for at in range(2)])] == plain


@pytest.mark.parametrize("label", LABELS)
def test_each_context_answers_as_our_own_cache_with_the_same_entries(llm: Any, stored: dict[str, Stored], label: str) -> None:
    one = stored[label]
    for prompt, answer in zip(one.prompts, one.answers, strict=True):
        (out,) = generate(llm, [prompt])
        assert tokens(out) == answer
        assert out.num_cached_tokens >= one.context.kept // 128 * 128


def test_contexts_and_plain_requests_run_side_by_side(llm: Any, plain: list[list[int]], stored: dict[str, Stored]) -> None:
    """Two contexts of different texts, of the same text, and plain prompts in one batch, interleaved."""
    llm.reset_prefix_cache()
    requests: list[Any] = []
    expected = []
    for question in range(2):
        for label in LABELS:
            requests.append(stored[label].prompts[question])
            expected.append(stored[label].answers[question])
        requests.append(stored["full"].whole(question))
        expected.append(plain[question])
    assert [tokens(out) for out in generate(llm, requests)] == expected


def test_a_hundred_requests_on_one_context_read_it_once(llm: Any, stored: dict[str, Stored]) -> None:
    """Also where each must load it: the prefix cache is emptied in between."""
    one = stored["snapkv-250"]
    memory = worker(llm)._memory
    memory._held.clear()
    before = memory.reads
    for _ in range(4):
        llm.reset_prefix_cache()
        outs = generate(llm, one.prompts * 13)[:25]
        assert [tokens(out) for out in outs] == (one.answers * 13)[:25]
    assert memory.reads == before + 1


def test_requests_on_one_context_share_its_whole_blocks(llm: Any, stored: dict[str, Stored]) -> None:
    """The second request finds what the first loaded, up to the last whole block."""
    llm.reset_prefix_cache()
    one = stored["snapkv-250"]
    generate(llm, one.prompts[:1])
    (out,) = generate(llm, one.prompts[1:])
    assert tokens(out) == one.answers[1]
    assert out.num_cached_tokens == one.context.kept


def test_a_text_that_equals_the_placeholders_is_not_given_the_context(llm: Any, stored: dict[str, Stored]) -> None:
    """Without the salt the same token ids are a text of their own: computed as it was before the context was loaded."""
    llm.reset_prefix_cache()
    prompt = stored["snapkv-256"].prompts[0]
    alone = tokens(generate(llm, [list(prompt.ids)])[0])
    llm.reset_prefix_cache()
    assert tokens(generate(llm, [prompt])[0]) == stored["snapkv-256"].answers[0]
    (out,) = generate(llm, [list(prompt.ids)])
    assert (tokens(out), out.num_cached_tokens) == (alone, 0)
    assert alone != stored["snapkv-256"].answers[0]
    llm.reset_prefix_cache()
    assert not failed(out)


def test_prefix_caching_may_be_passed_over(llm: Any, stored: dict[str, Stored]) -> None:
    """A request that does not want cached blocks is given the context nevertheless; else its placeholders would be read."""
    one = stored["snapkv-256"]
    (out,) = generate(llm, one.prompts[:1], skip_reading_prefix_cache=True)
    assert tokens(out) == one.answers[0]
