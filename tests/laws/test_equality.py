"""Laws 1, 3 and 7: what a compact cache computes equals uncompressed or masked full attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import Case
from support.models import PROMPT, prompt
from support.reference import chunked, compact_logits, generate, positions, reference_logits, same_positions

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BEAM_SEED = 2  # a prompt on which two beams change places, in both models


# Law 1


def test_enough_budget_gives_the_uncompressed_tokens(model: PreTrainedModel, case: Case) -> None:
    ids = prompt(40)
    expected = generate(model, ids, 8)
    with wk.compress(model, case.spec, 40, task=case.task) as run:
        assert generate(model, ids, 8) == expected
    cache = wk.CompactCache(model, case.spec, 1.0, task=case.task)
    assert generate(model, ids, 8, past_key_values=cache) == expected
    assert run.report.kept_entries == cache.report.kept_entries == [[40] * model.config.num_hidden_layers]


def test_more_budget_than_prompt_keeps_the_prompt(llama: PreTrainedModel, case: Case) -> None:
    ids = prompt(40)
    cache = wk.CompactCache(llama, case.spec, 90, task=case.task)
    assert generate(llama, ids, 8, past_key_values=cache) == generate(llama, ids, 8)
    assert cache.report.kept_entries == [[40] * 5]


def test_a_too_small_budget_changes_the_tokens(llama: PreTrainedModel) -> None:
    # The law above could not fail if eviction changed nothing on these models.
    ids = prompt(40)
    with wk.compress(llama, "streaming:sinks=1", 4):
        assert generate(llama, ids) != generate_uncompressed(llama, ids)


def generate_uncompressed(model: PreTrainedModel, ids: Tensor) -> list[list[int]]:
    """Greedy tokens by the framework's own cache, also inside a compress block."""
    tokens = ids
    with torch.no_grad():
        for _ in range(12):
            logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens[:, ids.shape[1] :].tolist()


def test_beam_search_with_enough_budget_gives_the_uncompressed_tokens(model: PreTrainedModel, case: Case) -> None:
    ids = prompt(40, seed=BEAM_SEED)
    expected = generate(model, ids, num_beams=2)
    with wk.compress(model, case.spec, 40, task=case.task):
        assert generate(model, ids, num_beams=2) == expected


def test_the_beams_of_that_prompt_are_reordered(model: PreTrainedModel) -> None:
    # Beams that never change places would prove nothing about reordering a cache.
    ids = prompt(40, seed=BEAM_SEED)
    assert generate(model, ids, num_beams=2) != generate(model, ids)


def test_beam_search_runs_on_a_compressed_prompt(llama: PreTrainedModel, evicting: Case) -> None:
    with wk.compress(llama, **evicting.settings) as run:
        first = generate(llama, prompt(PROMPT), num_beams=2)
        second = generate(llama, prompt(PROMPT), num_beams=2)
    assert first == second
    assert len(first[0]) == 12
    (entries,) = run.report.kept_entries  # two beams are two rows of one prompt, which is read once
    assert sum(entries) == evicting.budget * llama.config.num_hidden_layers


# Laws 3 and 7


@pytest.mark.parametrize("sizes", [[1] * 6, [6], [2, 1, 3]], ids=["one_by_one", "at_once", "mixed"])
def test_decoding_equals_masked_attention_over_the_full_cache(model: PreTrainedModel, case: Case, sizes: list[int]) -> None:
    ids, more = prompt(PROMPT), prompt(6, seed=1)
    cache = wk.CompactCache(model, **case.settings)
    logits = compact_logits(model, cache, ids, chunked(more, sizes))
    kept = positions(cache)
    expected = reference_logits(model, ids, more, kept)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert cache.get_seq_length() == PROMPT + 6


def test_the_reference_sees_what_was_evicted(model: PreTrainedModel, evicting: Case) -> None:
    # Moving a single kept entry of a single layer must show, or the law above would prove little.
    ids, more = prompt(PROMPT), prompt(6, seed=1)
    cache = wk.CompactCache(model, **evicting.settings)
    logits = compact_logits(model, cache, ids, chunked(more, [6]))
    kept = positions(cache)
    layer = next(i for i, p in enumerate(kept) if p is not None)
    row = kept[layer][0]
    gone = next(i for i in range(PROMPT) if i not in row.tolist())
    row[len(row) // 2] = gone
    wrong = reference_logits(model, ids, more, kept)
    torch.testing.assert_close(logits[0], wrong[0], **CLOSE)  # prefill itself is not touched by eviction
    assert (logits[1:] - wrong[1:]).abs().max() > 1e-3


def test_k_tokens_at_once_equal_one_by_one(model: PreTrainedModel, case: Case) -> None:
    ids, more = prompt(PROMPT), prompt(9, seed=2)
    runs = []
    for sizes in ([9], [1] * 9):
        cache = wk.CompactCache(model, **case.settings)
        runs.append(compact_logits(model, cache, ids, chunked(more, sizes)))
    torch.testing.assert_close(runs[0], runs[1], **CLOSE)


def test_growing_past_the_growth_block_changes_nothing(model: PreTrainedModel, case: Case) -> None:
    grown_equals_reference(model, case, [1] * 4 + [5] * 15 + [1])


def test_growing_one_token_at_a_time(llama: PreTrainedModel) -> None:
    grown_equals_reference(llama, Case("snapkv:observe=8:kernel=3"), [1] * 80)


def grown_equals_reference(model: PreTrainedModel, case: Case, sizes: list[int]) -> None:
    # The buffer grows by 64 entries: 80 tokens fill one block and force another.
    ids, more = prompt(PROMPT), prompt(80, seed=3)
    cache = wk.CompactCache(model, **case.settings)
    logits = compact_logits(model, cache, ids, chunked(more, sizes))
    expected = reference_logits(model, ids, more, positions(cache))
    torch.testing.assert_close(logits, expected, **CLOSE)
    kept = [PROMPT if p is None else p.shape[-1] for p in positions(cache)]
    assert [layer.length for layer in cache.compact_layers] == [n + 80 for n in kept]


def test_a_prompt_of_one_token(model: PreTrainedModel, case: Case) -> None:
    ids, more = prompt(1), prompt(5, seed=4)
    cache = wk.CompactCache(model, **case.settings)
    logits = compact_logits(model, cache, ids, chunked(more, [2, 1, 2]))
    torch.testing.assert_close(logits, reference_logits(model, ids, more, positions(cache)), **CLOSE)


def test_generated_tokens_can_be_taken_back(model: PreTrainedModel, case: Case) -> None:
    ids, more = prompt(PROMPT), prompt(5, seed=5)
    cache = wk.CompactCache(model, **case.settings)
    compact_logits(model, cache, ids, [prompt(4, seed=6)])
    cache.crop(-3)
    cache.crop(PROMPT)
    with torch.no_grad():
        logits = model(input_ids=more, past_key_values=cache).logits[0]
    torch.testing.assert_close(logits, reference_logits(model, ids, more, positions(cache))[1:], **CLOSE)
    with pytest.raises(wk.CacheError, match="crop"):
        cache.crop(PROMPT - 1)


def test_generate_continues_from_a_cache(model: PreTrainedModel, case: Case) -> None:
    """A forward pass over the prompt, then generate() on the same cache, equals generate() on a cache of its own."""
    ids = prompt(PROMPT)
    cache = wk.CompactCache(model, **case.settings)
    expected = generate(model, ids, past_key_values=cache)
    cache = wk.CompactCache(model, **case.settings)
    with torch.no_grad():
        first = model(input_ids=ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    whole = torch.cat([ids, first], dim=1)
    assert [first[0].tolist() + generate(model, whole, 11, past_key_values=cache)[0]] == expected


# Replay


def test_replay_equals_a_live_prefill(model: PreTrainedModel, case: Case) -> None:
    ids, more = prompt(PROMPT), prompt(4, seed=7)
    live = wk.CompactCache(model, **case.settings)
    expected = compact_logits(model, live, ids, [more])
    recorded = wk.CompactCache(model, "full", record=PROMPT)
    compact_logits(model, recorded, ids, [])
    for _ in range(2):  # a replay leaves the record as it was
        replayed = recorded.replay(case.spec, case.budget, task=case.task)
        assert same_positions(positions(replayed), positions(live))
        assert replayed.report.kept_entries == live.report.kept_entries
        assert replayed.report.held_bytes == live.report.held_bytes
        with torch.no_grad():
            logits = model(input_ids=more, past_key_values=replayed).logits[0]
        torch.testing.assert_close(logits, expected[1:], **CLOSE)


def test_replay_refuses_what_it_cannot_know(llama: PreTrainedModel) -> None:
    plain = wk.CompactCache(llama, "full")
    compact_logits(llama, plain, prompt(PROMPT), [])
    with pytest.raises(wk.CacheError, match="record"):
        plain.replay("snapkv:observe=4", 20)
    short = wk.CompactCache(llama, "full", record=4)
    compact_logits(llama, short, prompt(PROMPT), [])
    with pytest.raises(wk.CacheError, match="8 queries, only 4"):
        short.replay("snapkv:observe=8", 20)
    compact_logits(llama, short, prompt(1), [])
    with pytest.raises(wk.CacheError, match="fresh"):
        short.replay("snapkv:observe=4", 20)
