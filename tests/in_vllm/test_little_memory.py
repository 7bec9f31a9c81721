"""Few blocks and few tokens a step: vLLM preempts, and cuts questions into chunks; the answers stay what they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm has an environment of its own")

import torch

import winnowkv as wk
from support.vllm_engine import MIB, QUESTIONS, TEXTS, Stored, engine, generate, scheduler, tokens
from winnowkv.contexts.store import ContextStore
from winnowkv.evaluate.needle.prompts import read_haystack

LONG = 140  # tokens, so that a request needs blocks while it answers
STEP = 64  # tokens
LABELS = ["snapkv-250", "second"]


@pytest.fixture(scope="module")
def llm(store: ContextStore, stored: dict[str, Stored]) -> Iterator[Any]:
    """16 blocks of 5.6 MiB; a context takes two, and eight requests beside it two each."""
    with engine(store, kv_cache_memory_bytes=90 * MIB, max_num_batched_tokens=STEP, max_num_seqs=8, max_model_len=1400) as llm:
        yield llm


def test_preempted_requests_load_their_context_again(
    llm: Any, stored: dict[str, Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone needs no more than there is; eight of two contexts at once do."""
    requests = [stored[label].prompts[question] for label in LABELS for question in range(2)]
    alone = [tokens(generate(llm, [request], max_tokens=LONG)[0]) for request in requests]
    assert [one[: len(answer)] for one, answer in zip(alone, answers(stored), strict=True)] == answers(stored)
    preempted: list[str] = []
    own = scheduler(llm)
    before = own._preempt_request

    def count(request: Any, *others: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        before(request, *others, **options)

    monkeypatch.setattr(own, "_preempt_request", count)
    llm.reset_prefix_cache()
    outs = generate(llm, requests * 2, max_tokens=LONG)
    assert preempted, "vLLM preempted nothing: the test shows nothing"
    assert [tokens(out) for out in outs] == alone * 2


def answers(stored: dict[str, Stored]) -> list[list[int]]:
    return [answer for label in LABELS for answer in stored[label].answers]


def test_a_long_question_is_computed_in_chunks(llm: Any, stored: dict[str, Stored], store: ContextStore) -> None:
    """Of 64 tokens a step at most, beside another request."""
    one = stored["snapkv-250"]
    model, tokenizer = wk.load("embedded", dtype=torch.float32)
    begin, end = TEXTS["first"]
    document = wk.read(model, tokenizer, read_haystack()[begin:end], "snapkv", 250)
    question = f"{read_haystack()[40000:41500]} {QUESTIONS[0]}"
    prompt = one.context.ask(tokenizer, question)
    assert len(prompt.ids) - one.context.kept > 4 * STEP
    llm.reset_prefix_cache()
    outs = generate(llm, [prompt, stored["second"].prompts[0]])
    expected = document.ask(question, sampling=wk.Sampling(max_new_tokens=32, ignore_eos=True)).tokens
    assert [tokens(out) for out in outs] == [expected, stored["second"].answers[0]]
