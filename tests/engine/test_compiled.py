"""Compiled steps give the logits of eager ones, with few graphs."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from transformers import PreTrainedModel

from support.models import DEVICE
from support.slots import LENGTHS, ROOM, alone, assert_same, read, together
from winnowkv.engine import compiled as compiling
from winnowkv.engine.slots import Slots

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"
)
cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="only on the CPU")


def shallow(model: PreTrainedModel) -> PreTrainedModel:
    """Its first two layers, since compiling takes seconds a layer; graphs of tests before are forgotten."""
    torch._dynamo.reset()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


@needs_compiler
@pytest.mark.parametrize("flexible", [True, False])
def test_compiled_steps_give_the_logits_of_eager_ones(llama: PreTrainedModel, flexible: bool) -> None:
    shallow(llama)
    settings = {"policy": "adakv:floor=0:of=snapkv:observe=4", "budget": 0.5}
    expected = [alone(llama, row, settings) for row in range(len(LENGTHS))]
    slots = Slots(llama, compile=True)
    slots._flexible = flexible  # False as on a GPU
    assert slots.warm_up(2, 40, ROOM) > 0
    assert slots.rows == slots.held_bytes == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(together(llama, slots, settings, 2), expected)


@cpu_only
@needs_compiler
def test_two_graphs_serve_any_rows_and_columns(llama: PreTrainedModel) -> None:
    """Buffers grow and shrink, layers come to differ, other slots of the model come after these: nothing is compiled again."""
    shallow(llama)
    full, uneven = {"policy": "full", "budget": 1}, {"policy": "pyramidkv:observe=4:slope=5", "budget": 30}
    counters, first, shapes = torch._dynamo.utils.counters["stats"], Slots(llama, compile=True), set[tuple[int, ...]]()
    before = counters["unique_graphs"]
    first.warm_up(3, 200, ROOM)
    for slots, rows, settings in ((first, 2, full), (Slots(llama, compile=True), 4, full), (first, 3, uneven)):
        expected = [alone(llama, row, settings) for row in range(len(LENGTHS))]
        step = slots.step
        slots.step = lambda tokens, slots=slots, step=step: (step(tokens), shapes.add(slots.layers[0].keys.shape))[0]
        assert_same(together(llama, slots, settings, rows), expected)
    assert {rows for rows, *_ in shapes} == {1, 2, 3, 4}
    assert len({columns for _, _, columns, _ in shapes}) >= 3
    assert len({layer.keys.shape[2] for layer in read(llama, 0, uneven).layers}) == 2
    assert counters["unique_graphs"] == before + 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_row_of_a_linear_layer(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, given, more = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((24, 40), (3, 1, 40), (24,)))
    added = more if bias else None
    for rows in (given[:1], given[0, 0], given):
        exact = torch.nn.functional.linear(rows.double(), weight.double(), None if added is None else added.double())
        got = compiling.linear(rows, weight, added)
        assert (got.dtype, got.shape) == (dtype, exact.shape)
        torch.testing.assert_close(got.double(), exact, rtol=2e-2 if dtype is torch.bfloat16 else 2e-3, atol=2e-2)


@cpu_only
@needs_compiler
def test_compiled_steps_of_one_row_use_it(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow(llama).to(torch.bfloat16)
    settings, replaced, linear = {"policy": "full", "budget": 1}, list[tuple[int, ...]](), compiling.linear
    monkeypatch.setattr(compiling, "linear", lambda given, *args: replaced.append(given.shape) or linear(given, *args))
    (expected, got) = (together(llama, Slots(llama, compile=compile), settings, 1) for compile in (False, True))
    assert len(replaced) >= 2 * 7 + 1  # each projection, and the logits
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_a_model_that_cannot_be_compiled_decodes_eagerly(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = llama.model.forward

    def breaks(*args: object, **kwargs: object) -> object:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama.model, "forward", breaks)
    settings = {"policy": "snapkv:observe=4", "budget": 0.5}
    expected = [alone(llama, row, settings) for row in range(len(LENGTHS))]
    slots = Slots(llama, compile=True)
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be compiled .*: decode steps are eager") as told:
        got = together(llama, slots, settings, 3)
    assert len(told) == 1
    assert_same(got, expected)
