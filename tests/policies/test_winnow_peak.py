"""The policy winnow while a prompt is read: exact sums, evicted entries stay evicted, a bound on what is held, few copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.profiles import PROFILES, random_profile
from support.winnow import KV_HEADS, asked, bound, drawn, in_all, profile_of, shape, stages, states_of
from winnowkv.cache.reading import prefill
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import BoundPolicy, cascade, winnow
from winnowkv.prompt.structure import Structure
from winnowkv.prompt.task import TaskProfile


@st.composite
def structures(draw: st.DrawFn, tokens: int) -> Structure | None:
    """Any structure of a prompt, also one whose question is longer than its half."""
    if tokens < 3 or draw(st.booleans()):
        return None
    question = draw(st.integers(2, tokens - 1))
    places = st.integers(1, tokens - 1)
    return Structure(tokens, question, draw(st.integers(0, question - 1)), tuple(sorted(draw(st.sets(places, max_size=9)))))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_sum_sentences_and_peak_of_any_prompt(data: st.DataObject) -> None:
    """Exact sums; nothing comes back; sinks, question and as many sentence tokens as promised in all heads; the peak."""
    draw = data.draw
    tokens, layers = draw(st.integers(2, 120), "tokens"), draw(st.integers(1, 14), "layers")
    budget = draw(st.integers(1, tokens), "budget")
    profile = draw(st.one_of(st.none(), st.integers(0, 9)), "profile")
    task = TaskProfile(draw(st.sampled_from([None, "aggregation"]), "task"), structure=draw(structures(tokens), "structure"))
    options = {
        "sinks": draw(st.sampled_from([0, 1, 4, 40]), "sinks"),
        "observe": draw(st.integers(1, 20), "observe"),
        "samples": 16,
        "share": draw(st.sampled_from([0.0, 0.25, 0.9]), "share"),
        "least": draw(st.sampled_from([0, 7, 40]), "least"),
        "heads": draw(st.sampled_from([None, 1, 3, 16]), "heads"),
        "longest": draw(st.sampled_from([3, 32]), "longest"),
        "peak": draw(st.sampled_from([0.0, 0.35, 0.7, 1.0]), "peak"),
        "progressive": draw(st.booleans(), "progressive"),
        "equal": draw(st.booleans(), "equal"),
        "profile": None if profile is None else random_profile(shape(layers), layers, profile),
    }
    prompt = asked(tokens, layers, budget, task)
    if tokens <= options["observe"] or budget <= options["sinks"]:
        return
    made = bound(prompt, **options)
    sinks, recent, allocator = options["sinks"], made.parts.selector.recent, made.parts.allocator
    seed, before = draw(st.integers(0, 9), "seed"), []
    spreads = [draw(st.sampled_from([0.05, 1.0, 3.0]), "spread") for _ in range(layers)]  # layers ask for very different shares
    waited = range(0) if made.parts.shared is None else allocator.awaited
    for now in stages(made, [drawn(tokens, 100 * seed + at, spread) for at, spread in enumerate(spreads)]):
        for earlier, later in zip(before, now, strict=False):
            assert all(head <= was for was, head in zip(earlier, later, strict=True)), "an evicted entry came back"
        holds = sum(len(head) for layer in now for head in layer) / KV_HEADS
        assert holds + tokens * (len(now) < layers) <= allocator.peak_entries() <= layers * tokens + prompt.total
        if waited.start < len(now) <= waited.stop:  # more sentences stay as long as heads are awaited
            room = allocator.room(allocator.limit(len(now) - 1))
            assert len(in_all(now)) >= min(sinks + recent + room, tokens)
        before = now
    assert holds == prompt.total
    assert not options["equal"] or {len(head) for layer in before for head in layer} == {budget}
    shared = in_all(before)
    assert shared >= {*range(min(sinks, tokens)), *range(tokens - recent, tokens)}
    assert recent >= min(options["observe"], made.parts.scorer.window, budget - sinks)
    always = min(sinks, tokens) + recent + (0 if made.parts.shared is None else allocator.room(budget))
    assert len(shared) >= min(always, budget)


@pytest.mark.parametrize("seed", range(4))
def test_entries_evicted_for_a_sentence_do_not_come_back(seed: int) -> None:
    """When the sentences become few at once, a layer that keeps nearly all has more room for tokens than it holds."""
    profile = profile_of(12, {(0, 0): 1, (6, 1): 1})
    made = bound(asked(100, 12, 50, TaskProfile()), observe=4, samples=16, share=0.7, least=0, peak=0.4, profile=profile)
    layers, before = [drawn(100, 20 * seed + at, (0.05, 1.0, 3.0)[(seed + at) % 3]) for at in range(12)], []
    for now in stages(made, layers):
        for earlier, later in zip(before, now, strict=False):
            assert all(head <= was for was, head in zip(earlier, later, strict=True))
        before = now


def peak_of(made: BoundPolicy) -> float:
    """The most entries while a prompt is read, per KV head and of the full cache; checks the policy's own bound."""
    most, prompt = 0.0, made.prompt
    for now in stages(made, [drawn(prompt.tokens, at) for at in range(prompt.layers)]):
        holds = sum(len(head) for layer in now for head in layer) / KV_HEADS
        most = max(most, holds + prompt.tokens * (len(now) < prompt.layers))
    assert most <= made.parts.allocator.peak_entries()
    return most / (prompt.layers * prompt.tokens)


@pytest.mark.parametrize("budget", [0.12, 0.2, 0.25])
@pytest.mark.parametrize("layers", [12, 30])
@pytest.mark.parametrize("heads", [[(0, 1), (8, 2)], [(2, 0), (11, 3)], [(3, 3)]])
def test_no_more_than_the_peak_is_held(heads: list[tuple[int, int]], layers: int, budget: float) -> None:
    """Where the first head sits early; what the budget alone takes cannot be less."""
    profile = profile_of(layers, dict.fromkeys(heads, 1.0))
    prompt = asked(500, layers, int(budget * 500), TaskProfile())
    assert peak_of(bound(prompt, observe=8, samples=16, profile=profile)) <= max(0.35, budget * 9 / 8 + 1 / layers)


def test_everything_is_held_until_the_first_head_was_read() -> None:
    """Until the first head was read no sentence is known: everything is held, and the announced peak includes it."""
    prompt, options = asked(300, 12, 36, TaskProfile()), {"observe": 8, "samples": 16}
    late = bound(prompt, profile=profile_of(12, {(9, 0): 1.0}), **options)
    assert peak_of(late) == late.parts.allocator.peak_entries() / (12 * 300) == 10 / 12
    options["profile"] = profile_of(12, {(0, 0): 1, (9, 0): 1})
    assert peak_of(bound(prompt, progressive=False, **options)) == 10 / 12
    assert peak_of(bound(prompt, progressive=True, **options)) <= 0.35


def test_guessed_heads_are_compared_over_all_layers() -> None:
    """Heads of the first layers alone are noise, and a sentence that went with them does not come back: all is held."""
    guessing = bound(asked(300, 12, 36, TaskProfile()), observe=8, samples=16)
    assert peak_of(guessing) == guessing.parts.allocator.peak_entries() / (12 * 300) == 1.0
    assert "holds the whole prompt's cache" in guessing.notes[0]
    scattered = bound(asked(300, 12, 36, TaskProfile("aggregation")), observe=8, samples=16)
    assert peak_of(scattered) < 0.35


@pytest.mark.parametrize("layers", [30, 32])
def test_the_bound_holds_for_long_prompts(layers: int) -> None:
    """What a plan counts with, without driving it."""
    prompt, profile = asked(100_000, layers, 12_000, TaskProfile()), profile_of(layers, {(1, 0): 1.0, (layers - 2, 1): 0.9})
    allocator = bound(prompt, profile=profile).parts.allocator
    limits = [allocator.limit(at) for at in range(layers)]
    assert allocator.peak_entries() <= 0.35 * layers * 100_000
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] >= prompt.budget


@pytest.mark.parametrize("spec", ["winnow:observe=4:samples=16:least=8", f"winnow:observe=4:samples=16:profile={PROFILES}"])
def test_the_report_stays_within_the_peak(model: PreTrainedModel, spec: str) -> None:
    cache = wk.CompactCache(model, spec, 40)
    prefill(model, prompt(300), cache)
    layers = model.config.num_hidden_layers
    entry = cache.report.full_bytes / (layers * 300)
    made = cache.compression.policy.bind(cache.compression.model, wk.PromptInfo(300, layers, 40))
    assert cache.report.peak_bytes <= made.parts.allocator.peak_entries() * entry


def shrinking(made: BoundPolicy) -> tuple[PromptSelection, int]:
    """The selection after the last layer, and how often a layer was shrunk on the way."""
    selection, times = PromptSelection(made), 0
    for at in range(made.prompt.layers):
        times += len(selection.observe(states_of(made, at, drawn(made.prompt.tokens, at, 0.8 + 0.03 * (at % 7)))))
    return selection, times


@pytest.mark.parametrize("spec", ["winnow:observe=8:samples=16", "expected:observe=8:samples=16", "cake:observe=8"])
def test_layers_shrink_rarely_with_the_same_result(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all of them shrank after each layer to what they may hold then."""
    options = {"profile": profile_of(24, {(2, 1): 1.0, (15, 0): 0.8})} if spec.startswith("winnow") else {}
    made = wk.policy(spec, **options).bind(shape(24), asked(400, 24, 48, TaskProfile()))
    selection, times = shrinking(made)
    monkeypatch.setattr(cascade, "CASCADE_SLACK", 10**9)
    monkeypatch.setattr(winnow, "LAYER_GROWTH", 1.0001)
    always, often = shrinking(made)
    assert times < 0.45 * often
    for mine, other in zip(selection.kept, always.kept, strict=True):
        assert torch.equal(mine, other)
