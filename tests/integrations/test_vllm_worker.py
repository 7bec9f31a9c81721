"""A worker's half: contexts in memory, its own heads of them, and layers that can be given keys and values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import winnowkv as wk
from support.contexts import HEAD_DIM, KV_HEADS, LAYERS, add_context, made_states
from support.vllm_scheduler import Layer
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import UnsupportedEngineError
from winnowkv.integrations.vllm.options import ConnectorOptions
from winnowkv.integrations.vllm.scheduler_side import Load
from winnowkv.integrations.vllm.versions import check_release
from winnowkv.integrations.vllm.worker_side import ContextMemory, check_layers, load, own_heads

ONE = 2 * LAYERS * 20 * KV_HEADS * HEAD_DIM * 4  # bytes of a context of 20 entries
BLOCK = 8


@pytest.fixture
def store(tmp_path: Path) -> ContextStore:
    return ContextStore(tmp_path)


def test_the_least_recently_used_go_first(store: ContextStore) -> None:
    first, second, third = (add_context(store, seed=seed).id for seed in range(3))
    memory = ContextMemory(store, 2 * ONE)
    for each in (first, second, first, third):
        memory.states(each)
    assert (memory.reads, memory.bytes) == (3, 2 * ONE)
    memory.states(first)
    assert memory.reads == 3, "the first was used after the second, and stays"
    memory.states(second)
    assert memory.reads == 4


@pytest.mark.parametrize("limit", [0, ONE - 1])
def test_what_is_larger_than_the_limit_is_read_each_time(store: ContextStore, limit: int) -> None:
    one = add_context(store).id
    memory = ContextMemory(store, limit)
    for _ in range(2):
        assert torch.equal(memory.states(one).keys, made_states(20, 50).keys)
    assert (memory.reads, memory.bytes) == (2, 0)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_take_their_heads(store: ContextStore, ranks: int) -> None:
    """Together they have all; of more ranks than heads two hold the same one. Each holds the bytes of its own."""
    one, whole = add_context(store).id, made_states(20, 50)
    memories = [ContextMemory(store, 1 << 20, rank, ranks) for rank in range(ranks)]
    each = max(1, KV_HEADS // ranks)
    for rank, memory in enumerate(memories):
        first = rank * each if ranks <= KV_HEADS else rank * KV_HEADS // ranks
        states = memory.states(one)
        assert torch.equal(states.keys, whole.keys[:, :, first : first + each])
        assert torch.equal(states.values, whole.values[:, :, first : first + each])
        assert (
            memory.bytes
            == ONE * each // KV_HEADS
            == sum(part.untyped_storage().nbytes() for part in (states.keys, states.values))
        )


def test_heads_of_ranks() -> None:
    assert [own_heads(8, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert [own_heads(2, rank, 4) for rank in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]


def layers(**changes: Any) -> dict[int, Layer]:
    made = {at: Layer(KV_HEADS, 10, BLOCK, HEAD_DIM) for at in range(LAYERS)}
    for name, value in changes.items():
        setattr(made[1], name, value)
    return made


def test_entries_are_written_where_they_were_asked_for(store: ContextStore) -> None:
    """In the engine's dtype; a context that is gone fails in its own blocks."""
    one = add_context(store).id
    engine = layers()
    loads = [Load(one, 16, [40, 41, 50, 51], [5, 6]), Load("0" * 32, 0, [8, 9], [1])]
    assert load(ContextMemory(store, 1 << 20), loads, engine, torch.bfloat16) == {1}
    whole = made_states(20, 50)
    for number, layer in engine.items():
        assert sorted(layer.impl.written) == [40, 41, 50, 51]
        for at, slot in enumerate((40, 41, 50, 51)):
            keys, values = layer.impl.written[slot]
            assert torch.equal(keys, whole.keys[number, 16 + at].bfloat16())
            assert torch.equal(values, whole.values[number, 16 + at].bfloat16())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"impl": SimpleNamespace()}, "layer 1: SimpleNamespace cannot be given keys and values"),
        ({"num_kv_heads": 2}, "layer 1 has 2 KV heads, 4 were expected"),
        ({"kv_cache": torch.empty(2, 10, 3, 5)}, "has no blocks of 8 tokens"),
    ],
)
def test_layers_that_cannot_be_served_are_refused(changes: dict[str, Any], why: str) -> None:
    check_layers(layers(), LAYERS, KV_HEADS, BLOCK)
    with pytest.raises(UnsupportedEngineError, match=why):
        check_layers(layers(**changes), LAYERS, KV_HEADS, BLOCK)


def test_missing_layers_are_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="2 of 3 layers have attention of the usual kind"):
        check_layers(layers(), 3, KV_HEADS, BLOCK)


def test_options() -> None:
    assert ConnectorOptions.of({"store": "/data"}) == ConnectorOptions("/data", 4.0, any_release=False)
    assert ConnectorOptions.of({"store": "s3://b/c", "ram_gib": 0, "any_release": True}).ram_bytes == 0
    assert ConnectorOptions.of({"store": "/data", "ram_gib": 0.5}).ram_bytes == 1 << 29


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, 'needs "store": the folder or URL'),
        ({}, 'needs "store": the folder or URL'),
        ({"store": ""}, 'needs "store": the folder or URL'),
        ({"store": 7}, 'needs "store": the folder or URL'),
        ({"store": "/data", "ram": 4}, "has no option 'ram': there are store, ram_gib"),
        ({"store": "/data", "ram_gib": -1}, '"ram_gib": -1 is no number of GiB'),
        ({"store": "/data", "ram_gib": "4"}, "\"ram_gib\": '4' is no number of GiB"),
        ({"store": "/data", "ram_gib": True}, '"ram_gib": True is no number of GiB'),
        ({"store": "/data", "ram_gib": float("nan")}, '"ram_gib": nan is no number of GiB'),
        ({"store": "/data", "ram_gib": float("inf")}, '"ram_gib": inf is no number of GiB'),
        ({"store": "/data", "any_release": "yes"}, "\"any_release\": 'yes' is neither true nor false"),
    ],
)
def test_options_that_mean_nothing_are_input_errors(given: Any, why: str) -> None:
    with pytest.raises(wk.InputError, match=why):
        ConnectorOptions.of(given)


@pytest.mark.parametrize("release", ["0.32.0", "0.32", "0.32.7", "0.32.1+cpu", "0.32.0.post1"])
def test_tested_releases(release: str, caplog: pytest.LogCaptureFixture) -> None:
    check_release(release)
    assert caplog.text == ""


@pytest.mark.parametrize("release", ["0.31.9", "0.33.0", "1.0", "dev", "0.32.0rc1", "0.33.0rc1"])
def test_other_releases_are_refused_or_warned_of(release: str, caplog: pytest.LogCaptureFixture) -> None:
    said = f"vLLM {release} was not tested with winnowkv's connector \\(tested: from 0.32, below 0.33\\)"
    with pytest.raises(UnsupportedEngineError, match=f'{said}: install such a release, or set "any_release": true'):
        check_release(release)
    check_release(release, any_release=True)
    assert f"vLLM {release} was not tested" in caplog.text
