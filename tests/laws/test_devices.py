"""A model whose layers are on two devices keeps and says what it does on one, and no operation mixes the devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.auto import profile_file
from support.batch import padded
from support.cases import Case
from support.devices import CPU, FIRST, SECOND, PretendDevices, put, spread, where
from support.models import PROMPT, built, hybrid, prompt
from support.reference import positions
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.stacked import stack
from winnowkv.engine.slots import Slots
from winnowkv.models.curve import Curve

FIRST_LAYERS = 2  # of the model, on the first device
SNAPKV, WINNOW = "snapkv:observe=4:kernel=3", "winnow:observe=4:samples=16:least=4"


@pytest.fixture
def llama() -> PreTrainedModel:
    """Two layers on one device, three on another one."""
    model = copy.deepcopy(built("llama"))
    spread(model, lambda layer: FIRST if layer < FIRST_LAYERS else SECOND)
    return model


@pytest.fixture
def devices() -> Iterator[None]:
    with PretendDevices():
        yield


def ids(tokens: int = PROMPT, seed: int = 0) -> torch.Tensor:
    return put(prompt(tokens, seed), FIRST)


def plain(cache: wk.CompactCache, row: int = 0) -> list[Any]:
    return [None if kept is None else kept.tolist() for kept in positions(cache, row)]


def on_one_device(settings: dict[str, Any], steps: int, tokens: int = PROMPT, **reading: Any) -> tuple[list[Any], list[int]]:
    """What is kept and said without devices."""
    model = built("llama")
    cache = wk.CompactCache(model, **settings)
    logits = prefill(model, prompt(tokens), cache, **reading)
    return plain(cache), list(greedy(model, cache, logits, steps))


def assert_spread(cache: wk.CompactCache) -> None:
    """Everything that a layer holds is where the layer is."""
    for number, layer in enumerate(cache.compact_layers):
        home = FIRST if number < FIRST_LAYERS else SECOND
        parts = [layer.keys, layer.values, layer.valid, layer.queries, *layer.positions]
        parts += [tensor for part in layer.quantized for tensor in (part.codes, part.scales, part.zeros)]
        assert {where(part) for part in parts if part is not None} == {home}


def test_every_policy_keeps_the_same(llama: PreTrainedModel, case: Case) -> None:
    kept, tokens = on_one_device(case.settings, 4)
    with PretendDevices():
        cache = wk.CompactCache(llama, **case.settings)
        logits = prefill(llama, ids(), cache)
        assert_spread(cache)
        assert list(greedy(llama, cache, logits, 4)) == tokens
        assert_spread(cache)
        assert plain(cache) == kept


def test_quantized_entries_stay_where_they_are(llama: PreTrainedModel, quantized: Case) -> None:
    kept, tokens = on_one_device(quantized.settings, 4)
    with PretendDevices():
        cache = wk.CompactCache(llama, **quantized.settings)
        assert list(greedy(llama, cache, prefill(llama, ids(), cache), 4)) == tokens
        assert_spread(cache)
        assert plain(cache) == kept


@pytest.mark.parametrize(
    "spec", [WINNOW, "defensivekv:observe=6", "windowkv:observe=4:window=4:group=3:task=localization", "h2o"]
)
@pytest.mark.parametrize("reading", [{"chunk": 64}, {"chunk": 64, "ceiling": 80}], ids=["chunks", "ceiling"])
def test_chunks(llama: PreTrainedModel, spec: str, reading: dict[str, Any]) -> None:
    kept, tokens = on_one_device({"policy": spec, "budget": 40}, 4, 200, **reading)
    with PretendDevices():
        cache = wk.CompactCache(llama, spec, 40)
        assert list(greedy(llama, cache, prefill(llama, ids(200), cache, **reading), 4)) == tokens
        assert_spread(cache)
        assert plain(cache) == kept


def test_a_block_and_a_decode_budget(llama: PreTrainedModel) -> None:
    settings = {"policy": SNAPKV, "budget": 20, "decode_budget": 64}
    expected = on_one_device(settings, 140)
    with PretendDevices():
        cache = wk.CompactCache(llama, **settings)
        assert (list(greedy(llama, cache, prefill(llama, ids(), cache), 140)), plain(cache)) == expected[::-1]
        assert_spread(cache)
        with wk.compress(llama, **settings) as run, torch.no_grad():
            out = llama.generate(ids(), max_new_tokens=4, do_sample=False)
        assert out[0, PROMPT:].tolist() == expected[1][:4]
        assert run.report.kept_entries == cache.report.kept_entries


def test_a_padded_batch_its_copies_and_what_is_explained(llama: PreTrainedModel) -> None:
    rows = [prompt(length, seed=length) for length in (72, 57, 44)]
    settings = {"policy": "adakv:of=expected:observe=4:samples=16", "budget": 0.4, "keep_scores": True}
    one = wk.CompactCache(built("llama"), **settings)
    prefill(built("llama"), padded(rows)[0], one, padded(rows)[1])
    with PretendDevices():
        cache = wk.CompactCache(llama, **settings)
        tokens, mask = padded(rows)
        prefill(llama, put(tokens, FIRST), cache, put(mask, FIRST))
        assert [plain(cache, row) for row in range(3)] == [plain(one, row) for row in range(3)]
        assert [str(each) for each in cache.explain(3, 9, 1)] == [str(each) for each in one.explain(3, 9, 1)]
        cache.reorder_cache(put(torch.tensor([2, 0, 1]), FIRST))
        cache.batch_repeat_interleave(2)
        assert_spread(cache)
        extend(llama, cache, put(torch.cat([prompt(3, 9)] * 6), FIRST), [72, 72, 72, 72, 72, 72])


def test_auto_and_replay(llama: PreTrainedModel, tmp_path: Path) -> None:
    budget = f"auto:0.7:{profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))}"
    kept, _ = on_one_device({"policy": WINNOW, "budget": budget}, 1)
    with PretendDevices():
        live, recorded = wk.CompactCache(llama, WINNOW, budget), wk.CompactCache(llama, "full", record=PROMPT)
        prefill(llama, ids(), live)
        prefill(llama, ids(), recorded)
        again = recorded.replay(WINNOW, budget)
        assert plain(live) == plain(again) == kept
        assert_spread(again)


def test_a_saved_cache_goes_back_to_the_devices_of_its_layers(llama: PreTrainedModel, quantized: Case, tmp_path: Path) -> None:
    with PretendDevices():
        cache = wk.CompactCache(llama, **quantized.settings)
        logits = prefill(llama, ids(), cache)
        wk.save_cache(cache, llama, tmp_path / "cache")
        loaded = wk.load_cache(tmp_path / "cache", llama)
        assert_spread(loaded)
        assert plain(loaded) == plain(cache)
        assert list(greedy(llama, loaded, logits, 4)) == list(greedy(llama, cache, logits, 4))


@pytest.mark.parametrize("ragged", [False, True])
def test_slots_and_stacks(llama: PreTrainedModel, ragged: bool) -> None:
    spec = "adakv:of=snapkv:observe=4" if ragged else SNAPKV
    with PretendDevices():
        caches = []
        for seed, length in enumerate((72, 40)):
            caches.append(wk.CompactCache(llama, spec, 20))
            prefill(llama, ids(length, seed), caches[-1])
        together = stack(caches)
        assert_spread(together)
        next_tokens = put(torch.tensor([7, 11]), FIRST)
        expected = extend(llama, together, next_tokens[:, None], [72, 40])[:, -1]
        slots = Slots(llama)
        slots.place_all(caches, 4)
        torch.testing.assert_close(slots.step(next_tokens).tolist(), expected.tolist(), rtol=0, atol=1e-4)
        for tokens in ([3, 4], [5, 6], [7, 8], [9, 10]):  # past their room
            slots.step(put(torch.tensor(tokens), FIRST))
        slots.drop(0)
        slots.step(put(torch.tensor([2]), FIRST))


def test_sliding_windows(devices: None) -> None:
    """Of which the first full-attention layer is on one device, the second on another one."""
    model = hybrid()
    spread(model, lambda layer: FIRST if layer < 3 else SECOND)
    cache = wk.CompactCache(model, "winnow:observe=4:samples=16:least=4", 20)
    prefill(model, ids(), cache)
    slots = Slots(model, like=cache)
    slots.place(cache, 3)
    slots.step(put(torch.tensor([5]), FIRST))


def test_the_pretended_devices_behave_as_devices_do(devices: None) -> None:
    here, there = put(torch.ones(3), FIRST), torch.ones(3, device=SECOND)
    assert (here.device, there.device, torch.ones(2).device) == (FIRST, SECOND, CPU)
    assert (here + 1).device == here[1:].device == torch.zeros_like(here).device == here.new_ones(2).device == FIRST
    assert (here + torch.tensor(2.0)).device == FIRST  # a single number goes everywhere
    assert here[torch.tensor([0, 2])].device == FIRST  # and so do indices of the CPU
    assert there.to(here.device).device == there.to(here).device == FIRST
    for mistake in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: here + torch.ones(3),
        lambda: here[torch.tensor([0, 2], device=SECOND)],
        lambda: torch.ones(3).index_select(0, torch.tensor([1], device=FIRST)),
        lambda: here.add_(there),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mistake()
