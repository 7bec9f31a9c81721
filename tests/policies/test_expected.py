"""The policy expected: its scores by a slow reference, how layers share the budget, and what it holds on the way."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, prompt
from support.reference import compact_logits
from winnowkv.cache.selection import PromptSelection
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import Rotation
from winnowkv.policies import BoundPolicy, LayerStates
from winnowkv.policies.expected import Expected

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 6, 0.4
ROTATION = Rotation((0.9, 0.05))  # the last two of six dimensions are not turned


def drawn(tokens: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Queries and keys of one layer, double precision."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(1, n, tokens, SIZE, generator=generator, dtype=torch.float64) * spread for n in (HEADS, KV_HEADS)]
    return states[0], states[1]


def bound(policy: wk.Policy, tokens: int, layers: int, budget: int, rotation: Rotation | None = None) -> BoundPolicy:
    """The policy for a prompt of a model with this rotation."""
    return policy.bind(ModelInfo("Drawn", layers, HEADS, KV_HEADS, "", rotation), wk.PromptInfo(tokens, layers, budget))


def states_of(bound: BoundPolicy, layer: int, queries: Tensor, keys: Tensor, scale: float = SCALE) -> LayerStates:
    """What the policy sees of a layer, out of all its queries."""
    return LayerStates(layer, queries[:, :, bound.query_positions()], keys, keys, scale)


def scored(policy: Any, queries: Tensor, keys: Tensor, scale: float = SCALE, rotation: Rotation | None = None) -> Tensor:
    """The policy's scores of one layer, from all queries of the prompt."""
    scorer = bound(policy, keys.shape[2], 1, keys.shape[2], rotation).parts.scorer
    return scorer.score(LayerStates(0, queries[:, :, scorer.query_positions()], keys, keys, scale))


def places(tokens: int, context: int, sinks: int, samples: int, ahead: int) -> list[tuple[int, int]]:
    """Position of each sampled query and where it is moved to: most spread evenly over the text, a quarter its last ones."""
    late = min(samples // 4, context)
    early = min(samples - late, context)
    first = min(sinks, context - 1)

    def evenly(begin: int, end: int, at: int) -> int:
        return int(begin + at * (end - begin) / (early - 1)) if early > 1 else begin

    spread = [(evenly(first, context - 1, at), tokens + evenly(0, ahead - 1, at)) for at in range(early)]
    return spread + [(context - late + at, tokens + at) for at in range(late)]


def moved(query: list[float], by: int, frequencies: tuple[float, ...]) -> list[float]:
    """One query turned by so many positions."""
    half, out = len(frequencies), list(query)
    for pair, frequency in enumerate(frequencies):
        a, b, angle = query[pair], query[pair + half], by * frequency
        out[pair] = a * math.cos(angle) - b * math.sin(angle)
        out[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(query: list[float], keys: list[list[float]]) -> list[float]:
    logits = [SCALE * sum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def slow(queries: Tensor, keys: Tensor, policy: Any, rotation: Rotation | None) -> tuple[list[list[float]], float]:
    """Scores ``[Hkv][C]`` before their common factor, and the layer's preference: entropy times variance."""
    tokens, group = keys.shape[2], HEADS // KV_HEADS
    context = tokens - policy.observe
    stands = places(tokens, context, policy.sinks, policy.samples, policy.ahead)
    frequencies = () if rotation is None else rotation.frequencies
    scores, entropy, variance = [[0.0] * context for _ in range(KV_HEADS)], 0.0, 0.0
    for head in range(HEADS):
        rows = [
            attention(moved(queries[0, head, here].tolist(), there - here, frequencies), keys[0, head // group].tolist())
            for here, there in stands
        ]
        for token in range(context):
            column = [row[token] for row in rows]
            mean = sum(column) / len(column)
            scores[head // group][token] += math.sqrt(sum(p * p for p in column) / len(column)) / group
            entropy -= sum(p * math.log(p) for p in column[::4]) * len(column) / len(column[::4])
            variance += sum((p - mean) ** 2 for p in column) / len(column)
    return scores, entropy * variance


@pytest.mark.parametrize("rotation", [None, ROTATION], ids=["as-they-are", "turned"])
@pytest.mark.parametrize(
    "options",
    [
        {"samples": 8, "observe": 5, "sinks": 2, "ahead": 30},
        {"samples": 300, "observe": 0, "sinks": 0, "ahead": 1},  # more samples than the context has tokens
        {"samples": 4, "observe": 3, "sinks": 99, "ahead": 7},  # sinks pass the context
        {"samples": 5, "observe": 39, "sinks": 1, "ahead": 9},  # a context of one token: all queries are the same
    ],
    ids=str,
)
def test_scores_are_those_of_the_reference(options: dict[str, int], rotation: Rotation | None) -> None:
    policy: Any = Expected(**options)
    queries, keys = drawn(40, seed=options["samples"])
    scores = scored(policy, queries.float(), keys.float(), rotation=rotation)
    raw, preference = slow(queries, keys, policy, rotation)
    expected = torch.tensor(raw, dtype=torch.float64)
    assert scores.shape == (1, *expected.shape)
    expected *= preference / expected.sum()
    torch.testing.assert_close(scores[0].double(), expected, atol=1e-5 * max(preference, 1), rtol=1e-4)
    assert float(scores.sum()) == pytest.approx(preference, rel=1e-4, abs=1e-6)


def test_moved_queries_look_elsewhere() -> None:
    """The rotation matters: another token wins when the queries are moved past the prompt."""
    queries, keys = drawn(60, 1)
    policy = Expected(observe=4, samples=16)
    still, turned = (scored(policy, queries, keys, rotation=by)[0].argmax(-1).tolist() for by in (None, ROTATION))
    assert still != turned


def test_a_token_that_few_queries_need_much_counts_more_than_one_that_all_need_a_little() -> None:
    """The root mean square; under the mean the two would be worth the same."""
    queries, keys = torch.zeros(1, 1, 40, 2), torch.zeros(1, 1, 40, 2)
    queries[..., 0] = 1.0
    queries[:, :, ::4, 1] = 1.0  # every fourth query
    keys[..., 5, 1] = 12.0  # is for token 5
    keys[..., 9, 0] = math.log(40 / 3)  # all look at token 9 a little
    scores = scored(wk.policy("expected", observe=0, sinks=0, samples=40), queries, keys, 1.0)[0, 0]
    assert scores.topk(2).indices.tolist() == [5, 9]
    assert float(scores[5]) > 1.5 * float(scores[9])


def layers_of(count: int, tokens: int, seed: int, constant: bool = False) -> list[tuple[Tensor, Tensor]]:
    spreads = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [drawn(tokens, seed * 100 + at, 0.0 if constant else 3 * spread) for at, spread in enumerate(spreads)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 90),
    layers=st.integers(1, 9),
    budget=st.integers(1, 90),
    sinks=st.sampled_from([0, 1, 4, 30]),
    observe=st.integers(0, 12),
    samples=st.sampled_from([4, 7, 64, 300]),
    seed=st.integers(0, 9),
    constant=st.booleans(),
)
@example(tokens=31, layers=4, budget=30, sinks=30, observe=0, samples=300, seed=0, constant=False)
@example(tokens=2, layers=2, budget=1, sinks=0, observe=1, samples=4, seed=0, constant=False)
def test_no_more_than_half_above_the_budget_and_one_layer_is_held(
    tokens: int, layers: int, budget: int, sinks: int, observe: int, samples: int, seed: int, constant: bool
) -> None:
    """The sum is exact, and what the layers seen hold passes the budget by its half at most while the next one is read."""
    policy = Expected(sinks=sinks, observe=observe, samples=samples)
    try:
        selection = PromptSelection(bound(policy, tokens, layers, min(budget, tokens), ROTATION))
    except wk.BudgetError:
        assert budget < sinks + 1
        return
    asked, allocator = selection.bound.prompt, selection.bound.parts.allocator
    held: list[set[tuple[int, int]]] = []
    for layer, (queries, keys) in enumerate(layers_of(layers, tokens, seed, constant)):
        if tokens > observe:
            assert sum(map(len, held)) + KV_HEADS * tokens <= KV_HEADS * allocator.peak_entries()
        selection.observe(states_of(selection.bound, layer, queries.float(), keys.float()))
        now = [entries_of(kept, tokens) for kept in selection.kept]
        for before, after in zip(held, now, strict=False):
            assert after <= before, "an evicted entry came back"
        held = now
    if tokens <= observe:
        assert selection.kept == [None] * layers
        return
    assert allocator.peak_entries() == min(asked.total + asked.total // 2, (layers - 1) * tokens) + tokens
    assert sum(map(len, held)) == KV_HEADS * asked.total
    always = {*range(min(sinks, tokens)), *range(tokens - min(observe, asked.budget - sinks), tokens)}
    for entries in held:
        for head in range(KV_HEADS):
            assert always <= {at for mine, at in entries if mine == head}


def entries_of(kept: Tensor | None, tokens: int) -> set[tuple[int, int]]:
    """What a layer holds, as KV head and position."""
    if kept is None:
        return {(head, at) for head in range(KV_HEADS) for at in range(tokens)}
    entries = [(head, at) for head in range(KV_HEADS) for at in kept[0, head].tolist()]
    assert len(set(entries)) == len(entries)
    assert all(row == sorted(row) for row in kept[0].tolist())
    return set(entries)


def test_layers_share_in_proportion_to_their_preferences() -> None:
    """Above sinks and recent tokens, which every layer keeps."""
    policy = wk.policy("expected", sinks=2, observe=3, samples=32)
    selection, preferences = PromptSelection(bound(policy, 400, 4, 60)), []
    for layer, spread in enumerate((0.8, 1.1, 0.9, 1.0)):
        queries, keys = drawn(400, layer, spread)
        preferences.append(float(scored(policy, queries, keys).sum()))
        selection.observe(states_of(selection.bound, layer, queries, keys))
    shares = [kept.shape[-1] - 5 for kept in selection.kept]
    assert sum(shares) == 4 * 55
    assert len(set(shares)) == 4
    for share, preference in zip(shares, preferences, strict=True):
        assert share == pytest.approx(4 * 55 * preference / sum(preferences), abs=1)


def test_three_layers_are_too_few_to_compare() -> None:
    policy = wk.policy("expected", sinks=2, observe=3, samples=32)
    selection = PromptSelection(bound(policy, 400, 3, 60))
    for layer, spread in enumerate((0.8, 1.1, 0.9)):
        selection.observe(states_of(selection.bound, layer, *drawn(400, layer, spread)))
    assert [kept.shape[-1] for kept in selection.kept] == [60] * 3


def test_the_best_tokens_of_each_head_stay() -> None:
    policy, (queries, keys) = wk.policy("expected", sinks=1, observe=2, samples=32), drawn(50, 4)
    selection = PromptSelection(bound(policy, 50, 1, 12))
    selection.observe(states_of(selection.bound, 0, queries.float(), keys.float()))
    scores = scored(policy, queries.float(), keys.float())[0]
    for head in range(KV_HEADS):
        best = sorted(range(1, 48), key=lambda at: -float(scores[head, at]))[:9]
        assert selection.kept[0][0, head].tolist() == [0, *sorted(best), 48, 49]
    assert selection.kept[0][0, 0].tolist() != selection.kept[0][0, 1].tolist()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("samples=3", "samples=3 is too small, it must be at least 4"),
        ("ahead=0", "ahead=0 is too small, it must be at least 1"),
        ("sinks=-1", "sinks=-1 is too small"),
        ("observe=-1", "observe=-1 is too small"),
        ("observe=context", "observe='context' is not of type int"),
        ("observe=none", "observe='none' is not of type int"),
        ("samples=many", "samples='many' is not of type int"),
        ("quantize=int2", "quantize='int2' must be one of"),
        ("sample=8", "Did you mean 'samples'?"),
    ],
)
def test_options_out_of_bounds_are_refused(options: str, says: str) -> None:
    with pytest.raises(wk.PolicyError, match=says.replace("?", r"\?")):
        wk.policy(f"expected:{options}")


def test_the_rotation_is_the_models(model: PreTrainedModel) -> None:
    info, prompt = ModelInfo.of(model), wk.PromptInfo(PROMPT, 5, 40)
    assert wk.policy("expected").bind(info, prompt).parts.scorer.rotation == info.rotation is not None
    compression = wk.CompactCache(model, "expected:observe=4", 20).compression
    assert compression.policy.bind(compression.model, prompt).parts.scorer.rotation == info.rotation


def test_a_short_prompt_is_kept_whole_on_a_model(model: PreTrainedModel) -> None:
    """Prompts shorter than the samples, than sinks and window, and than the window."""
    for tokens, budget in ((PROMPT, 40), (38, 37), (34, 34), (33, 40), (32, 2), (5, 2)):
        cache = wk.CompactCache(model, "expected", budget)
        compact_logits(model, cache, prompt(tokens), [prompt(2, seed=1)])
        kept = min(budget, tokens) if tokens > 32 else tokens
        assert sum(cache.report.kept_entries[0]) == kept * model.config.num_hidden_layers


@pytest.mark.parametrize("spec", ["expected", "winnow"])
def test_a_budget_below_sinks_and_window_keeps_what_fits(llama: PreTrainedModel, spec: str) -> None:
    """12% of a short prompt is no error: sinks, and as many of the last tokens as the budget allows."""
    for tokens in (42, 60, 150, 299):
        cache = wk.CompactCache(llama, spec, 0.12)
        compact_logits(llama, cache, prompt(tokens), [])
        entries = int(0.12 * tokens)
        assert sum(cache.report.kept_entries[0]) == 5 * entries
        for layer in cache.compact_layers:
            for head in layer.positions[0].tolist():
                assert {0, 1, 2, 3, *range(tokens - min(entries - 4, 32), tokens)} <= set(head)
    with pytest.raises(wk.BudgetError, match="below 4 sinks and the last token: keep at least 5 entries"):
        compact_logits(llama, wk.CompactCache(llama, spec, 4), prompt(60), [])


def test_held_entries_on_a_model_are_bounded(llama: PreTrainedModel) -> None:
    peaks = []
    for budget in (8, 16, 32):
        cache = wk.CompactCache(llama, "expected:observe=4:samples=16", budget)
        compact_logits(llama, cache, prompt(300), [])
        entry = cache.report.full_bytes / (5 * 300)
        peaks.append(cache.report.peak_bytes / entry)
        assert peaks[-1] <= 5 * budget * 3 / 2 + 300
    assert all(less < more for less, more in pairwise(peaks))
