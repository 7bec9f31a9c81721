"""Requests in slots decode as they would alone, and the held bytes are the predicted ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

import winnowkv as wk
from support.cases import Case
from support.models import DEVICE, TINY, prompt
from support.slots import LENGTHS, ROOM, alone, assert_same, more, read, together
from winnowkv.cache.reading import prefill
from winnowkv.engine.slot_row import SlotRow
from winnowkv.engine.slots import Slots, bucket, row_bucket
from winnowkv.errors import CacheError


def hybrid() -> PreTrainedModel:
    """Two layers that slide over 16 tokens around two that attend to everything."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = Gemma3TextConfig(**TINY, num_hidden_layers=4, head_dim=8, sliding_window=16, layer_types=kinds)
        return Gemma3ForCausalLM(config).eval().to(DEVICE)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_policy_decodes_as_alone(model: PreTrainedModel, case: Case, rows: int) -> None:
    settings = case.settings
    expected = [alone(model, row, settings) for row in range(len(LENGTHS))]
    assert_same(together(model, Slots(model), settings, rows), expected)


@pytest.mark.parametrize("spec", ["full", "snapkv:observe=4", "adakv:floor=0:of=snapkv:observe=4"])
def test_sliding_windows_decode_as_alone(spec: str) -> None:
    model = hybrid()
    settings = {"policy": spec, "budget": 0.5}
    expected = [alone(model, row, settings) for row in range(len(LENGTHS))]
    assert_same(together(model, Slots(model), settings, 3), expected)


def test_quantized_entries_decode_as_alone(llama: PreTrainedModel) -> None:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    settings = {"policy": "snapkv:observe=4:quantize=int8", "budget": 0.5}
    assert_same(together(llama, Slots(llama), settings, 2), [alone(llama, row, settings) for row in range(len(LENGTHS))])


@pytest.mark.parametrize("spec", ["full", "snapkv:observe=4", "cake:observe=4", "adakv:floor=0:of=snapkv:observe=4"])
def test_held_bytes_are_the_storage_and_within_the_predicted_bytes(llama: PreTrainedModel, spec: str) -> None:
    slots = Slots(llama)
    assert slots.held_bytes == 0
    for row in range(len(LENGTHS)):
        cache = read(llama, row, {"policy": spec, "budget": 0.5})
        said = slots.bytes_with([layer.length for layer in cache.compact_layers], ROOM)
        kept = cache.held_bytes
        slots.place(cache, ROOM)
        assert cache.held_bytes == 0, "the cache still holds what lies in the slots"
        assert kept < slots.held_bytes <= said
        storages = {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for layer in slots.layers for part in (layer.keys, layer.values, layer.valid)
        }  # fmt: skip
        assert slots.held_bytes == sum(storages.values())
    # Entries themselves, at the longest row of each layer; flags take one byte a column and head at most.
    exact = sum(layer.keys.nbytes + layer.values.nbytes for layer in slots.layers)
    assert exact <= slots.held_bytes <= exact + sum(layer.keys.shape[:3].numel() for layer in slots.layers)
    while slots.rows:
        slots.drop(0)
    assert slots.held_bytes == 0


def test_values_that_are_not_finite_stay_with_their_request(llama: PreTrainedModel) -> None:
    """Not even as a column of zero weight does it reach who comes into its slot."""
    settings, slots = {"policy": "full", "budget": 1}, Slots(llama)
    slots.place(read(llama, 3, settings), ROOM)
    broken = read(llama, 0, settings)
    broken.compact_layers[0].keys[:] = broken.compact_layers[1].values[:] = float("nan")
    slots.place(broken, ROOM)
    slots.drop(1)
    slots.place(read(llama, 1, settings), LENGTHS[0] - LENGTHS[1] + ROOM)  # buffers of the same size
    (_, logits) = slots.step(torch.cat([more(3)[0, :1], more(1)[0, :1]]))
    torch.testing.assert_close(logits, alone(llama, 1, settings)[0], rtol=0, atol=1e-4)


def test_trim_frees_the_memory_of_a_large_request(llama: PreTrainedModel) -> None:
    slots = Slots(llama)
    slots.place(read(llama, 1, {"policy": "full", "budget": 1}), ROOM)
    small = slots.held_bytes
    slots.place(read(llama, 0, {"policy": "full", "budget": 1}), ROOM)
    slots.drop(1)
    assert slots.held_bytes > small
    slots.trim()
    assert slots.held_bytes == small


def test_nothing_is_copied_while_there_is_room(llama: PreTrainedModel) -> None:
    slots = Slots(llama)
    slots.place(read(llama, 1, {"policy": "streaming", "budget": 10}), 8)
    buffers = [layer.keys.data_ptr() for layer in slots.layers]
    for _ in range(8):
        slots.step(torch.tensor([5], device=DEVICE))
        assert [layer.keys.data_ptr() for layer in slots.layers] == buffers
    slots.step(torch.tensor([5], device=DEVICE))
    assert [layer.keys.data_ptr() for layer in slots.layers] != buffers


def test_caches_that_slots_cannot_hold_are_refused(llama: PreTrainedModel) -> None:
    slots = Slots(llama)
    two = wk.CompactCache(llama, "full", 1)
    prefill(llama, torch.cat([prompt(9), prompt(9, seed=1)]), two)
    with pytest.raises(CacheError, match="2 rows: read prompts one by one"):
        slots.place(two, 4)
    slots.place(read(llama, 0, {"policy": "full", "budget": 1}), 4)
    with pytest.raises(CacheError, match="1 requests are placed"):
        slots.warm_up(1, 10, 4)


def test_the_model_is_restored(llama: PreTrainedModel) -> None:
    slots = Slots(llama)
    assert llama.config._attn_implementation == "winnow_sdpa"
    del slots
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("size", "most", "count", "waste", "share"), [(bucket, 40_000, 32, 128, 0.25), (row_bucket, 1_000, 18, 4, 0.5)]
)
def test_buffer_sizes_are_few_large_enough_and_waste_little(
    size: Callable[[int], int], most: int, count: int, waste: int, share: float
) -> None:
    sizes = [size(wanted) for wanted in range(most)]
    assert sizes == sorted(sizes)
    assert len(set(sizes[1:])) == count
    assert all(size(each) == each for each in sizes)
    assert all(wanted <= each < wanted + max(waste, share * wanted) for wanted, each in enumerate(sizes[1:], 1))


def test_row_counts_with_a_graph_are_those_of_the_buffers(llama: PreTrainedModel) -> None:
    """Whatever is placed, its rows are among the graphs that were made for so many requests."""
    slots = Slots(llama, compile=True)
    slots._flexible = True  # as on the CPU
    assert [slots.graph_rows(rows) for rows in (1, 2, 18)] == [[1], [1, 2], [1, 18]]
    slots._flexible = False  # as on a GPU
    assert slots.graph_rows(1) == [1]
    assert slots.graph_rows(18) == [1, 2, 4, 8, 12, 16, 24]
    for rows in range(1, 19):
        assert slots._shapes([SlotRow([40] * slots._full, ROOM)] * rows)[0] == (row_bucket(rows), 128)


def test_compiled_slots_hold_as_many_requests_as_eager_ones(llama: PreTrainedModel) -> None:
    """492 entries, 127 new tokens: what 12% of 4,096 tokens takes."""
    eager, compiled, fixed = Slots(llama), Slots(llama, compile=True), Slots(llama, compile=True)
    compiled._flexible, fixed._flexible = True, False  # as on the CPU, as on a GPU
    entries, room = [492] * eager._full, 127
    memory = 18 * eager.bytes_alone(entries, room)

    def fits(slots: Slots) -> int:
        return max(rows for rows in range(1, 40) if slots._bytes([SlotRow(entries, room)] * rows) <= 1.02 * memory)

    assert [fits(slots) for slots in (eager, compiled, fixed)] == [18, 18, 16]
    uneven = [16 * count for count in (9, 50, 31, 3, 20)]
    held = [slots.bytes_alone(uneven, 64) for slots in (eager, compiled, fixed)]
    assert held[0] == held[1] < held[2] / 2  # a graph of one shape has the columns of the largest layer everywhere
