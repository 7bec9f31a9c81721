"""Models whose last layers attend to the keys of an earlier one: laws 3, 4, 6 and 7 hold, and every entry is counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.batch import BATCH_LENGTHS, batch_logits, padded
from support.families import FAMILIES
from support.models import PROMPT, prompt
from support.own_attention import Seen, kept_of, least, own_logits
from support.reference import chunked, compact_logits, positions, same_positions
from support.slots import LENGTHS, alone, assert_same, together
from winnowkv.cache.generated import DECODE_BLOCK
from winnowkv.cache.reading import prefill
from winnowkv.engine.slots import Slots
from winnowkv.memory.shape import read_shape

CLOSE = {"rtol": 0, "atol": 1e-4}
SPECS = ["snapkv:observe=8:kernel=3", "adakv:floor=0:of=snapkv:observe=4:sinks=2"]  # the heads of the second differ in length
SOURCES = 2  # layers that are compressed, of three that attend to everything


@pytest.fixture(params=[name for name in ("Gemma 3n text", "Gemma 4 text, shared KV") if FAMILIES[name].exists])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def shared(family: str) -> PreTrainedModel:
    return FAMILIES[family].build()


@pytest.mark.parametrize("spec", SPECS)
def test_decoding_equals_masked_attention_over_the_full_cache(shared: PreTrainedModel, spec: str) -> None:
    ids, more, sizes = prompt(PROMPT), prompt(7, seed=1), [1, 4, 1, 1]
    cache = wk.CompactCache(shared, spec, 20)
    logits = compact_logits(shared, cache, ids, chunked(more, sizes))
    torch.testing.assert_close(logits, own_logits(shared, ids, more, kept_of(cache)), **CLOSE)
    report = cache.report
    assert report.kept_entries == [[20] * SOURCES]
    assert (report.decode_tokens, report.decode_entries) == (7, 7)
    assert report.held_bytes == sum(layer.held_bytes for layer in whole(shared, spec).compact_layers)


def whole(model: PreTrainedModel, spec: str) -> wk.CompactCache:
    cache = wk.CompactCache(model, spec, 20)
    prefill(model, prompt(PROMPT), cache)
    return cache


@pytest.mark.parametrize("spec", SPECS)
def test_a_padded_batch_equals_single_runs(shared: PreTrainedModel, spec: str) -> None:
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    more = torch.cat([prompt(3, seed=10 + i) for i in range(3)])
    cache = wk.CompactCache(shared, spec, 20)
    logits = batch_logits(shared, cache, *padded(rows), more)
    for i, row in enumerate(rows):
        single = wk.CompactCache(shared, spec, 20)
        expected = batch_logits(shared, single, row, torch.ones_like(row), more[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1], expected, **CLOSE)
        assert same_positions(positions(cache, i), positions(single))


def test_logits_of_several_tokens_are_those_of_all(shared: PreTrainedModel) -> None:
    """Newer releases read only so many tokens in the layers that share keys, which must not lose causality."""
    for tokens in (10, 40):  # within and beyond the sliding window
        ids = prompt(tokens)
        with torch.no_grad():
            expected = shared(input_ids=ids).logits[:, -3:]
            cache = wk.CompactCache(shared, "full")
            logits = shared(input_ids=ids, past_key_values=cache, logits_to_keep=3).logits[:, -3:]
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("spec", SPECS)
def test_a_decode_budget_leaves_the_entries_that_are_still_attended_to(
    shared: PreTrainedModel, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers that share keys come after their source has evicted, and see in that pass what it saw itself."""
    tokens, budget = 2 * DECODE_BLOCK + 6, 64
    ids, more = prompt(PROMPT), prompt(tokens, seed=1)
    cache = wk.CompactCache(shared, spec, 20, decode_budget=budget)
    stays: dict[int, Tensor] = {}
    kept: dict[int, Any] = {}
    for index, layer in enumerate(cache.layers):
        if layer in cache.compact_layers:
            monkeypatch.setattr(layer, "keep_generated", spy(stays, index, layer.keep_generated))
    logits = compact_logits(shared, cache, ids, chunked(more, [1] * tokens))
    kept = kept_of(cache)
    assert cache.report.decode_tokens == tokens
    assert cache.report.decode_entries == budget + 6
    assert len(stays) == SOURCES
    seen = evicted_at(least(kept, PROMPT), stays, PROMPT, PROMPT + 2 * DECODE_BLOCK)
    torch.testing.assert_close(logits, own_logits(shared, ids, more, kept, seen), **CLOSE)
    late = own_logits(shared, ids, more, kept)  # eviction shows, or nothing was tested
    assert (logits[-6:] - late[-6:]).abs().max() > 1e-3


def spy(found: dict[int, Tensor], index: int, keep: Any) -> Any:
    def note(stays: Tensor) -> None:
        assert index not in found, "one eviction was expected"
        found[index] = stays.clone()
        keep(stays)

    return note


def evicted_at(seen: Seen, stays: dict[int, Tensor], prompt: int, when: int) -> Seen:
    """Queries from ``when`` on see of the tokens between prompt and ``when`` only those that stayed, for each KV head."""

    def sees(layer: int, tokens: int, heads: int, kv_heads: int) -> Tensor:
        mask = seen(layer, tokens, heads, kv_heads)
        if layer in stays and tokens > when:
            for head in range(heads):
                held = torch.zeros(when - prompt, dtype=torch.bool)
                held[stays[layer][0, head // (heads // kv_heads)]] = True
                mask[head, when:, prompt:when] &= held
        return mask

    return sees


@pytest.mark.parametrize("spec", SPECS)
def test_requests_in_slots_decode_as_alone(shared: PreTrainedModel, spec: str) -> None:
    settings: dict[str, object] = {"policy": spec, "budget": 20}
    expected = [alone(shared, row, settings) for row in range(len(LENGTHS))]
    assert_same(together(shared, Slots(shared), settings, 3), expected)


def test_a_replay_equals_a_live_prefill(shared: PreTrainedModel) -> None:
    recorded = wk.CompactCache(shared, "full", record=PROMPT)
    prefill(shared, prompt(PROMPT), recorded)
    replayed, live = recorded.replay(SPECS[0], 20), whole(shared, SPECS[0])
    assert same_positions(positions(replayed), positions(live))
    with torch.no_grad():
        more = prompt(3, seed=1)
        logits, expected = (shared(input_ids=more, past_key_values=cache).logits for cache in (replayed, live))
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_nothing_of_a_pass_is_held_after_it(shared: PreTrainedModel) -> None:
    """Older releases leave the shared keys, which are those before eviction, with the cache."""
    assert not getattr(whole(shared, SPECS[0]), "shared_layers", None)


def test_a_plan_counts_shared_keys_once(family: str) -> None:
    given = FAMILIES[family]
    config = getattr(transformers, given.config)(**given.arguments)
    shape = read_shape(config, 4)
    assert [layer.window for layer in shape.layers] == [16, None] * SOURCES
    cache = whole(given.build(), SPECS[0])
    assert sum(layer.kv_bytes(20, 4) for layer in shape.layers if layer.window is None) == cache.report.kept_bytes
