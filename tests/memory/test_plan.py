"""Planned bytes are the bytes that a compact cache holds; more memory never fits less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedModel

import winnowkv as wk
from support.architectures import REFUSED, SERVED, build
from support.cases import Case
from support.models import PROMPT, WINDOW, hybrid, prompt
from support.profiles import random_profile
from winnowkv.budget import Budget
from winnowkv.cache.reading import extend, prefill
from winnowkv.memory.plan import LayerShape, MemoryPlan, Need, Shape, need
from winnowkv.memory.shape import read_shape
from winnowkv.models.info import ModelInfo
from winnowkv.policies import BoundPolicy
from winnowkv.policies.winnow import Winnow
from winnowkv.prompt.task import TaskProfile

LOCALIZATION = TaskProfile("localization")
LLAMA = Shape(
    (LayerShape(2, 8, 8),) * 5, itemsize=2, parameters=1000, positions=4096, model_info=ModelInfo("Tiny", 5, 8, 2, "")
)
MIXED = Shape(
    (LayerShape(2, 16, 12, window=64), LayerShape(2, 16, 12), LayerShape(2, 16, 12, window=64), LayerShape(2, 16, 12)),
    itemsize=4, parameters=1000, positions=None, model_info=ModelInfo("Mixed", 4, 8, 2, ""),
)  # fmt: skip
SPECS = [
    "full", "int8", "streaming", "snapkv:observe=8", "pyramidkv", "windowkv", "dynamickv:ceiling=2", "cake:observe=4",
    "snapkv:observe=8:quantize=int4", "expected", "winnow", "winnow:task=aggregation:observe=8",
]  # fmt: skip
ASKED = {
    "shape": st.sampled_from([LLAMA, MIXED]),
    "spec": st.sampled_from(SPECS),
    "budget": st.one_of(st.sampled_from([0.12, 0.25, 0.5, 1.0]), st.integers(40, 3000)),
    "context": st.integers(400, 4096),
    "batch": st.integers(1, 12),
    "memory": st.integers(1, 2**24),
}


class Watched(wk.CompactCache):
    """Notes the most storage of keys and values of all layers, each storage counted once."""

    most = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        states = super().update(*args, **kwargs)
        self.most = max(self.most, storage(self, *states))
        return states


def storage(cache: wk.CompactCache, *returned: torch.Tensor) -> int:
    states = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values") if layer.is_initialized]
    states.extend(returned)  # what attention works on while a sliding layer holds its window only
    return sum({s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in states}.values())


def planned(model: PreTrainedModel, case: Case) -> tuple[Need, BoundPolicy]:
    """What the case's prompt needs, from the model's config alone."""
    policy, task = wk.policy(case.spec), TaskProfile.of(case.task)
    asked = wk.PromptInfo(PROMPT, model.config.num_hidden_layers, case.budget, task)
    return need(read_shape(model.config, 4), policy, Budget(case.budget), PROMPT, task), policy.bind(ModelInfo.of(model), asked)


def decided(bound: BoundPolicy) -> bool:
    """Whether a policy knows before it reads what every layer ends with."""
    return not bound.policy.evicts or sum(bound.parts.allocator.prefill_limits()) == bound.prompt.total


def test_planned_bytes_are_those_of_the_report(model: PreTrainedModel, case: Case) -> None:
    one, bound = planned(model, case)
    cache = wk.CompactCache(model, **case.settings)
    prefill(model, prompt(PROMPT), cache)
    assert one.rest == one.kept == cache.report.kept_bytes
    if case.ragged:  # heads that keep fewer are padded to the longest of their layer, as the help says
        assert one.rest <= cache.report.held_bytes
        return
    assert one.rest == cache.report.held_bytes
    if decided(bound):
        assert one.peak == cache.report.peak_bytes
    else:
        assert cache.report.peak_bytes <= one.peak <= cache.report.full_bytes


def test_planned_bytes_of_quantized_entries(model: PreTrainedModel, quantized: Case) -> None:
    pytest.importorskip("optimum.quanto")
    one, bound = planned(model, quantized)
    cache = wk.CompactCache(model, **quantized.settings)
    prefill(model, prompt(PROMPT), cache)
    if decided(bound) and not quantized.ragged:
        assert one.kept == cache.report.kept_bytes == cache.report.held_bytes
    else:  # which head or layer keeps how many is not known before: one scale and zero point of each channel more or less
        scales = model.config.num_hidden_layers * 2 * 8 * (4 + 4)
        assert abs(one.kept - cache.report.kept_bytes) <= scales
    if not quantized.ragged:
        assert one.peak >= cache.report.peak_bytes


@pytest.mark.parametrize("tokens", [WINDOW - 6, WINDOW, WINDOW + 6, 3 * WINDOW, PROMPT])
@pytest.mark.parametrize("spec", ["full", "snapkv:observe=4", "pyramidkv:observe=4", "windowkv:observe=4:window=4:top=2"])
def test_layers_that_slide_are_counted(tokens: int, spec: str) -> None:
    model = hybrid()
    one = need(read_shape(model.config, 4), wk.policy(spec), Budget(8), tokens, LOCALIZATION)
    cache = Watched(model, spec, 8, task="localization")
    prefill(model, prompt(tokens), cache)
    assert one.kept == cache.report.kept_bytes
    assert one.peak == max(cache.most, one.rest)  # at rest the first generated token is counted in its window
    before = storage(cache)
    extend(model, cache, prompt(1), [tokens])
    sliding = sum(part.untyped_storage().nbytes() for layer in cache.sliding_layers for part in (layer.keys, layer.values))
    entry = 4 * 2 * 2 * 16 * 4  # layers that slide, keys and values, KV heads, head size, float32
    assert sliding == min(tokens + 1, WINDOW) * entry
    assert one.sliding == min(tokens, WINDOW) * entry
    assert one.kept < before <= one.peak


@pytest.mark.parametrize("tokens", [WINDOW - 6, WINDOW, WINDOW + 6, 2 * WINDOW - 2, 3 * WINDOW, PROMPT])
@pytest.mark.parametrize(
    "spec",
    [
        "cake:observe=4",
        "expected:observe=4",
        "winnow:observe=4:least=2",
        "adakv:of=snapkv:observe=4",
        "expected:observe=4:equal=true",
        "winnow:observe=4:least=2:equal=true",
    ],
)
def test_plans_with_sliding_layers_are_never_exceeded(spec: str, tokens: int) -> None:
    """Policies whose layers share by prompt; what sliding layers hold after a prompt may be more than their window."""
    model = hybrid()
    cache = Watched(model, spec, 8)
    prefill(model, prompt(tokens), cache)
    padded = cache.report.held_bytes - cache.report.kept_bytes
    assert cache.most - padded <= need(read_shape(model.config, 4), wk.policy(spec), Budget(8), tokens, TaskProfile()).peak


@pytest.mark.parametrize("spec", ["cake", "expected", "winnow", "winnow:task=aggregation", "winnow:equal=true"])
def test_policies_that_bound_what_they_hold_are_planned_with_less(spec: str) -> None:
    shape = replace(LLAMA, layers=LLAMA.layers * 4, model_info=replace(LLAMA.model_info, layers=20))
    made = wk.policy(spec)
    if isinstance(made, Winnow):  # without a profile it holds all
        made = replace(made, profile=random_profile(shape.model_info, 20))
    one = need(shape, made, Budget(0.12), 4000, TaskProfile())
    parts = made.bind(shape.model_info, wk.PromptInfo(4000, 20, 480)).parts
    assert one.peak == parts.allocator.peak_entries() * shape.full_bytes(1) // 20
    assert one.rest < one.peak <= 0.35 * shape.full_bytes(4000)


@pytest.mark.parametrize(
    "name", [name for name in SERVED if name != "opt"]
)  # the oldest transformers asks OPT's mask for a value
def test_a_shape_is_what_the_cache_holds(name: str) -> None:
    config, arguments, compressed = SERVED[name]
    model = build(config, arguments)
    shape, cache = read_shape(model.config, 4), wk.CompactCache(model, "full", 1)
    prefill(model, prompt(5), cache)
    assert len(shape.compressed) == compressed
    for layer, held in zip(shape.layers, cache.layers, strict=True):
        assert layer.kv_bytes(5, 4) == held.keys.nbytes + held.values.nbytes
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.model_info == ModelInfo.of(model)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_served_is_not_planned(name: str) -> None:
    config, arguments, message = REFUSED[name]
    model = build(config, arguments)
    with pytest.raises(wk.UnsupportedModelError, match=message):
        read_shape(model.config, 4)


def test_keys_larger_than_values_are_planned_as_they_are_held_or_refused() -> None:
    """Latent attention: releases differ in whether its keys come through the interface, and a plan follows them."""
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 12, "first_k_dense_replace": 2,
    }  # fmt: skip
    model = build("DeepseekV3Config", sizes)
    try:
        cache = wk.CompactCache(model, "full", 1)
        prefill(model, prompt(5), cache)
    except wk.UnsupportedModelError as error:
        with pytest.raises(wk.UnsupportedModelError, match=str(error)[:40]):
            read_shape(model.config, 4)
    else:
        assert read_shape(model.config, 4).full_bytes(5) == cache.held_bytes


def test_a_model_that_cannot_be_judged_without_weights_is_refused() -> None:
    model = build("LlamaConfig", {**SERVED["mistral"][1], "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    with pytest.raises(wk.UnsupportedModelError, match="without weights"):
        read_shape(model.config, 4)


def plan(shape: Shape, context: int, batch: int, memory: int) -> MemoryPlan:
    return MemoryPlan(shape, context, batch, memory, weights=2000)


@settings(deadline=None, max_examples=150)
@given(**ASKED, more=st.integers(0, 2**22))
def test_more_memory_never_fits_less(
    shape: Shape, spec: str, budget: int | float, context: int, batch: int, memory: int, more: int
) -> None:
    policy = wk.policy(spec)
    less, larger = (
        plan(shape, context, batch, size).fit(spec, policy, budget, LOCALIZATION) for size in (memory, memory + more)
    )
    assert less.fits <= larger.fits
    assert less.largest_batch <= larger.largest_batch
    assert less.largest_context <= larger.largest_context


@settings(deadline=None, max_examples=150)
@given(**ASKED)
def test_the_largest_that_fit_fit_and_one_more_does_not(
    shape: Shape, spec: str, budget: int | float, context: int, batch: int, memory: int
) -> None:
    policy = wk.policy(spec)

    def fits(tokens: int, rows: int) -> bool:
        return plan(shape, tokens, rows, memory).fit(spec, policy, budget, LOCALIZATION).fits

    found = plan(shape, context, batch, memory).fit(spec, policy, budget, LOCALIZATION)
    assert found.fits == (found.largest_batch >= batch)
    assert found.fits == (found.largest_context >= context)
    if found.largest_batch:
        assert fits(context, found.largest_batch)
    assert not fits(context, found.largest_batch + 1)
    if found.largest_context:
        assert fits(found.largest_context, batch)
    if found.largest_context >= 400 and found.largest_context != shape.positions:
        assert not fits(found.largest_context + 1, batch)
    # A plan that is given just what it needs works, and with a byte less does not.
    assert plan(shape, context, batch, found.needed_bytes).fit(spec, policy, budget, LOCALIZATION).fits
    assert not plan(shape, context, batch, found.needed_bytes - 1).fit(spec, policy, budget, LOCALIZATION).fits


def test_one_request_is_read_while_the_others_rest() -> None:
    one = need(LLAMA, wk.policy("snapkv:observe=8"), Budget(100), 1000, TaskProfile())
    entry = 2 * 2 * 8 * 2  # keys and values, KV heads, head size, bfloat16
    assert (one.kept, one.peak) == (5 * 100 * entry, (4 * 100 + 1000) * entry)
    assert one.of_batch(3) == 2 * one.kept + one.peak
    assert (one.largest_batch(one.of_batch(3)), one.largest_batch(one.of_batch(3) - 1), one.largest_batch(one.peak - 1)) == (
        3,
        2,
        0,
    )


def test_requests_that_cannot_be_planned_are_refused() -> None:
    policy = wk.policy("snapkv:observe=32")
    with pytest.raises(wk.InputError, match="a context of 4097 tokens passes the model's 4096 positions: give at most 4096"):
        plan(LLAMA, 4097, 1, 2**20)
    with pytest.raises(wk.BudgetError, match="keep at least 32 entries"):
        plan(LLAMA, 1000, 1, 2**20).fit("snapkv", policy, 20)
    # A prompt no longer than the window is kept whole, as in prefill.
    assert plan(LLAMA, 30, 1, 2**20).fit("snapkv", policy, 20).kept_bytes == LLAMA.full_bytes(30)
    # Of prompts of which 12% are below the window's 32 entries, 32 are kept: shorter ones take less.
    for tokens in (267, 200, 20):
        just = need(LLAMA, policy, Budget(0.12), tokens, TaskProfile()).peak + 2000
        assert plan(LLAMA, 1000, 1, just).fit("snapkv", policy, 0.12).largest_context == tokens
        assert plan(LLAMA, 1000, 1, just - 1).fit("snapkv", policy, 0.12).largest_context == tokens - 1
    # With 20 entries nothing longer than the window can be planned.
    assert plan(LLAMA, 30, 1, 2**20).fit("snapkv", policy, 20).largest_context == 32


@pytest.mark.slow
def test_nothing_is_allocated() -> None:
    """A model whose weights take 140 GB is read in a moment."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    shape = read_shape(config, torch.bfloat16.itemsize)
    assert (shape.parameters, shape.positions) == (70_553_706_496, 131072)
    assert shape.full_bytes(1) == 80 * 2 * 8 * 128 * 2
