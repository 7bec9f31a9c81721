"""The policy winnow while a prompt is read: exact sums, evicted entries stay evicted, a bound on what is held, few copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.profiles import PROFILES, random_profile
from support.winnow import KV_HEADS, SIZE, drawn, in_all, made, profile_of, shape, stages
from winnowkv.cache.reading import prefill
from winnowkv.cache.session import PrefillPlan
from winnowkv.policies import Policy, Prompt, cascade, winnow
from winnowkv.prompt.structure import Layout
from winnowkv.prompt.task import TaskProfile


@st.composite
def layouts(draw: st.DrawFn, tokens: int) -> Layout | None:
    """Any layout of a prompt, also one whose question is longer than its half."""
    if tokens < 3 or draw(st.booleans()):
        return None
    question = draw(st.integers(2, tokens - 1))
    places = st.integers(1, tokens - 1)
    return Layout(tokens, question, draw(st.integers(0, question - 1)), tuple(sorted(draw(st.sets(places, max_size=9)))))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_sum_sentences_and_peak_of_any_prompt(data: st.DataObject) -> None:
    """Exact sums; nothing comes back; sinks, question and as many sentence tokens as promised in all heads; the peak."""
    draw = data.draw
    tokens, layers = draw(st.integers(2, 120), "tokens"), draw(st.integers(1, 14), "layers")
    asked = Prompt(tokens, layers, draw(st.integers(1, tokens), "budget"))
    profile = draw(st.one_of(st.none(), st.integers(0, 9)), "profile")
    policy = made(
        layers,
        TaskProfile(draw(st.sampled_from([None, "aggregation"]), "task"), layout=draw(layouts(tokens), "layout")),
        sinks=draw(st.sampled_from([0, 1, 4, 40]), "sinks"),
        observe=draw(st.integers(1, 20), "observe"),
        samples=16,
        share=draw(st.sampled_from([0.0, 0.25, 0.9]), "share"),
        least=draw(st.sampled_from([0, 7, 40]), "least"),
        heads=draw(st.sampled_from([None, 1, 3, 16]), "heads"),
        longest=draw(st.sampled_from([3, 32]), "longest"),
        peak=draw(st.sampled_from([0.0, 0.35, 0.7, 1.0]), "peak"),
        progressive=draw(st.booleans(), "progressive"),
        profile=None if profile is None else random_profile(shape(layers), layers, profile),
    )
    if asked.budget < policy.minimum_budget() or tokens <= policy.observe:
        return
    seed, before = draw(st.integers(0, 9), "seed"), []
    spreads = [draw(st.sampled_from([0.05, 1.0, 3.0]), "spread") for _ in range(layers)]  # layers ask for very different shares
    waited = policy.awaited(asked)
    for now in stages(policy, asked, [drawn(tokens, 100 * seed + at, spread) for at, spread in enumerate(spreads)]):
        for earlier, later in zip(before, now, strict=False):
            assert all(head <= was for was, head in zip(earlier, later, strict=True)), "an evicted entry came back"
        holds = sum(len(head) for layer in now for head in layer) / KV_HEADS
        assert holds + tokens * (len(now) < layers) <= policy.peak_entries(asked) <= layers * tokens + asked.total
        if waited.start < len(now) <= waited.stop:  # more sentences stay as long as heads are awaited
            room = policy.room(asked, policy.limit(len(now) - 1, asked))
            assert len(in_all(now)) >= min(policy.sinks + policy.recent(asked) + room, tokens)
        before = now
    assert holds == asked.total
    shared = in_all(before)
    assert shared >= {*range(min(policy.sinks, tokens)), *range(tokens - policy.recent(asked), tokens)}
    assert policy.recent(asked) >= min(policy.observe, policy.window(tokens), asked.budget - policy.sinks)
    assert len(shared) >= min(policy.always(asked), asked.budget)


@pytest.mark.parametrize("seed", range(4))
def test_entries_evicted_for_a_sentence_do_not_come_back(seed: int) -> None:
    """When the sentences become few at once, a layer that keeps nearly all has more room for tokens than it holds."""
    profile = profile_of(12, {(0, 0): 1, (6, 1): 1})
    policy = made(12, TaskProfile(), observe=4, samples=16, share=0.7, least=0, peak=0.4, profile=profile)
    layers, before = [drawn(100, 20 * seed + at, (0.05, 1.0, 3.0)[(seed + at) % 3]) for at in range(12)], []
    for now in stages(policy, Prompt(100, 12, 50), layers):
        for earlier, later in zip(before, now, strict=False):
            assert all(head <= was for was, head in zip(earlier, later, strict=True))
        before = now


def peak_of(policy: Policy, asked: Prompt) -> float:
    """The most entries while a prompt is read, per KV head and of the full cache; checks the policy's own bound."""
    most = 0.0
    for now in stages(policy, asked, [drawn(asked.tokens, at) for at in range(asked.layers)]):
        holds = sum(len(head) for layer in now for head in layer) / KV_HEADS
        most = max(most, holds + asked.tokens * (len(now) < asked.layers))
    assert most <= policy.peak_entries(asked)
    return most / (asked.layers * asked.tokens)


@pytest.mark.parametrize("budget", [0.12, 0.2, 0.25])
@pytest.mark.parametrize("layers", [12, 30])
@pytest.mark.parametrize("heads", [[(0, 1), (8, 2)], [(2, 0), (11, 3)], [(3, 3)]])
def test_no_more_than_the_peak_is_held(heads: list[tuple[int, int]], layers: int, budget: float) -> None:
    """Where the first head sits early; what the budget alone takes cannot be less."""
    profile = profile_of(layers, dict.fromkeys(heads, 1.0))
    policy = made(layers, TaskProfile(), observe=8, samples=16, profile=profile)
    asked = Prompt(500, layers, int(budget * 500))
    assert peak_of(policy, asked) <= max(0.35, budget * 9 / 8 + 1 / layers)


def test_everything_is_held_until_the_first_head_was_read() -> None:
    """Until the first head was read no sentence is known: everything is held, and the announced peak includes it."""
    asked = Prompt(300, 12, 36)
    late = made(12, TaskProfile(), observe=8, samples=16, profile=profile_of(12, {(9, 0): 1.0}))
    assert peak_of(late, asked) == late.peak_entries(asked) / (12 * 300) == 10 / 12
    patient = made(12, TaskProfile(), observe=8, samples=16, progressive=False, profile=profile_of(12, {(0, 0): 1, (9, 0): 1}))
    assert peak_of(patient, asked) == 10 / 12
    assert peak_of(replace(patient, progressive=True), asked) <= 0.35


def test_guessed_heads_are_compared_over_all_layers() -> None:
    """Heads of the first layers alone are noise, and a sentence that went with them does not come back: all is held."""
    asked, guessing = Prompt(300, 12, 36), made(12, TaskProfile(), observe=8, samples=16)
    assert peak_of(guessing, asked) == guessing.peak_entries(asked) / (12 * 300) == 1.0
    assert "holds the whole prompt's cache" in (guessing.hint or "")
    scattered = made(12, TaskProfile("aggregation"), observe=8, samples=16)
    assert peak_of(scattered, asked) < 0.35


@pytest.mark.parametrize("layers", [30, 32])
def test_the_bound_holds_for_long_prompts(layers: int) -> None:
    """What a plan counts with, without driving it."""
    asked = Prompt(100_000, layers, 12_000)
    policy = made(layers, TaskProfile(), profile=profile_of(layers, {(1, 0): 1.0, (layers - 2, 1): 0.9}))
    limits = [policy.limit(at, asked) for at in range(layers)]
    assert policy.peak_entries(asked) <= 0.35 * layers * 100_000
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] >= asked.budget


@pytest.mark.parametrize("spec", ["winnow:observe=4:samples=16:least=8", f"winnow:observe=4:samples=16:profile={PROFILES}"])
def test_the_report_stays_within_the_peak(model: PreTrainedModel, spec: str) -> None:
    cache = wk.CompactCache(model, spec, 40)
    prefill(model, prompt(300), cache)
    layers = model.config.num_hidden_layers
    entry = cache.report.full_bytes / (layers * 300)
    assert cache.report.peak_bytes <= cache.policies[0].peak_entries(Prompt(300, layers, 40)) * entry


def shrinking(policy: Policy, asked: Prompt) -> tuple[PrefillPlan, int]:
    """The plan after the last layer, and how often a layer was shrunk on the way."""
    plan, times = PrefillPlan(policy, asked), 0
    for at in range(asked.layers):
        queries, keys = drawn(asked.tokens, at, 0.8 + 0.03 * (at % 7))
        times += len(plan.observe(queries[:, :, policy.wanted(asked.tokens)], keys, SIZE**-0.5))
    return plan, times


@pytest.mark.parametrize("spec", ["winnow:observe=8:samples=16", "expected:observe=8:samples=16", "cake:observe=8"])
def test_layers_shrink_rarely_with_the_same_result(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all of them shrank after each layer to what they may hold then."""
    asked = Prompt(400, 24, 48)
    policy = wk.policy(spec).for_model(shape(24)).for_task(TaskProfile())
    if spec.startswith("winnow"):
        policy = replace(policy, profile=profile_of(24, {(2, 1): 1.0, (15, 0): 0.8}))
    plan, times = shrinking(policy, asked)
    monkeypatch.setattr(cascade, "SLACK", 10**9)
    monkeypatch.setattr(winnow, "STEP", 1.0001)
    always, often = shrinking(policy, asked)
    assert times < 0.45 * often
    for mine, other in zip(plan.kept, always.kept, strict=True):
        assert torch.equal(mine, other)
