"""A prompt read in chunks: without a ceiling nothing changes, with one no more than ceiling and chunk is held."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import CASES, QUANTIZED, Case
from support.chunks import CEILING, CHUNK, CLOSE, TOKENS, assert_same, assert_told, read
from support.models import WINDOW, hybrid, prompt
from support.profiles import PROFILES, random_profile
from support.reference import generate, positions, reference_logits, same_positions
from winnowkv.cache.chunked import ChunkedPrompt, ChunkSizes, nearest, remaining
from winnowkv.cache.compression import Compression
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.stacked import stack
from winnowkv.models.curve import Curve
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import Rotation
from winnowkv.policies import PromptInfo
from winnowkv.policies.chunk_eviction import best_spans
from winnowkv.policies.expected import Expected, sample_moves
from winnowkv.prompt.structure import Structure


def assert_exact(model: PreTrainedModel, *args: Any, tokens: int = TOKENS, chunk: int = CHUNK, **options: Any) -> None:
    whole, chunked = (wk.CompactCache(model, *args, keep_scores=True, **options) for _ in range(2))
    expected, logits = read(model, whole, tokens), read(model, chunked, tokens, chunk=chunk)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert_same(model, chunked, whole)


# Without a ceiling


def test_chunks_change_nothing(model: PreTrainedModel, case: Case) -> None:
    assert_exact(model, case.spec, case.budget, task=case.task)


@pytest.mark.parametrize("chunk", [65, 100, 199])
def test_chunks_of_any_length_change_nothing(llama: PreTrainedModel, chunk: int) -> None:
    assert_exact(llama, "winnow:observe=4:heads=3:sinks=2:samples=16:least=4", 20, chunk=chunk)


@pytest.fixture(scope="module")
def sliding() -> PreTrainedModel:
    """With key norms that differ: random weights of a Gemma 3 give all keys the same one, by which knorm could not choose."""
    model = hybrid()
    for layer in model.model.layers:
        layer.self_attn.k_norm.weight.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("asked", CASES, ids=str)
def test_chunks_change_nothing_beside_sliding_windows(sliding: PreTrainedModel, asked: Case, tmp_path: Path) -> None:
    random_profile(ModelInfo.of(sliding), 2).write(tmp_path / "hybrid.json")
    assert_exact(sliding, asked.spec.replace(PROFILES, str(tmp_path)), asked.budget, task=asked.task)


def test_sliding_windows_hold_the_same_entries_with_chunks(sliding: PreTrainedModel) -> None:
    whole, chunked = (wk.CompactCache(sliding, "snapkv:observe=4", 20) for _ in range(2))
    read(sliding, whole)
    read(sliding, chunked, chunk=CHUNK, ceiling=CEILING)
    for mine, theirs in zip(chunked.sliding_layers[:2], whole.sliding_layers[:2], strict=True):  # below every other layer
        assert mine.keys.shape[2] == WINDOW - 1
        torch.testing.assert_close(mine.keys, theirs.keys, **CLOSE)


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_entries_are_the_same(llama: PreTrainedModel, case: Case) -> None:
    whole, chunked = (wk.CompactCache(llama, **case.settings, keep_scores=True) for _ in range(2))
    read(llama, whole)
    read(llama, chunked, chunk=CHUNK)
    assert_told(chunked, whole)
    for mine, theirs in zip(chunked.compact_layers, whole.compact_layers, strict=True):
        step = max(float(part.scales.max()) for part in theirs.quantized)  # a code may fall to the other side of a half
        torch.testing.assert_close(mine.entries_in_use(), theirs.entries_in_use(), rtol=0, atol=1.01 * step)


@pytest.mark.parametrize("spec", ["winnow:observe=4:samples=16", "snapkv:observe=4", "adakv:of=snapkv:observe=4"])
def test_auto_chooses_the_same_budget_with_chunks(llama: PreTrainedModel, spec: str, tmp_path: Path) -> None:
    made = random_profile(ModelInfo.of(llama), 5)
    made.curves[spec.split(":")[0]] = Curve(((0.1, 0.2), (1.0, 1.0)), 3)
    made.write(tmp_path / "p.json")
    whole, chunked, cut = (wk.CompactCache(llama, spec, f"auto:0.8:{tmp_path / 'p.json'}") for _ in range(3))
    read(llama, whole)
    read(llama, chunked, chunk=CHUNK)
    assert 0 < whole.report.kept_fraction < 1
    assert_told(chunked, whole)
    assert same_positions(positions(chunked), positions(whole))
    read(llama, cut, chunk=CHUNK, ceiling=CEILING)
    assert 0 < cut.report.kept_fraction < (CEILING + CHUNK) / TOKENS


def test_a_decode_budget_counts_from_the_prompts_end(llama: PreTrainedModel) -> None:
    runs = []
    for chunk in (None, CHUNK):
        cache = wk.CompactCache(llama, "snapkv:observe=8", 20, decode_budget=64)
        logits = read(llama, cache, chunk=chunk)
        runs.append((list(greedy(llama, cache, logits, 140)), cache.report.decode_entries))
    assert runs[0] == runs[1]
    assert runs[0][1] < 139


def test_a_prompt_recorded_in_chunks_is_replayed(model: PreTrainedModel, evicting: Case) -> None:
    recorded = wk.CompactCache(model, "full", 1, record=TOKENS)
    read(model, recorded, chunk=CHUNK)
    live = wk.CompactCache(model, **evicting.settings, keep_scores=True)
    read(model, live)
    replayed = recorded.replay(**evicting.settings, keep_scores=True)
    assert_same(model, replayed, live)


def test_the_last_queries_are_recorded(llama: PreTrainedModel) -> None:
    caches = [wk.CompactCache(llama, "full", 1, record=90) for _ in range(2)]  # more than lie in a chunk
    for cache, chunk in zip(caches, (None, CHUNK), strict=True):
        read(llama, cache, chunk=chunk)
    for (mine, _), (theirs, _) in zip(*(cache.recording.layers for cache in caches), strict=True):
        assert mine.shape[2] == 90
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("tokens", [30, 63, 64])
def test_a_prompt_of_one_chunk_is_read_at_once(llama: PreTrainedModel, tokens: int) -> None:
    whole, chunked = (wk.CompactCache(llama, "snapkv:observe=8", 20, keep_scores=True) for _ in range(2))
    assert torch.equal(read(llama, chunked, tokens, chunk=64, ceiling=10), read(llama, whole, tokens))
    assert chunked.report.peak_bytes == whole.report.peak_bytes
    assert_told(chunked, whole)


@pytest.mark.parametrize("ceiling", [TOKENS - CHUNK, TOKENS, 5000, 1.0])
def test_a_ceiling_that_covers_the_prompt_changes_nothing(llama: PreTrainedModel, ceiling: int | float) -> None:
    whole, chunked = (wk.CompactCache(llama, "winnow:observe=4:samples=16", 20, keep_scores=True) for _ in range(2))
    expected = read(llama, whole)
    torch.testing.assert_close(read(llama, chunked, chunk=CHUNK, ceiling=ceiling), expected, **CLOSE)
    assert_same(llama, chunked, whole)


def test_the_head_of_the_model_sees_one_token_of_a_chunk(llama: PreTrainedModel) -> None:
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    read(llama, wk.CompactCache(llama, "snapkv:observe=8", 20), chunk=CHUNK)
    hook.remove()
    assert seen == [1] * 4


# With a ceiling


def entry(cache: wk.CompactCache) -> int:
    return sum(layer.entry_bytes for layer in cache.compact_layers)


@pytest.mark.parametrize("tokens", [TOKENS, 145])
def test_a_cache_never_holds_more_than_ceiling_and_chunk(llama: PreTrainedModel, case: Case, tokens: int) -> None:
    cache = wk.CompactCache(llama, **case.settings)
    held, whole = [], cache.update

    def update(*args: Any, **kwargs: Any) -> Any:
        states = whole(*args, **kwargs)
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in buffers(cache)}
        held.append(sum(storages.values()))
        return states

    cache.update = update  # type: ignore[method-assign]
    read(llama, cache, tokens, chunk=CHUNK, ceiling=CEILING)
    most = min(CEILING + CHUNK, tokens)
    assert max(held) == cache.report.peak_bytes == most * entry(cache)
    kept = most if case.name == "full" else case.budget
    assert cache.report.kept_bytes == kept * entry(cache)
    assert cache.report.full_bytes == tokens * entry(cache)
    assert cache.report.prompt_tokens == [tokens]
    assert any("chose from" in note for note in cache.report.notes) == (tokens > most)


def buffers(cache: wk.CompactCache) -> list[Tensor]:
    return [part for layer in cache.compact_layers if layer.keys is not None for part in (layer.keys, layer.values)]


def test_dropping_entries_copies_keys_and_values_one_after_the_other(llama: PreTrainedModel) -> None:
    """Besides the buffers, which are reused, there is never more than the ceiling's keys or values of one layer."""
    from torch.profiler import ProfilerActivity, profile

    cache = wk.CompactCache(llama, "snapkv:observe=8", 20)
    sizes = cache.begin_chunks(TOKENS, CHUNK, CEILING)
    for part in prompt(TOKENS).split(sizes, 1)[:2]:
        with torch.no_grad():
            llama(input_ids=part, past_key_values=cache)
        cache.end_chunk()
    layer, stays = cache.compact_layers[0], torch.arange(0, 72, 2)
    before = [part.data_ptr() for part in (layer.keys, layer.values)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        layer.drop(stays)
    assert [part.data_ptr() for part in (layer.keys, layer.values)] == before
    taken = [event.self_cpu_memory_usage for event in watched.events()]
    assert max(taken) == len(stays) * layer.entry_bytes // 2  # given back before the values' turn


def test_the_positions_are_those_of_what_is_held(model: PreTrainedModel, case: Case) -> None:
    """Also under a ceiling: the first layer, which attends to nothing before it, holds the whole prompt's keys at them."""
    ids, cache, whole = prompt(TOKENS), wk.CompactCache(model, **case.settings), wk.CompactCache(model, "full", 1)
    prefill(model, ids, cache, chunk=CHUNK, ceiling=CEILING)
    prefill(model, ids, whole)
    kept = positions(cache)
    first, full = cache.compact_layers[0], whole.compact_layers[0]
    at = kept[0].long().expand(2, -1)
    assert bool((at >= 0).all()) or case.ragged
    for mine, theirs in ((first.keys, full.keys), (first.values, full.values)):
        expected = theirs[0].gather(1, at.clamp(min=0)[..., None].expand(-1, -1, 8)).masked_fill((at < 0)[..., None], 0)
        torch.testing.assert_close(mine[0], expected, **CLOSE)
    for layer in kept:
        assert bool((layer[0].diff() > 0).logical_or(layer[0][:-1] < 0).all())
        last = int(layer.max())
        assert last == TOKENS - 1


def test_every_layer_holds_the_same_between_chunks(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "full", 1)
    sizes, ids = cache.begin_chunks(TOKENS, CHUNK, CEILING), prompt(TOKENS)
    for number, part in enumerate(ids.split(sizes, 1)):
        with torch.no_grad():
            llama(input_ids=part, past_key_values=cache)
        cache.end_chunk()
        seen = sum(sizes[: number + 1])
        held = [layer.positions[0] for layer in cache.compact_layers]
        if number in (2, 3):
            assert same_positions(held, held[:1] * 5)
            assert held[0][0, :4].tolist() == [0, 1, 2, 3]
            assert held[0][0, -32:].tolist() == list(range(seen - 32, seen))
            assert held[0].shape[1] == (CEILING if number == 2 else CEILING + CHUNK)
        assert cache.get_seq_length() == seen


def test_a_dropped_entry_is_seen_by_no_later_chunk(llama: PreTrainedModel) -> None:
    """Against one forward pass of a model with one layer, in which the last chunk is masked from what was dropped."""
    model = copy.deepcopy(llama)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    ids, cache = prompt(145), wk.CompactCache(model, "full", 1)
    logits = prefill(model, ids, cache, chunk=CHUNK, ceiling=70)
    (kept,) = positions(cache)
    assert kept.shape == (1, 70 + CHUNK)
    earlier = kept[:, :70]
    expected = reference_logits(model, ids[:, :81], ids[:, 81:], [earlier])
    torch.testing.assert_close(logits[0], expected[-1], **CLOSE)


def test_generation_continues_after_the_whole_prompt(llama: PreTrainedModel, case: Case) -> None:
    cache = wk.CompactCache(llama, **case.settings)
    logits = read(llama, cache, chunk=CHUNK, ceiling=CEILING)
    tokens = list(greedy(llama, cache, logits, 6))
    assert cache.get_seq_length() == TOKENS + 5
    cache.crop(TOKENS)
    assert list(greedy(llama, cache, logits, 6)) == tokens
    with pytest.raises(wk.CacheError, match="only 5 came after"):
        cache.crop(-6)
    cache.reset()
    assert list(greedy(llama, cache, read(llama, cache, chunk=CHUNK, ceiling=CEILING), 6)) == tokens
    cache.reset()
    assert generate(llama, prompt(40), 6, past_key_values=cache) == generate(
        llama, prompt(40), 6, past_key_values=wk.CompactCache(llama, **case.settings)
    )


def test_a_cache_read_in_chunks_is_saved_and_stacked(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, other = (wk.CompactCache(llama, "adakv:of=snapkv:observe=4", 20) for _ in range(2))
    logits = read(llama, cache, chunk=CHUNK, ceiling=CEILING)
    prefill(llama, prompt(50, seed=3), other)
    wk.save_cache(cache, llama, tmp_path / "c.safetensors")
    loaded = wk.load_cache(tmp_path / "c.safetensors", llama)
    assert loaded.report.kept_entries == cache.report.kept_entries
    more = prompt(3, seed=5)
    together = stack([cache, other])
    rows = extend(llama, together, torch.cat([more, more]), [TOKENS, 50])
    torch.testing.assert_close(rows[0], extend(llama, cache, more, [TOKENS])[0], **CLOSE)
    torch.testing.assert_close(rows[0], extend(llama, loaded, more, [TOKENS])[0], **CLOSE)
    assert logits.shape == (1, llama.config.vocab_size)


@pytest.mark.parametrize(("ceiling", "entries"), [(0.5, 100), (0.35, 70), (100, 100)])
def test_a_ceiling_is_entries_or_a_fraction(llama: PreTrainedModel, ceiling: int | float, entries: int) -> None:
    cache = wk.CompactCache(llama, "full", 1)
    read(llama, cache, chunk=CHUNK, ceiling=ceiling)
    assert cache.report.kept_entries == [[entries + CHUNK] * 5]


# What goes between chunks


def chunked_prompt(cache: wk.CompactCache) -> ChunkedPrompt:
    """The state of a cache that is between two chunks."""
    return cache.session._chunked


def test_spans_of_the_text_stay_whole_beside_sinks_and_recent_tokens() -> None:
    held = torch.tensor([*range(16), *range(32, 48), *range(96, 112), *range(160, 164)])
    scores = torch.zeros(1, 1, 48)
    scores[0, 0, 16:48] = 1  # the spans at 32 and at 96
    scores[0, 0, 40:48] = 2
    assert held[best_spans(scores, held, 2, 24)].tolist() == [0, 1, 32, 33, *range(96, 112), *range(160, 164)]
    scores[0, 0, 16] = 9  # its eight best are worth (9 + 7) / 8 = 2, as the other's: the earlier wins
    assert held[best_spans(scores, held, 2, 22)].tolist() == [0, 1, *range(32, 48), *range(160, 164)]
    scores[0, 0, 40] = 3
    assert held[best_spans(scores, held, 2, 22)].tolist() == [0, 1, *range(96, 112), *range(160, 164)]


def test_nearest_finds_the_closest_known_position() -> None:
    known = torch.tensor([0, 10, 11, 40])
    assert known[nearest(known, torch.tensor([0, 4, 5, 6, 11, 25, 26, 90]))].tolist() == [0, 0, 0, 10, 11, 11, 40, 40]


def test_a_structure_is_mapped_to_the_remaining_tokens() -> None:
    held = torch.tensor([0, 1, 2, 8, 9, 10, 11])
    assert remaining(Structure(12, 4, 1, (1, 3, 5, 9, 12)), held) == Structure(7, 4, 1, (1, 3, 4))
    assert remaining(Structure(11, 4, 1, (1, 3)), held) is None


def test_the_policy_gets_the_structure_of_the_remaining_tokens(llama: PreTrainedModel) -> None:
    """Sentences of 10 tokens that stayed in part or whole end at their last remaining token; the question stays as it is."""
    task = wk.TaskProfile("localization", structure=Structure(TOKENS, 40, 3, tuple(range(10, TOKENS, 10))))
    cache = wk.CompactCache(llama, "winnow:observe=4:samples=16", 60, task=task)
    sizes = cache.begin_chunks(TOKENS, CHUNK, CEILING)
    for part in prompt(TOKENS).split(sizes, 1)[:-1]:
        with torch.no_grad():
            llama(input_ids=part, past_key_values=cache)
        cache.end_chunk()
    left, held = chunked_prompt(cache).remaining_prompt().task.structure, chunked_prompt(cache).held.tolist()
    assert (left.tokens, left.question, left.tail) == (CEILING + CHUNK, 40, 3)
    assert held[-40:] == list(range(160, 200))
    assert list(left.ends) == [at + 1 for at in range(143) if held[at] // 10 != held[at + 1] // 10]


def test_sampled_queries_are_moved_to_the_positions_of_the_answer() -> None:
    """Equal queries before any rotation, wherever they were read: moved, they must look from the same place in the text."""
    rotation = Rotation((1.0, 0.05))
    torch.manual_seed(1)
    base = torch.randn(1, 2, 1, 4)
    policy, model = Expected(samples=16, observe=4, sinks=0), ModelInfo("Drawn", 1, 2, 1, "", rotation)
    asked = Compression("expected", policy, model, wk.Budget.of(20), (wk.TaskProfile(),))
    chunks = ChunkedPrompt(asked, PromptInfo(TOKENS, 1, 20), ChunkSizes(TOKENS, CHUNK, CEILING))
    for size in chunks.sizes.lengths:
        at = torch.arange(chunks.held[-1] + 1 - size, chunks.held[-1] + 1)
        queries = rotation.turn(base.expand(-1, -1, size, -1), at)
        taken = chunks.take(0, queries, *torch.randn(2, 1, 1, len(chunks.held), 4), 0.5)
        chunks.end()
    assert taken is not None
    held = len(chunks.held)
    wanted = policy.bind(model, PromptInfo(held, 1, 20)).query_positions()
    here, there = sample_moves(held, held - 4, 0, 16, policy.ahead)
    moved = rotation.turn(taken[:, :, torch.searchsorted(wanted, here)], there - here)
    expected = rotation.turn(base.expand(-1, -1, len(there), -1), there + TOKENS - held)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_few_queries_are_kept_unless_the_policy_needs_all(llama: PreTrainedModel) -> None:
    kept = {}
    for spec in ("winnow:observe=4", "snapkv:observe=8", "h2o"):
        cache = wk.CompactCache(llama, spec, 20)
        sizes = cache.begin_chunks(520, CHUNK, 270)
        for part in prompt(520).split(sizes, 1)[:-1]:
            with torch.no_grad():
                llama(input_ids=part, past_key_values=cache)
            cache.end_chunk()
        kept[spec] = max(part.shape[2] for part in chunked_prompt(cache)._queries)
    assert kept["winnow:observe=4"] <= 256
    assert kept["snapkv:observe=8"] <= 256
    assert 270 <= kept["h2o"] <= 270 + CHUNK + 256
