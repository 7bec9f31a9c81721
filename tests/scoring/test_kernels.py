"""The fused kernels equal scoring/attention.py: through Triton's interpreter, or on a GPU (WINNOW_TEST_DEVICE=cuda)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.models import DEVICE
from winnowkv.scoring import attention as scores

kernels = pytest.importorskip("winnowkv.scoring.kernels", reason="the package triton is not installed")
CUDA = DEVICE == "cuda"
# Numpy, which interprets, has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
SHAPES = [(1, 6, 2, 37, 301, 64), (2, 4, 2, 64, 515, 80), (1, 2, 1, 70, 130, 16), (1, 3, 3, 1, 40, 32), (1, 2, 2, 5, 5, 8)]
MARKED = [pytest.param(shape, marks=[pytest.mark.slow] if shape in SHAPES[:2] else []) for shape in SHAPES]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Queries as models hand them over, token by token, and keys; B Hq Hkv W S D."""
    batch, heads, kv_heads, window, tokens, size = shape
    draw = torch.Generator().manual_seed(sum(shape))
    queries = 2 * torch.randn(batch, window, heads, size, generator=draw).transpose(1, 2)
    keys = torch.randn(batch, kv_heads, tokens, size, generator=draw)
    return queries.to(DEVICE, dtype), keys.to(DEVICE, dtype), size**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MARKED, ids=str)
def test_fused_received_attention_equals_the_eager_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    queries, keys, scale = drawn(shape, dtype)
    expected = scores.received(queries.float(), keys.float(), scale)
    torch.testing.assert_close(kernels.received(queries, keys, scale), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MARKED, ids=str)
def test_fused_moments_equal_the_eager_scores(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    queries, keys, scale = drawn(shape, dtype)
    window, tokens, every = shape[3], shape[4], 4
    mean, square, entropy = scores.moments(queries.float(), keys.float(), scale, tokens, causal=causal, every=every)
    sums, squares, spread = kernels.moments(queries, keys, scale, causal=causal, every=every)
    torch.testing.assert_close(sums / window, mean, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(squares / window, square, atol=1e-6, rtol=1e-4)
    share = len(range(0, window, every)) / window
    torch.testing.assert_close(spread.sum() / share, entropy, atol=1e-3, rtol=1e-4)


def test_scores_use_the_kernels_if_they_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, scale = drawn(SHAPES[0], torch.float16)
    expected = [
        *scores.expected_attention(queries.float(), keys.float(), scale, 200),
        scores.window_attention(queries.float(), keys.float(), scale),
    ]
    monkeypatch.setattr(scores, "fused", lambda keys: keys.dtype == torch.float16)
    called: list[str] = []
    run = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda *given, **more: called.append("run") or run(*given, **more))
    found = [*scores.expected_attention(queries, keys, scale, 200), scores.window_attention(queries, keys, scale)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    assert len(called) == 2


def test_the_kernels_take_sixteen_bits_on_cuda_only() -> None:
    assert not scores.fused(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16))
    if CUDA:
        assert scores.fused(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device="cuda"))
        assert not scores.fused(torch.zeros(1, 1, 1, 8, device="cuda"))
