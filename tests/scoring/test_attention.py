"""Scores against naive loops in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from winnowkv.models.info import ModelInfo
from winnowkv.policies import LayerStates, PromptInfo
from winnowkv.policies.expected import Expected
from winnowkv.prompt.structure import LONGEST_QUESTION
from winnowkv.scoring import attention as under_test
from winnowkv.scoring.attention import (
    HALF_PRECISION_KEYS,
    accumulated_attention,
    causal_attention,
    expected_attention,
    group_reduce,
    moments,
    pool,
    some_heads_attention,
    tiles,
    window_attention,
)
from winnowkv.scoring.spans import window_reduce

unhurried = settings(deadline=None)  # a busy machine is no failure


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Query by query, key by key, in Python floats."""
    batch, heads, window, _ = queries.shape
    kv_heads, tokens = keys.shape[1], keys.shape[2]
    out = torch.zeros(batch, heads, tokens - window, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            shared = keys[b, h // (heads // kv_heads)].double()
            for w in range(window):
                seen = tokens - window + w + 1  # the causal mask: a query sees itself and what came before
                logits = [float(queries[b, h, w].double() @ shared[s]) * scale for s in range(seen)]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                for c in range(tokens - window):
                    out[b, h, c] += weights[c] / sum(weights)
    return out


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "window", "tokens"),
    [(1, 4, 2, 3, 9), (2, 6, 2, 4, 12), (1, 3, 3, 1, 7), (1, 8, 1, 5, 6), (1, 2, 1, 2, 2)],
)
def test_window_attention_is_causal_softmax(batch: int, heads: int, kv_heads: int, window: int, tokens: int) -> None:
    queries, keys = rand(batch, heads, window, 5), rand(batch, kv_heads, tokens, 5, seed=1)
    found = window_attention(queries, keys, 0.7)
    assert found.dtype == torch.float32
    assert found.shape == (batch, heads, tokens - window)
    torch.testing.assert_close(found.double(), naive_attention(queries, keys, 0.7), rtol=1e-5, atol=1e-6)


def test_window_attention_computes_half_precision_in_float32() -> None:
    queries, keys = rand(1, 2, 3, 8).bfloat16(), rand(1, 1, 20, 8, seed=1).bfloat16()
    found = window_attention(queries, keys, 0.5)
    torch.testing.assert_close(found, window_attention(queries.float(), keys.float(), 0.5), rtol=0, atol=0)
    assert found.dtype == torch.float32


def test_window_attention_leaves_its_inputs_alone_and_takes_strided_ones() -> None:
    queries, keys = rand(1, 3, 4, 6).transpose(1, 2), rand(1, 9, 2, 6, seed=1).transpose(1, 2)
    before = queries.clone(), keys.clone()
    found = window_attention(queries, keys, 1.0)
    torch.testing.assert_close(found, window_attention(queries.contiguous(), keys.contiguous(), 1.0))
    assert torch.equal(queries, before[0])
    assert torch.equal(keys, before[1])


def test_the_mass_of_a_row_is_one_with_the_window_included() -> None:
    """A key that all queries love takes nearly the whole mass, one unit for each query."""
    queries, keys = torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 10, 2)
    keys[0, 0, 4] = 50.0
    found = window_attention(queries, keys, 1.0)[0, 0]
    assert found.argmax() == 4
    assert found.sum().item() == pytest.approx(3.0)


@pytest.mark.parametrize("tile", [1, 40, 90, 400, 10**6])
def test_tiles_of_any_size_give_the_same(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no map is larger than a tile, or than one query's."""
    queries, keys = rand(2, 6, 7, 5), rand(2, 2, 40, 5, seed=1)
    attention, sizes, tiles = causal_attention(queries, keys, 0.6), [], under_test.tiles

    def watched(*args: object, **kwargs: object) -> Iterator[object]:
        for found in tiles(*args, **kwargs):  # type: ignore[arg-type]
            sizes.append(found[3].numel())
            yield found

    monkeypatch.setattr(under_test, "TILE_LOGITS", tile)
    monkeypatch.setattr(under_test, "tiles", watched)
    torch.testing.assert_close(window_attention(queries, keys, 0.6), attention.sum(-2)[..., :33])
    mean, square, entropy = moments(queries, keys, 0.6, 33, causal=True)
    torch.testing.assert_close(mean, attention.mean(-2)[..., :33])
    torch.testing.assert_close(square, attention.square().mean(-2)[..., :33])
    context = attention[..., :33].double()
    torch.testing.assert_close(entropy.double(), -(context * context.log()).sum(), rtol=1e-5, atol=0)
    full = accumulated_attention(rand(1, 6, 40, 5), keys[:1], 0.6, block=16)
    torch.testing.assert_close(full, causal_attention(rand(1, 6, 40, 5), keys[:1], 0.6).sum(-2))
    assert max(sizes) <= max(tile, 40)


def test_the_scores_of_some_heads_come_in_the_order_that_was_asked_for() -> None:
    """Also if it is all of them."""
    queries, keys = rand(1, 4, 3, 5), rand(1, 2, 20, 5, seed=1)
    every = window_attention(queries, keys, 0.5)
    for heads in ([2, 0, 3, 1], [3, 1], [0, 1, 2, 3]):
        torch.testing.assert_close(some_heads_attention(queries, keys, 0.5, heads), every[:, heads])


def test_queries_that_require_a_gradient_are_scored_without_one() -> None:
    """A model that is called outside of ``no_grad``."""
    queries, keys = rand(1, 4, 3, 5).requires_grad_(), rand(1, 2, 20, 5, seed=1).requires_grad_()
    for found in (window_attention(queries, keys, 0.5), *expected_attention(queries, keys, 0.5, 17)):
        assert not found.requires_grad
    assert not accumulated_attention(rand(1, 4, 20, 5).requires_grad_(), keys, 0.5).requires_grad


def test_half_precision_is_multiplied_in_half_precision_only_where_it_was_asked_for() -> None:
    """Of bfloat16 keys; the scores of expected then move by a percent, and those of float32 keys not at all."""
    queries, keys = rand(1, 4, 64, 16), rand(1, 2, 700, 16, seed=1).bfloat16()
    rough, exact = expected_attention(queries, keys, 0.25, 690), expected_attention(queries, keys.float(), 0.25, 690)
    assert not torch.equal(rough[0], exact[0])
    torch.testing.assert_close(rough[0], exact[0], rtol=0.03, atol=1e-4)
    torch.testing.assert_close(rough[1], exact[1], rtol=0.01, atol=0)
    found = moments(queries, keys, 0.25, 636, causal=True)
    for half, single in zip(found, moments(queries, keys.float(), 0.25, 636, causal=True), strict=True):
        assert torch.equal(half, single)


@pytest.mark.parametrize(("tokens", "half"), [(HALF_PRECISION_KEYS - 1, False), (HALF_PRECISION_KEYS, True)])
def test_few_keys_are_multiplied_in_float32(tokens: int, half: bool) -> None:
    """The framework keeps kernels for each shape of a product in bfloat16, and short prompts come in many."""
    queries, keys = rand(1, 2, 30, 16), rand(1, 1, tokens, 16, seed=1).bfloat16()
    ((_, _, _, found),) = tiles(queries, keys, 0.25, half=True)
    assert torch.equal(found, found.bfloat16().float()) == half  # rounded
    ((_, _, _, exact),) = tiles(queries, keys.float(), 0.25)
    assert torch.equal(found, exact) != half


class Halves(TorchDispatchMode):
    """Shapes of the products in bfloat16 that are computed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm and args[0].dtype == torch.bfloat16:
            self.shapes.add((*args[0].shape, *args[1].shape))
        return func(*args, **kwargs or {})


def test_the_length_of_the_question_makes_no_new_shape_of_a_product_in_half_precision() -> None:
    """At no length of a prompt; shapes that the framework keeps kernels for come from prompts of other lengths only."""
    for tokens in (64, 200, 420, HALF_PRECISION_KEYS - 1, HALF_PRECISION_KEYS, 700):
        queries, keys = rand(1, 6, tokens, 8), rand(1, 2, tokens, 8, seed=1).bfloat16()
        model = ModelInfo("Drawn", 1, 6, 2, "")
        with Halves() as seen:
            for question in (8, 31, 50, LONGEST_QUESTION):
                if question < tokens // 2:
                    bound = Expected(observe=question).bind(model, PromptInfo(tokens, 1, 40))
                    bound.parts.scorer.score(LayerStates(0, queries[:, :, bound.query_positions()], keys, keys, 0.3))
        assert len(seen.shapes) == (tokens >= HALF_PRECISION_KEYS)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_group_reduce_joins_the_query_heads_of_one_kv_head(how: str) -> None:
    scores = rand(2, 6, 7).abs()
    found = group_reduce(scores, 2, how)  # type: ignore[arg-type]
    for b in range(2):
        for kv in range(2):
            for c in range(7):
                members = [scores[b, kv * 3 + g, c].item() for g in range(3)]
                assert found[b, kv, c].item() == pytest.approx(sum(members) / 3 if how == "mean" else max(members))
    assert torch.equal(group_reduce(scores, 6, how), scores)  # type: ignore[arg-type]


@unhurried
@given(st.integers(1, 14), st.sampled_from([1, 3, 5, 7, 9]), st.sampled_from(["avg", "max"]), st.integers(0, 999))
def test_pool_divides_by_the_kernel_and_max_ignores_padding(tokens: int, kernel: int, kind: str, seed: int) -> None:
    scores = -rand(1, 2, tokens, seed=seed).abs()  # all negative: a zero of the padding would win a maximum
    found = pool(scores, kernel, kind)  # type: ignore[arg-type]
    assert found.shape == scores.shape
    for h in range(2):
        for c in range(tokens):
            near = [scores[0, h, i].item() for i in range(c - kernel // 2, c + kernel // 2 + 1) if 0 <= i < tokens]
            naive = sum(near) / kernel if kind == "avg" else max(near)
            assert found[0, h, c].item() == pytest.approx(naive, rel=1e-5)


@unhurried
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
def test_window_reduce_is_the_mean_of_the_best(tokens: int, width: int, top: int, seed: int) -> None:
    scores = rand(1, 2, tokens, seed=seed).abs()
    found = window_reduce(scores, width, top)
    assert found.shape == (1, 2, -(-tokens // width))
    for h in range(2):
        row = scores[0, h].tolist()
        for i, start in enumerate(range(0, tokens, width)):
            best = sorted(row[start : start + width], reverse=True)[:top]
            assert found[0, h, i].item() == pytest.approx(sum(best) / len(best), rel=1e-5)
