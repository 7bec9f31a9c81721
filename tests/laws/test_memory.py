"""Law 6: reported bytes are the storage held, KV heads stay unexpanded, prefill never holds more than it must."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import Case
from support.models import PROMPT, prompt
from support.reference import compact_logits, generate

HEAD_SIZE = 8


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the garbage collector only reference counts free memory: a cycle would show."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def storage_bytes(cache: wk.CompactCache) -> int:
    """Bytes of the storage of keys and values, every storage counted once."""
    storages = [t.untyped_storage() for layer in cache.compact_layers for t in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def full_layer_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Keys and values of one whole layer, float32, KV heads unexpanded."""
    return 2 * model.config.num_key_value_heads * HEAD_SIZE * 4 * tokens


def test_reported_bytes_are_the_storage_held(model: PreTrainedModel, case: Case) -> None:
    cache = wk.CompactCache(model, **case.settings)
    compact_logits(model, cache, prompt(PROMPT), [])
    report, layers = cache.report, model.config.num_hidden_layers
    entries = PROMPT if case.name == "full" else case.budget
    assert report.held_bytes == cache.held_bytes == storage_bytes(cache)
    assert report.kept_bytes == layers * full_layer_bytes(model, entries)
    # Heads of a layer are padded to its longest; where none differ nothing is padded.
    longest = sum(full_layer_bytes(model, layer.length) for layer in cache.compact_layers)
    assert report.held_bytes == (longest if case.ragged else report.kept_bytes)
    assert report.full_bytes == layers * full_layer_bytes(model, PROMPT)
    assert report.kept_fraction == entries / PROMPT
    for layer in cache.compact_layers:
        assert layer.keys.shape[1] == layer.values.shape[1] == model.config.num_key_value_heads


def test_held_bytes_follow_the_growing_storage(model: PreTrainedModel, case: Case) -> None:
    cache = wk.CompactCache(model, **case.settings)
    compact_logits(model, cache, prompt(PROMPT), [])
    before = cache.report.held_bytes
    for added in (1, 70, 3):
        with torch.no_grad():
            model(input_ids=prompt(added), past_key_values=cache)
        assert cache.held_bytes == storage_bytes(cache)
        used = sum(layer.length * layer.entry_bytes for layer in cache.compact_layers)
        # Room for at most one growth block, 64 entries, in every layer.
        assert used <= cache.held_bytes <= used + 64 * sum(layer.entry_bytes for layer in cache.compact_layers)
    assert cache.report.held_bytes == before, "the report speaks of the end of prefill"


def test_bytes_of_a_padded_batch(model: PreTrainedModel, case: Case) -> None:
    ids = torch.cat([prompt(PROMPT), prompt(PROMPT, seed=1)])
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    cache = wk.CompactCache(model, case.spec, 0.75, task=case.task)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    report = cache.report
    assert report.held_bytes == storage_bytes(cache) >= report.kept_bytes
    kept = sum(map(sum, report.kept_entries))
    assert report.kept_bytes == kept * full_layer_bytes(model, 1)
    assert report.full_bytes == (PROMPT + PROMPT - 20) * model.config.num_hidden_layers * full_layer_bytes(model, 1)


def test_no_full_layer_outlives_its_turn(model: PreTrainedModel, evicting: Case) -> None:
    """Watches the storages themselves while prefill runs, apart from report.peak_bytes."""
    cache = wk.CompactCache(model, **evicting.settings)
    whole: list[StorageWeakRef] = []
    lengths: list[list[int]] = []
    seen = []

    def attended(*_: object) -> None:
        layers = cache.compact_layers
        lengths.append([layer.length for layer in layers[: len(lengths) + 1]])
        seen.append(storage_bytes_of(cache))

    def storage_bytes_of(cache: wk.CompactCache) -> int:
        return sum(layer.held_bytes for layer in cache.compact_layers)

    observe = cache.observe

    def watch(layer: int, *args: object) -> None:
        kept = cache.compact_layers[layer]
        whole.extend(StorageWeakRef(t.untyped_storage()) for t in (kept.keys, kept.values))
        seen.append(storage_bytes_of(cache))
        observe(layer, *args)

    cache.observe = watch
    hooks = [block.register_forward_hook(attended) for block in model.model.layers]
    compact_logits(model, cache, prompt(PROMPT), [])
    for hook in hooks:
        hook.remove()
    assert max(seen) == cache.report.peak_bytes
    final = [layer.length for layer in cache.compact_layers]
    for layer, count in enumerate(final):
        if count < PROMPT:
            assert whole[2 * layer].expired()
            assert whole[2 * layer + 1].expired()
    asked = cache.compression.prompt(PROMPT, len(final), wk.TaskProfile.of(evicting.task))
    bound = cache.compression.selection(asked).bound
    if sum(bound.parts.allocator.prefill_limits()) > bound.prompt.total:
        return  # dynamickv, cake, expected, winnow and what wraps them shrink earlier layers during prefill
    # One shot: a layer has its final length when its turn is over, so only the newest is ever whole.
    assert lengths == [final[: i + 1] for i in range(len(final))]
    assert cache.report.peak_bytes <= cache.report.held_bytes + 2 * full_layer_bytes(model, PROMPT)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_dynamickv_shrinks_earlier_layers_during_prefill(model: PreTrainedModel, every: int) -> None:
    cache = wk.CompactCache(model, f"dynamickv:observe=4:kernel=3:every={every}:ceiling=3", 14)
    lengths: list[list[int]] = []

    def after(*_: object) -> None:
        lengths.append([layer.length for layer in cache.compact_layers[: len(lengths) + 1]])

    hooks = [block.register_forward_hook(after) for block in model.model.layers]
    compact_logits(model, cache, prompt(PROMPT), [])
    for hook in hooks:
        hook.remove()
    ceiling = 3 * (14 - 4) + 4
    layers = model.config.num_hidden_layers
    for seen, held in enumerate(lengths, start=1):
        assert max(held) <= ceiling
        if seen % every == 0 or seen == layers:
            assert sum(held) == 14 * seen, "after an update the layers seen hold their part of the budget, exactly"
        else:
            assert held[-1] == ceiling, "between updates a new layer may hold its ceiling"
    if every > 1:
        assert lengths[0][0] == ceiling > lengths[every - 1][0], "the first layer really shrinks later"


def test_peak_of_one_shot_policies_on_a_longer_prompt(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=8", 20)
    compact_logits(llama, cache, prompt(400), [])
    assert cache.report.peak_bytes == 4 * full_layer_bytes(llama, 20) + full_layer_bytes(llama, 400)


def test_a_deleted_cache_is_freed(model: PreTrainedModel, case: Case, no_collector: None) -> None:
    cache = wk.CompactCache(model, **case.settings)
    compact_logits(model, cache, prompt(PROMPT), [prompt(2)])
    held = [weakref.ref(cache)]
    held += [weakref.ref(t) for layer in cache.compact_layers for t in (layer.keys, layer.values)]
    storages = [StorageWeakRef(layer.keys.untyped_storage()) for layer in cache.compact_layers]
    del cache
    assert not any(ref() is not None for ref in held)
    assert all(storage.expired() for storage in storages)


def test_a_finished_generation_frees_its_cache(model: PreTrainedModel, case: Case, no_collector: None) -> None:
    """Nor does a compress block hold the caches of its earlier prompts; their reports stay."""
    alive: list[weakref.ref] = []

    def after(_: object, __: object, output: object) -> None:
        if not alive or alive[-1]() is not output.past_key_values:
            alive.append(weakref.ref(output.past_key_values))

    hook = model.register_forward_hook(after)
    with wk.compress(model, **case.settings) as run:
        for seed in range(2):
            generate(model, prompt(PROMPT, seed=seed), 3)
        assert len(alive) == len(run.reports) == 2
        assert not any(ref() is not None for ref in alive)
    hook.remove()


def test_a_deleted_model_is_freed(no_collector: None) -> None:
    from support.models import tiny_model

    model = tiny_model("llama")
    cache = wk.CompactCache(model, "snapkv:observe=8", 20)
    compact_logits(model, cache, prompt(PROMPT), [])
    del cache
    with wk.compress(model, "snapkv:observe=8", 20):
        generate(model, prompt(PROMPT), 2)
    weight = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()  # modules hold cycles of their own
    assert weight() is None
