"""Quantization of one tensor: the error bound against a naive reference, its bytes, padding; and how it is asked for."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, prompt
from support.reference import compact_logits
from winnowkv.cache.quantized import QUANTIZATION_GROUP, channel_group, quantize, stored_bytes
from winnowkv.types import BITS

STORED = ("int8", "int4")


# One tensor


def members(entries: int, size: int, per_channel: bool) -> list[tuple[slice, slice]]:
    """Which entries and channels share a scale, counted from the newest entry."""
    if per_channel:
        ends = range(entries, 0, -QUANTIZATION_GROUP)
        return [(slice(max(0, end - QUANTIZATION_GROUP), end), slice(c, c + 1)) for end in ends for c in range(size)]
    width = channel_group(size)
    return [(slice(t, t + 1), slice(c, c + width)) for t in range(entries) for c in range(0, size, width)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_channel", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("entries", "size"), [(1, 8), (5, 80), (64, 64), (65, 8), (200, 16), (130, 128)])
def test_every_value_comes_back_to_within_half_a_step(
    stored: str, entries: int, size: int, per_channel: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(entries * size)
    states = torch.randn(2, 2, entries, size, generator=generator)
    states[..., 1] += 90  # a channel of outliers, as keys have
    states[:, :, 0] = 3  # an entry without range
    states[0, 0] *= 1e-3
    states = states.to(dtype)
    packed = quantize(states, stored, per_channel=per_channel)
    back = packed.dequantize()
    assert back.dtype == dtype
    assert back.shape == states.shape
    for row in range(2):
        for head in range(2):
            for group in members(entries, size, per_channel):
                exact = states[row, head][group].double()
                step = (exact.max() - exact.min()) / (2 ** BITS[stored] - 1)
                # The step is stored, and what comes back is rounded, in the model's dtype.
                rounding = torch.finfo(dtype).eps * exact.abs().max() + torch.finfo(dtype).tiny
                bound = step / 2 * (1 + 2 * torch.finfo(dtype).eps) + rounding
                assert (back[row, head][group].double() - exact).abs().max() <= bound


def test_fewer_bits_are_really_coarser() -> None:
    states = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(1))
    errors = [float((quantize(states, s, per_channel=True).dequantize() - states).abs().mean()) for s in STORED]
    assert errors[1] / errors[0] == pytest.approx(255 / 15, rel=0.05)


def test_an_outlier_channel_of_the_keys_does_not_cost_the_others() -> None:
    """Why keys are grouped per channel and not, as values are, per token."""
    states = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(2))
    states[..., 7] *= 100
    others = [channel for channel in range(64) if channel != 7]
    errors = []
    for per_channel in (True, False):
        back = quantize(states, "int4", per_channel=per_channel).dequantize()
        errors.append(float((back - states)[..., others].abs().mean()))
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize("heads", [1, 2], ids=["rows", "ragged-heads"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("stored", STORED)
def test_padding_changes_no_code(stored: str, per_channel: bool, heads: int) -> None:
    """Rows and heads of other lengths, with any values in their padding: each is coded as it would be alone."""
    generator = torch.Generator().manual_seed(5)
    longest, lengths = 150, [[150, 97], [3, 64]] if heads == 2 else [[150, 150], [97, 97]]
    states = torch.randn(2, 2, longest, 16, generator=generator) + 40
    valid = torch.zeros(2, heads, longest, dtype=torch.bool)
    for row in range(2):
        for head in range(2):
            states[row, head, : longest - lengths[row][head]] = [0.0, math.nan, 1e9][(row + head) % 3]
            valid[row, head % heads, longest - lengths[row][head] :] = True
    back = quantize(states, stored, per_channel=per_channel, valid=valid).dequantize()
    assert bool(back.isfinite().all()), "not a number in the padding would pass every mask"
    for row in range(2):
        for head in range(2):
            kept = slice(longest - lengths[row][head], None)
            alone = quantize(states[row : row + 1, head : head + 1, kept], stored, per_channel=per_channel)
            assert torch.equal(back[row, head, kept], alone.dequantize()[0, 0])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("entries", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("size", [8, 80, 128])
def test_stored_bytes_are_the_storage(entries: int, size: int, stored: str) -> None:
    for per_channel in (True, False):
        packed = quantize(torch.randn(1, 2, entries, size).bfloat16(), stored, per_channel=per_channel)
        groups = math.ceil(entries / 64) * size if per_channel else entries * (2 if size > 64 else 1)
        naive = entries * size * BITS[stored] // 8 + groups * (2 + 2)
        assert stored_bytes(entries, size, stored, 2, per_channel=per_channel) == naive
        assert packed.held_bytes == 2 * naive
        assert packed.entries == entries


def test_selecting_rows_selects_their_codes() -> None:
    packed = quantize(torch.randn(3, 2, 70, 8), "int4", per_channel=True)
    assert torch.equal(packed.select(torch.tensor([2, 0, 2])).dequantize(), packed.dequantize()[[2, 0, 2]])


def test_an_odd_head_size_has_no_pairs() -> None:
    with pytest.raises(wk.InputError, match="head size 7 is odd: use int8"):
        quantize(torch.randn(1, 1, 4, 7), "int4", per_channel=False)
    assert quantize(torch.randn(1, 1, 4, 7), "int8", per_channel=False).dequantize().shape == (1, 1, 4, 7)


def test_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel) -> None:
    """Quanto has C++ and CUDA sources that it compiles when its packed tensors are read."""
    import optimum.quanto.library.extensions.extension as extension

    monkeypatch.setattr(extension, "load", lambda *_, **__: pytest.fail("an extension was compiled"))
    cache = wk.CompactCache(llama, "int4", 1)
    compact_logits(llama, cache, prompt(PROMPT), [prompt(3)])
    assert cache.compact_layers[0].frozen == PROMPT


# Asking for it


def test_a_policy_stored_in_fewer_bits_is_that_of_the_spec(llama: PreTrainedModel) -> None:
    asked = wk.CompactCache(llama, wk.policy("snapkv:observe=8").stored_as("int4"), 20)
    spelled = wk.CompactCache(llama, "snapkv:observe=8:quantize=int4", 20)
    assert asked.compression.policy == spelled.compression.policy
    assert asked.report.quantize == spelled.report.quantize == "int4"
    assert wk.policy("adakv:of=snapkv:observe=8").stored_as("int4") == wk.policy("adakv:of=snapkv:observe=8:quantize=int4")
    assert wk.CompactCache(llama, "int8", 20).report.quantize == "int8"
    assert wk.CompactCache(llama, "full", 20).report.quantize is None


@pytest.mark.parametrize("stored", STORED)
def test_int8_and_int4_are_the_quantized_full_cache(model: PreTrainedModel, stored: str) -> None:
    runs = []
    for spec in (stored, f"full:quantize={stored}"):
        cache = wk.CompactCache(model, spec, 1)
        runs.append((compact_logits(model, cache, prompt(PROMPT), [prompt(4, seed=2)]), cache))
    (named, cache), (spelled, other) = runs
    assert torch.equal(named, spelled)
    assert cache.report.kept_entries == [[PROMPT] * model.config.num_hidden_layers]
    for field in ("kept_entries", "kept_bytes", "full_bytes", "held_bytes", "peak_bytes", "quantize"):
        assert getattr(cache.report, field) == getattr(other.report, field)
    assert f"in {stored}, held" in str(cache.report)


def test_unknown_values_of_quantize_are_refused(llama: PreTrainedModel) -> None:
    for wrong in ("int3", 4, "INT8"):
        with pytest.raises(wk.PolicyError, match=r"quantize=.* must be one of int8, int4"):
            wk.policy("snapkv", quantize=wrong)
        with pytest.raises(wk.PolicyError, match="must be one of int8, int4"):
            wk.CompactCache(llama, f"snapkv:quantize={wrong}", 20)
        with pytest.raises(wk.PolicyError, match="must be one of int8, int4"):
            wk.policy("snapkv").stored_as(wrong)
    with pytest.raises(wk.PolicyError, match="int8: quantize=int4 contradicts the name: use full:quantize=int4"):
        wk.CompactCache(llama, "int8:quantize=int4", 20)


def test_without_the_package_the_error_says_what_to_install(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("optimum", "optimum.quanto"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(wk.InputError, match="pip install 'optimum-quanto"):
        wk.CompactCache(llama, "snapkv:quantize=int8", 20)
    wk.CompactCache(llama, "snapkv", 20)


@pytest.mark.slow
def test_a_cache_without_quantization_does_not_import_the_package() -> None:
    code = (
        "import sys, winnowkv.cache.cache, winnowkv.policies as p\n[p.policy(n) for n in p.names()]\n"
        "assert 'optimum' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
