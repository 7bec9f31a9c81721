"""H2O, TOVA, CAKE, Ada-KV and HeadKV against naive references: loops over full attention maps, as the papers write them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import winnowkv as wk
from support.profiles import random_profile
from winnowkv.cache.session import PrefillPlan
from winnowkv.models.info import Fingerprint
from winnowkv.policies import policy
from winnowkv.scoring.attention import accumulated_attention

HEADS, KV_HEADS, SIZE, TOKENS, LAYERS = 4, 2, 8, 50, 4
SCALE = SIZE**-0.5


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
    plan = PrefillPlan(made, wk.Prompt(TOKENS, LAYERS, budget))
    for queries, keys in layers:
        plan.observe(queries[:, :, TOKENS - made.reads(TOKENS) :], keys, SCALE)
    rows = []
    for positions in plan.kept:
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
    layers, made = states(3), policy("cake", observe=6)
    prompt, scores = wk.Prompt(TOKENS, LAYERS, 16), []
    for layer, (queries, keys) in enumerate(layers):
        scores.append(made.score(layer, queries[:, :, -6:], keys, SCALE))
    at_once = made.allocate(scores, [TOKENS] * LAYERS, prompt)
    assert [len(rows[0]) for rows in kept(made, 16, layers)] == pytest.approx(at_once, abs=1)


def snap_scores(queries: Tensor, keys: Tensor, window: int, kernel: int) -> list[list[float]]:
    sums = full_map(queries, keys)[:, -window:, :-window].sum(1)
    means = [
        [sum(float(sums[h, j]) for h in group(head)) / len(group(head)) for j in range(TOKENS - window)]
        for head in range(KV_HEADS)
    ]
    return [pooled(row, kernel, "max") for row in means]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_adakv_equals_the_naive_reference(floor: float) -> None:
    layers, budget, window = states(4), 18, 6
    found = kept(policy("adakv", observe=window, kernel=3, floor=floor), budget, layers)
    mean, lengths = budget - window, set()
    for layer, (queries, keys) in enumerate(layers):
        scores = snap_scores(queries, keys, window, 3)
        ranked = sorted((-s, head, j) for head, row in enumerate(scores) for j, s in enumerate(row))[: KV_HEADS * mean]
        safe = int(floor * mean)
        for head in range(KV_HEADS):
            wins = sum(owner == head for _, owner, _ in ranked)
            count = len(found[layer][head]) - window
            assert abs(count - (safe + wins * (mean - safe) / mean)) < 1
            assert found[layer][head] == best(scores[head], count) + list(range(TOKENS - window, TOKENS))
            lengths.add(count)
        assert sum(map(len, found[layer])) == KV_HEADS * budget
    assert (len(lengths) > 1) == (floor < 1)


def test_headkv_equals_the_naive_reference() -> None:
    layers, budget, window, beta = states(5), 18, 6, 1.5
    profile = random_profile(Fingerprint("Drawn", LAYERS, HEADS, KV_HEADS, ""), LAYERS)
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


def test_per_head_budgets_free_what_the_longest_head_does_not_need(llama: object) -> None:
    """Held bytes are the longest head's, far below the full cache."""
    from support.models import prompt
    from support.reference import compact_logits

    cache = wk.CompactCache(llama, "adakv:observe=4:floor=0", 20)  # type: ignore[arg-type]
    compact_logits(llama, cache, prompt(200), [])  # type: ignore[arg-type]
    report = cache.report
    assert report.kept_bytes <= report.held_bytes < report.full_bytes / 4
