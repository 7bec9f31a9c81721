"""H2O, TOVA, CAKE and HeadKV against naive references: loops over full attention maps, as the papers write them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import winnowkv as wk
from support.profiles import random_profile
from winnowkv.cache.selection import PromptSelection
from winnowkv.models.info import ModelInfo
from winnowkv.policies import LayerStates, policy
from winnowkv.scoring.attention import accumulated_attention

HEADS, KV_HEADS, SIZE, TOKENS, LAYERS = 4, 2, 8, 50, 4
SCALE = SIZE**-0.5
MODEL = ModelInfo("Drawn", LAYERS, HEADS, KV_HEADS, "")


def states(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Queries ``[1, Hq, S, D]`` and keys ``[1, Hkv, S, D]`` of every layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            2 * torch.randn(1, HEADS, TOKENS, SIZE, generator=generator),
            torch.randn(1, KV_HEADS, TOKENS, SIZE, generator=generator),
        )
        for _ in range(LAYERS)
    ]


def full_map(queries: Tensor, keys: Tensor) -> Tensor:
    """The whole causal attention map of a layer, ``[Hq, S, S]``."""
    logits = torch.stack([queries[0, h] @ keys[0, h // (HEADS // KV_HEADS)].T * SCALE for h in range(HEADS)])
    return logits.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf")).softmax(-1)


def group(head: int) -> range:
    return range(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)


def kept(made: wk.Policy, budget: int, layers: list[tuple[Tensor, Tensor]]) -> list[list[list[int]]]:
    """Positions by the package: layer, KV head, ascending."""
    bound = made.bind(MODEL, wk.PromptInfo(TOKENS, LAYERS, budget))
    selection = PromptSelection(bound)
    for layer, (queries, keys) in enumerate(layers):
        selection.observe(LayerStates(layer, queries[:, :, TOKENS - bound.query_span() :], keys, keys, SCALE))
    rows = []
    for positions in selection.kept:
        assert positions is not None
        heads = positions[0].tolist() * (KV_HEADS if positions.shape[1] == 1 else 1)
        rows.append([[p for p in row if p >= 0] for row in heads])
    return rows


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def pooled(scores: list[float], kernel: int, kind: str) -> list[float]:
    half, out = kernel // 2, []
    for i in range(len(scores)):
        near = scores[max(i - half, 0) : i + half + 1]
        out.append(max(near) if kind == "max" else sum(near) / kernel)
    return out


@pytest.mark.parametrize("block", [1, 7, 50, 256])
def test_accumulated_attention_is_the_column_sum_of_the_full_map(block: int) -> None:
    queries, keys = states()[0]
    torch.testing.assert_close(accumulated_attention(queries, keys, SCALE, block)[0], full_map(queries, keys).sum(1))


@pytest.mark.parametrize("recent", [0.0, 0.5, 0.25])
def test_h2o_equals_the_naive_reference(recent: float) -> None:
    layers, budget = states(), 16
    found = kept(policy("h2o", recent=recent), budget, layers)
    for layer, (queries, keys) in enumerate(layers):
        maps, newest = full_map(queries, keys), int(budget * recent)
        for head in range(KV_HEADS):
            total = [sum(float(maps[h, :, j].sum()) for h in group(head)) for j in range(TOKENS - newest)]
            expected = best(total, budget - newest) + list(range(TOKENS - newest, TOKENS))
            assert found[layer][head] == expected


def test_tova_equals_the_naive_reference() -> None:
    layers, budget = states(1), 12
    found = kept(policy("tova"), budget, layers)
    for layer, (queries, keys) in enumerate(layers):
        last = full_map(queries, keys)[:, -1].mean(0).tolist()
        assert found[layer] == [[*best(last[:-1], budget - 1), TOKENS - 1]] * KV_HEADS


def test_cake_equals_the_naive_reference() -> None:
    layers, budget, window = states(2), 16, 6
    made = policy("cake", observe=window, kernel=3, gamma=5.0, tau1=2.0, tau2=0.5)
    found = kept(made, budget, layers)
    preferences, tokens = [], []
    for queries, keys in layers:
        context = full_map(queries, keys)[:, -window:, :-window]
        entropy = -sum(float(p) * math.log(float(p) + 1e-10) for p in context.flatten())
        variance = sum(float(context[h, :, j].var()) for h in range(HEADS) for j in range(TOKENS - window))
        preferences.append(entropy ** (1 / 2.0) * variance ** (1 / 0.5))
        indicator = context.mean(1) + 5.0 * context.var(1)
        smooth = [pooled(indicator[h].tolist(), 3, "avg") for h in range(HEADS)]
        tokens.append([[max(smooth[h][j] for h in group(head)) for j in range(TOKENS - window)] for head in range(KV_HEADS)])
    total = (budget - window) * LAYERS
    counts = [len(rows[0]) - window for rows in found]
    assert sum(counts) == total
    for preference, count in zip(preferences, counts, strict=True):
        assert abs(count - total * preference / sum(preferences)) < 1 + 1e-3  # the rounding is by largest remainder
    for layer, count in enumerate(counts):
        for head in range(KV_HEADS):
            assert found[layer][head] == best(tokens[layer][head], count) + list(range(TOKENS - window, TOKENS))


def test_cake_in_a_cascade_equals_cake_over_all_layers_at_once() -> None:
    """The paper's claim: shrinking step by step keeps what one allocation at the end would."""
    layers, made, scores = states(3), policy("cake", observe=6), []
    parts = made.bind(MODEL, wk.PromptInfo(TOKENS, LAYERS, 16)).parts
    for layer, (queries, keys) in enumerate(layers):
        scores.append(parts.scorer.score(LayerStates(layer, queries[:, :, -6:], keys, keys, SCALE)))
    at_once = parts.allocator.allocate(scores, [TOKENS] * LAYERS)
    assert [len(rows[0]) for rows in kept(made, 16, layers)] == pytest.approx(at_once, abs=1)


def snap_scores(queries: Tensor, keys: Tensor, window: int, kernel: int) -> list[list[float]]:
    sums = full_map(queries, keys)[:, -window:, :-window].sum(1)
    means = [
        [sum(float(sums[h, j]) for h in group(head)) / len(group(head)) for j in range(TOKENS - window)]
        for head in range(KV_HEADS)
    ]
    return [pooled(row, kernel, "max") for row in means]


def test_headkv_equals_the_naive_reference() -> None:
    layers, budget, window, beta = states(5), 18, 6, 1.5
    profile = random_profile(MODEL, LAYERS)
    found = kept(policy("headkv", profile=profile, observe=window, kernel=3, beta=beta), budget, layers)
    mean = budget - window
    weights = [[sum(row[h] for h in group(head)) for head in range(KV_HEADS)] for row in profile.semantic]
    fixed, pool = mean - int(mean / beta), int(mean / beta) * LAYERS * KV_HEADS
    for layer, (queries, keys) in enumerate(layers):
        scores = snap_scores(queries, keys, window, 3)
        for head in range(KV_HEADS):
            count = len(found[layer][head]) - window
            assert abs(count - (fixed + pool * weights[layer][head] / sum(map(sum, weights)))) < 1
            assert found[layer][head] == best(scores[head], count) + list(range(TOKENS - window, TOKENS))
    assert sum(len(row) for rows in found for row in rows) == budget * LAYERS * KV_HEADS
