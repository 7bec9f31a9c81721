"""The decode-time budget: what comes after the prompt is evicted in blocks, and every law holds for what stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.decode_reference import slow_logits
from support.evaluation import write_model
from support.models import PROMPT, hybrid, prompt
from support.reference import chunked, compact_logits, generate, positions
from winnowkv.cache.generated import DECODE_BLOCK, LEAST_DECODE_BUDGET, check_decode_budget
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.stacked import stack
from winnowkv.policies.decode_eviction import DecodeEviction, newest_and_best, received_attention

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH_CLOSE = {"rtol": 0, "atol": 1e-4}
BUDGET = 64
FULL = BUDGET + DECODE_BLOCK  # entries at which a block is evicted
STEPS = [1] * (FULL + 2 * DECODE_BLOCK + 5)  # three evictions
SPECS = ["full", "snapkv:observe=8:kernel=3", "adakv:floor=0:of=snapkv:observe=4:sinks=2", "pyramidkv:observe=4:sinks=2"]


def cache_of(model: PreTrainedModel, spec: str = SPECS[1], budget: int = 20, limit: int | None = BUDGET) -> wk.CompactCache:
    return wk.CompactCache(model, spec, budget, decode_budget=limit)


# Law 3: compact attention equals masked attention over everything, with the entries that the reference chooses


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("sizes", [STEPS, [100, 27, 1, 1, 150, 64, 3]], ids=["one_by_one", "several_at_once"])
def test_decoding_equals_masked_attention(model: PreTrainedModel, spec: str, sizes: list[int]) -> None:
    ids, more = prompt(40), prompt(sum(sizes), seed=1)
    cache = cache_of(model, spec)
    logits = compact_logits(model, cache, ids, chunked(more, sizes))
    torch.testing.assert_close(logits, slow_logits(model, ids, more, sizes, positions(cache), BUDGET), **CLOSE)
    assert cache.get_seq_length() == 40 + sum(sizes)
    kept = [40 if p is None else p.shape[-1] for p in positions(cache)]
    assert [layer.length - n for layer, n in zip(cache.compact_layers, kept, strict=True)] == [
        cache.report.decode_entries
    ] * len(kept)
    assert BUDGET <= cache.report.decode_entries < FULL


def test_the_reference_notices_another_choice_of_entries(llama: PreTrainedModel) -> None:
    # Keeping the worst of the older entries must show, or the law above would prove little.
    ids, more, sizes = prompt(40), prompt(FULL + 20, seed=1), [1] * (FULL + 20)
    cache = cache_of(llama)
    logits = compact_logits(llama, cache, ids, chunked(more, sizes))
    wrong = slow_logits(llama, ids, more, sizes, positions(cache), BUDGET, choose=lambda received: -received)
    torch.testing.assert_close(logits[: FULL + 1], wrong[: FULL + 1], **CLOSE)
    assert (logits[FULL + 1 :] - wrong[FULL + 1 :]).abs().max() > 1e-3


def test_decoding_after_a_quantized_prompt_equals_decoding_after_its_dequantized_values(llama: PreTrainedModel) -> None:
    """Against a cache in full precision that holds the dequantized values."""
    ids, more = prompt(40), prompt(len(STEPS), seed=1)
    cache, plain = cache_of(llama, "snapkv:observe=8:quantize=int8"), cache_of(llama, "snapkv:observe=8")
    prefill(llama, ids, cache)
    prefill(llama, ids, plain)
    for layer, coded in zip(plain.compact_layers, cache.compact_layers, strict=True):
        assert coded.frozen == 20
        layer.keys, layer.values = coded.entries_in_use()
    with torch.no_grad():
        for token in more.split(1, dim=1):
            logits = [llama(input_ids=token, past_key_values=each).logits for each in (cache, plain)]
            torch.testing.assert_close(*logits, **CLOSE)
    assert [layer.length for layer in cache.compact_layers] == [20 + BUDGET + 5] * 5


# Law 1: a budget that nothing passes changes nothing


def test_enough_budget_gives_the_tokens_of_no_budget(model: PreTrainedModel) -> None:
    ids = prompt(PROMPT)
    expected = generate(model, ids, 100, past_key_values=cache_of(model, limit=None))
    assert generate(model, ids, 100, past_key_values=cache_of(model, limit=100)) == expected
    with wk.compress(model, SPECS[1], 20, decode_budget=100) as run:
        assert generate(model, ids, 100) == expected
    assert run.report.decode_entries == run.report.decode_tokens == 99
    with wk.compress(model, SPECS[1], 20, decode_budget=BUDGET) as run:
        assert generate(model, ids, FULL + 40) != generate(model, ids, FULL + 40, past_key_values=cache_of(model, limit=None))
    assert run.report.decode_entries == BUDGET + 39
    assert f"167 tokens at {run.report.decode_ms_per_token:.1f} ms, 103 of their entries held" in str(run.report)


# Law 6: memory


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_tokens(llama: PreTrainedModel) -> None:
    cache = cache_of(llama)
    logits = prefill(llama, prompt(PROMPT), cache)
    held = []
    for _ in greedy(llama, cache, logits, 2000):
        held.append(cache.held_bytes)
    entry = sum(layer.entry_bytes for layer in cache.compact_layers)
    queries = 2 * DecodeEviction().observe * 8 * 8 * 4 * 5  # at most two windows of 8 heads of 8 float32 values in 5 layers
    assert max(held) <= (20 + FULL + DECODE_BLOCK) * entry + queries
    assert max(held[200:1000]) == max(held[1000:])
    assert cache.report.decode_tokens == 1999
    assert [layer.keys.shape[2] for layer in cache.compact_layers] == [cache.layers[0].keys.shape[2]] * 5
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values, layer.queries) if part is not None]
    assert cache.held_bytes == sum(part.untyped_storage().nbytes() for part in parts)


def test_a_long_text_read_at_once_leaves_no_unused_storage(llama: PreTrainedModel) -> None:
    cache = cache_of(llama)
    compact_logits(llama, cache, prompt(PROMPT), [prompt(600, seed=1)])
    entry = sum(layer.entry_bytes for layer in cache.compact_layers)
    assert cache.held_bytes <= (20 + BUDGET + DECODE_BLOCK) * entry
    assert cache.report.decode_entries == BUDGET


# Law 4: batches


@pytest.mark.parametrize("spec", SPECS)
def test_a_padded_batch_equals_single_runs(llama: PreTrainedModel, spec: str) -> None:
    lengths, total = (PROMPT, 57), FULL + DECODE_BLOCK + 9
    ids, mask = torch.zeros(2, PROMPT, dtype=torch.long), torch.ones(2, PROMPT + total, dtype=torch.long)
    for row, tokens in enumerate(lengths):
        ids[row, PROMPT - tokens :] = prompt(tokens, seed=row)[0]
        mask[row, : PROMPT - tokens] = 0
    more = torch.cat([prompt(total, seed=5), prompt(total, seed=6)])
    cache, read = cache_of(llama, spec), 0
    singles = [cache_of(llama, spec) for _ in lengths]
    places = (mask[:, :PROMPT].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        llama(input_ids=ids, attention_mask=mask[:, :PROMPT], position_ids=places, past_key_values=cache)
        for row, single in enumerate(singles):
            llama(input_ids=ids[row : row + 1, PROMPT - lengths[row] :], past_key_values=single)
        for chunk in more.split([1] * (FULL - 9) + [30, DECODE_BLOCK - 12], dim=1):
            seen = [tokens + read for tokens in lengths]
            read += chunk.shape[1]
            places = torch.tensor(seen)[:, None] + torch.arange(chunk.shape[1])
            told = mask[:, : PROMPT + read]
            logits = llama(input_ids=chunk, attention_mask=told, position_ids=places, past_key_values=cache).logits
            for row, single in enumerate(singles):
                expected = extend(llama, single, chunk[row : row + 1], seen[row : row + 1])
                torch.testing.assert_close(logits[row : row + 1], expected, **BATCH_CLOSE)
    assert cache.report.decode_entries == singles[0].report.decode_entries < total


def test_padding_among_new_tokens_goes_first(llama: PreTrainedModel) -> None:
    """A second turn, left-padded in one row: its padding neither counts nor stays."""
    padding, turn = 20, FULL + 10
    mask = torch.ones(2, PROMPT + turn, dtype=torch.long)
    mask[1, PROMPT : PROMPT + padding] = 0
    ids, more = torch.cat([prompt(PROMPT), prompt(PROMPT, seed=1)]), torch.cat([prompt(turn, seed=2), prompt(turn, seed=3)])
    runs = []
    for filler in (0, 9):
        more[1, :padding] = filler
        cache = cache_of(llama)
        prefill(llama, ids, cache)
        with torch.no_grad():
            llama(input_ids=more, attention_mask=mask, past_key_values=cache)
            runs.append(llama(input_ids=prompt(2, seed=4).view(2, 1), past_key_values=cache).logits)
        for layer in cache.compact_layers:
            assert bool(layer.valid[..., : layer.length].all())
            assert layer.generated == BUDGET + 1
    torch.testing.assert_close(*runs, **CLOSE)


def test_rows_change_places_in_the_middle_of_a_block(llama: PreTrainedModel) -> None:
    ids, more = torch.cat([prompt(PROMPT), prompt(PROMPT, seed=1)]), torch.cat([prompt(200, seed=2), prompt(200, seed=3)])
    runs = []
    for swap in (False, True):
        cache = cache_of(llama)
        prefill(llama, ids, cache)
        rows = torch.arange(2)
        with torch.no_grad():
            for step in range(200):
                if swap and step == FULL - 3:  # while queries are kept to score
                    rows = torch.tensor([1, 0])
                    cache.reorder_cache(rows)
                logits = llama(input_ids=more[rows, step : step + 1], past_key_values=cache).logits
        runs.append(logits[rows])
    torch.testing.assert_close(*runs, **BATCH_CLOSE)


def test_beam_search_continues_after_an_eviction(llama: PreTrainedModel) -> None:
    whole = generate(llama, prompt(40), 100, num_beams=2)
    assert generate(llama, prompt(40), 100, num_beams=2, past_key_values=cache_of(llama, "full", 1, limit=100)) == whole
    cache = cache_of(llama, "full", 1)
    first = generate(llama, prompt(40), FULL + 30, num_beams=2, past_key_values=cache)
    assert first == generate(llama, prompt(40), FULL + 30, num_beams=2, past_key_values=cache_of(llama, "full", 1))
    assert cache.report.decode_entries == BUDGET + 29


def test_stacked_settings_decode_as_alone(llama: PreTrainedModel) -> None:
    expected, caches, logits = [], [], []
    for spec in SPECS:
        cache = cache_of(llama, spec)
        expected.append(list(greedy(llama, cache, prefill(llama, prompt(PROMPT), cache), FULL + 40)))
        caches.append(cache_of(llama, spec))
        logits.append(prefill(llama, prompt(PROMPT), caches[-1]))
    stacked, rows = stack(caches), [torch.cat(logits).argmax(-1)]
    for seen in range(PROMPT, PROMPT + FULL + 39):
        rows.append(extend(llama, stacked, rows[-1][:, None], [seen] * len(SPECS))[:, -1].argmax(-1))
    assert torch.stack(rows, 1).tolist() == expected


def test_caches_that_cannot_be_stacked_are_refused(llama: PreTrainedModel) -> None:
    caches = [cache_of(llama), cache_of(llama, limit=None)]
    for cache in caches:
        prefill(llama, prompt(PROMPT), cache)
    with pytest.raises(wk.CacheError, match=r"several decode budgets \(64, None\)"):
        stack(caches)
    extend(llama, caches[0], prompt(3), [PROMPT])
    with pytest.raises(wk.CacheError, match="before the first is generated"):
        stack(caches[:1])


# Laws 5 and 8: nothing leaks; a saved and loaded cache decodes as before


def test_two_prompts_in_a_row_equal_each_alone(llama: PreTrainedModel) -> None:
    def tokens(cache: wk.CompactCache, seed: int) -> list[list[int]]:
        return generate(llama, prompt(PROMPT, seed=seed), FULL + 30, past_key_values=cache)

    alone = [tokens(cache_of(llama), seed) for seed in range(2)]
    cache, together = cache_of(llama), []
    for seed in range(2):
        together.append(tokens(cache, seed))
        cache.reset()
        assert cache.report.decode_entries == 0
    assert together == alone
    with wk.compress(llama, SPECS[1], 20, decode_budget=BUDGET):
        assert [generate(llama, prompt(PROMPT, seed=seed), FULL + 30) for seed in range(2)] == alone


def test_a_replay_holds_the_decode_budget(llama: PreTrainedModel) -> None:
    recorded = wk.CompactCache(llama, "full", 1, record=PROMPT, decode_budget=BUDGET)
    logits, live = prefill(llama, prompt(PROMPT), recorded), cache_of(llama)
    expected = list(greedy(llama, live, prefill(llama, prompt(PROMPT), live), FULL + 30))
    replayed = recorded.replay(SPECS[1], 20)
    assert list(greedy(llama, replayed, logits, FULL + 30)) == expected
    assert replayed.report.decode_entries == BUDGET + 29


@pytest.mark.parametrize("done", [0, 100, FULL - 5, FULL + 7])
def test_a_saved_and_loaded_cache_gives_the_same_logits(llama: PreTrainedModel, tmp_path: Path, done: int) -> None:
    ids, more = prompt(PROMPT), prompt(FULL + DECODE_BLOCK + 20, seed=1)
    cache = cache_of(llama)
    compact_logits(llama, cache, ids, [*more[:, :done].split(1, dim=1)] if done else [])
    wk.save_cache(cache, llama, tmp_path / "cache")
    loaded = wk.load_cache(tmp_path / "cache", llama)
    assert loaded.decode_budget == BUDGET
    with torch.no_grad():
        for token in more[:, done:].split(1, dim=1):
            expected = llama(input_ids=token, past_key_values=cache).logits
            assert torch.equal(llama(input_ids=token, past_key_values=loaded).logits, expected)
    assert loaded.report.decode_entries == cache.report.decode_entries == BUDGET + 20


# Taking tokens back


@pytest.mark.parametrize(("read", "back"), [(100, 30), (FULL - 3, 9), (FULL + 20, 15), (FULL + DECODE_BLOCK - 2, 30)])
def test_tokens_taken_back_and_read_again_change_nothing(llama: PreTrainedModel, read: int, back: int) -> None:
    ids, more = prompt(PROMPT), prompt(FULL + DECODE_BLOCK + 30, seed=1)
    plain, cropped = cache_of(llama), cache_of(llama)
    expected = compact_logits(llama, plain, ids, [*more.split(1, dim=1)])
    compact_logits(llama, cropped, ids, [*more[:, :read].split(1, dim=1)])
    cropped.crop(-back)
    with torch.no_grad():
        again = [llama(input_ids=token, past_key_values=cropped).logits[0] for token in more[:, read - back :].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(again), expected[1 + read - back :], **CLOSE)


def test_evicted_entries_cannot_be_taken_back(llama: PreTrainedModel) -> None:
    ids, more = prompt(PROMPT), prompt(FULL, seed=1)
    cache = cache_of(llama)
    compact_logits(llama, cache, ids, [more])
    before = [(layer.length, layer.seen) for layer in cache.compact_layers]
    message = "cannot crop 33 tokens: the decode budget of 64 has evicted entries among them, only the last 32 tokens are whole"
    with pytest.raises(wk.CacheError, match=message):
        cache.crop(-33)
    assert [(layer.length, layer.seen) for layer in cache.compact_layers] == before
    cache.crop(-32)
    assert cache.get_seq_length() == PROMPT + FULL - 32
    with pytest.raises(wk.CacheError, match="only the last 0 tokens are whole"):
        cache.crop(-1)


# Other models, the options, the command line


def test_a_hybrid_model_holds_the_decode_budget(tmp_path: Path) -> None:
    """Only the layers that attend to everything are held to the budget; sliding windows are small already."""
    model = hybrid()
    expected = generate(model, prompt(PROMPT), 100, past_key_values=cache_of(model, limit=None))
    assert generate(model, prompt(PROMPT), 100, past_key_values=cache_of(model, limit=100)) == expected
    cache = cache_of(model)
    tokens = generate(model, prompt(PROMPT), 400, past_key_values=cache)
    assert [layer.generated for layer in cache.compact_layers] == [BUDGET + (399 - FULL) % DECODE_BLOCK] * 2
    assert len(tokens[0]) == 400


@pytest.mark.parametrize(
    ("budget", "message"),
    [(LEAST_DECODE_BUDGET - 1, "decode budget 63 is below 64"), (0, "below 64"), (-1, "below 64"),
     (0.5, "0.5 is not a whole number"),
     (True, "True is not a whole number"), ("128", "'128' is not a whole number")],
)  # fmt: skip
def test_decode_budgets_that_are_too_small_or_no_number_are_refused(llama: PreTrainedModel, budget: Any, message: str) -> None:
    before = llama.config._attn_implementation
    for opened in (
        lambda: wk.CompactCache(llama, decode_budget=budget),
        lambda: wk.compress(llama, decode_budget=budget).__enter__(),
    ):
        with pytest.raises(wk.BudgetError, match=message) as caught:
            opened()
        assert "give at least 64 entries" in str(caught.value)
    assert llama.config._attn_implementation == before
    check_decode_budget(LEAST_DECODE_BUDGET)


@pytest.mark.slow
def test_generate_reports_the_held_entries_of_the_answer(winnow: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    arguments = ("generate", "w1 w2 w3 " * 20, "--model", model, "--policy", "streaming", "--budget", 20, "--no-chat")
    code, out, err = winnow(*arguments, "--max-new-tokens", 200, "--decode-budget", 64)
    assert code == 0, err
    assert "-- decode budget 64: 71 entries held of 199 new tokens" in out
    code, out, _ = winnow(*arguments, "--max-new-tokens", 200, "--decode-budget", 64, "--json")
    assert json.loads(out)["decode_entries"] == 71
    code, out, _ = winnow(*arguments, "--max-new-tokens", 20)
    assert "decode budget" not in out
    code, out, err = winnow(*arguments, "--decode-budget", 10)
    assert (code, out) == (2, "")
    assert "winnow: decode budget 10 is below 64" in err


# The pure functions


def test_evicted_entries_equal_a_worked_example() -> None:
    scores = torch.full((1, 2, 130), 0.5)
    scores[0, 0, [3, 90]] = 1.0
    scores[0, 1, 5:37] = 2.0
    stays = newest_and_best(scores, 64, 32)
    assert stays[0, 0].tolist() == [*range(31), 90, *range(98, 130)]  # ties go to the lower index
    assert stays[0, 1].tolist() == [*range(5, 37), *range(98, 130)]
    assert newest_and_best(scores, 100, 32)[0, 1].tolist() == [*range(68), *range(98, 130)]


def test_entries_that_do_not_count_take_no_attention() -> None:
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 4, 5, 8, generator=draw), torch.randn(1, 2, 30, 8, generator=draw)
    valid = torch.ones(1, 1, 30, dtype=torch.bool)
    valid[..., :7] = False
    scores = received_attention(queries, keys, 0.5, valid)
    assert bool((scores[..., :7] == -1).all())
    torch.testing.assert_close(scores[..., 7:], received_attention(queries, keys[:, :, 7:], 0.5))
    valid[..., :27] = False  # two of the queries are padding too, and see nothing that counts
    scores = received_attention(queries, keys, 0.5, valid)
    torch.testing.assert_close(scores[..., 27:], received_attention(queries[:, :, 2:], keys[:, :, 27:], 0.5))
    valid[..., :27] = True  # and here they see much
    valid[..., 25:27] = False
    scores = received_attention(queries, keys, 0.5, valid)[..., valid[0, 0]]
    torch.testing.assert_close(scores, received_attention(queries[:, :, 2:], keys[:, :, valid[0, 0]], 0.5))
    alone = received_attention(queries[:, :, -1:], keys, 0.5, valid)
    torch.testing.assert_close(alone[..., valid[0, 0]].sum(-1), torch.ones(1, 2))
