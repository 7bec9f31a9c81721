"""Models with sliding-window layers beside full ones: replay, batches, crop and reset keep the laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import CASES, Case
from support.models import PROMPT, WINDOW, hybrid, prompt
from support.profiles import PROFILES, random_profile
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.stacked import stack
from winnowkv.engine.step import greedy_rows
from winnowkv.models import load as models
from winnowkv.models.info import ModelInfo

LENGTHS = (PROMPT, 57, WINDOW + 1, WINDOW, WINDOW - 1, WINDOW - 2, 9)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hybrid()


@pytest.fixture(scope="module")
def profiles(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile for the hybrid model, which has scores for the layers that are compressed only."""
    folder = tmp_path_factory.mktemp("profiles")
    random_profile(ModelInfo.of(model), 2).write(folder / "hybrid.json")
    return folder


@pytest.fixture(params=CASES, ids=str)
def asked(request: pytest.FixtureRequest, profiles: Path) -> tuple[str, int, str | None]:
    """Each case as arguments of replay()."""
    case: Case = request.param
    return case.spec.replace(PROFILES, str(profiles)), case.budget, case.task


def read(model: PreTrainedModel, tokens: int, seed: int = 0, spec: str = "full", budget: int = 20, **more: Any):
    cache = wk.CompactCache(model, spec, budget, **more)
    return cache, prefill(model, prompt(tokens, seed), cache)


def windows(cache: wk.CompactCache) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Copies of what the sliding layers hold."""
    return [(layer.keys.clone(), layer.values.clone(), layer.cumulative_length) for layer in cache.sliding_layers]


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_replay_equals_a_live_prefill(model: PreTrainedModel, asked: tuple[str, int, str | None]) -> None:
    spec, budget, task = asked
    recorded, logits = read(model, PROMPT, record=PROMPT)
    replayed, live = recorded.replay(spec, budget, task=task), wk.CompactCache(model, spec, budget, task=task)
    assert torch.equal(prefill(model, prompt(PROMPT), live), logits)
    same(windows(replayed), windows(live))
    assert replayed.report.kept_entries == live.report.kept_entries
    for mine, theirs in zip(replayed.compact_layers, live.compact_layers, strict=True):
        assert [p is None or p.tolist() for p in mine.positions] == [p is None or p.tolist() for p in theirs.positions]
    # Longer than the window, so that all that the prompt left in it is gone at the end.
    tokens = list(greedy(model, replayed, logits, WINDOW + 8))
    assert len(set(tokens)) > 4  # else they would tell little
    assert tokens == list(greedy(model, live, logits, WINDOW + 8))
    same(windows(replayed), windows(live))


@pytest.mark.parametrize("tokens", [40, 9])
def test_a_replayed_cache_that_decodes_changes_no_other(model: PreTrainedModel, tokens: int) -> None:
    recorded, logits = read(model, tokens, record=tokens)
    before = windows(recorded)
    first, second, third = (recorded.replay("streaming", budget) for budget in (8, 8, 6))
    expected = list(greedy(model, read(model, tokens, spec="streaming", budget=8)[0], logits, 24))
    assert list(greedy(model, first, logits, 24)) == expected
    same(windows(recorded), before)
    same(windows(second), before)
    third.reset()
    same(windows(recorded), before)
    prefill(model, prompt(tokens, seed=3), third)
    extend(model, third, prompt(3), [tokens])
    assert list(greedy(model, second, logits, 24)) == expected
    same(windows(recorded), before)


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[-2:], (PROMPT, WINDOW - 2), (PROMPT, WINDOW - 1, PROMPT)], ids=str)
def test_stacked_rows_equal_single_runs(model: PreTrainedModel, lengths: tuple[int, ...]) -> None:
    """Prompts longer and shorter than the window; two tokens at once, then one, then freely in slots, leaving one by one."""
    specs, more = (
        ("full", "snapkv:observe=4", "adakv:of=snapkv:observe=4:kernel=3"),
        torch.cat([prompt(3, 9 + n) for n in range(len(lengths))]),
    )
    first, singles, placed = ([read(model, n, row, specs[row % 3], 8)[0] for row, n in enumerate(lengths)] for _ in range(3))
    stacked, seen = stack(first), list(lengths)
    for begin, end in ((0, 2), (2, 3)):
        logits = extend(model, stacked, more[:, begin:end], seen)
        for row, cache in enumerate(singles):
            alone = extend(model, cache, more[row : row + 1, begin:end], seen[row : row + 1])
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-4)
            extend(model, placed[row], more[row : row + 1, begin:end], seen[row : row + 1])
        seen = [tokens + end - begin for tokens in seen]
    last = logits[:, -1]
    limits = [4 + 3 * row for row in range(len(lengths))]
    expected = [list(greedy(model, cache, last[row : row + 1], limits[row])) for row, cache in enumerate(singles)]
    ends = {tuple(tokens) for tokens in expected}
    assert greedy_rows(placed, last, 99, lambda tokens: tuple(tokens) in ends) == expected


def test_rows_of_a_batch_are_chosen_and_repeated(model: PreTrainedModel) -> None:
    lengths = (40, 9, 12)
    stacked = stack([read(model, n, row)[0] for row, n in enumerate(lengths)])
    stacked.batch_select_indices(torch.tensor([2, 1]))
    stacked.batch_repeat_interleave(2)
    ids = torch.cat([prompt(4, seed=row) for row in range(4)])
    logits = extend(model, stacked, ids, [12, 12, 9, 9])
    for row, (seed, tokens) in enumerate(((2, 12), (2, 12), (1, 9), (1, 9))):
        alone = extend(model, read(model, tokens, seed)[0], ids[row : row + 1], [tokens])
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-4)


def test_crop_takes_back_what_no_window_has_lost(model: PreTrainedModel) -> None:
    wk.CompactCache(model, "streaming", 7).crop(-3)  # nothing was read yet
    cache, logits = read(model, 9, spec="streaming", budget=7)
    tokens = list(greedy(model, cache, logits, 6))  # five of them are read
    cache.crop(20)
    cache.crop(-2)
    cache.crop(10)
    ids = torch.tensor([tokens[1:6]])
    again = extend(model, cache, ids[:, :4], [10])
    fresh, _ = read(model, 9, spec="streaming", budget=7)
    torch.testing.assert_close(again, extend(model, fresh, torch.tensor([tokens[:5]]), [9])[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt_tokens", "back", "why"), [(40, 2, "slid on and lost"), (11, 4, "slid on"), (4, 9, "came after")]
)
def test_a_crop_that_is_refused_takes_nothing_back(model: PreTrainedModel, prompt_tokens: int, back: int, why: str) -> None:
    cache, logits = read(model, prompt_tokens)
    list(greedy(model, cache, logits, 7))
    before = windows(cache)
    with pytest.raises(wk.CacheError, match=why):
        cache.crop(-back)
    same(windows(cache), before)
    assert {layer.seen for layer in cache.compact_layers} == {prompt_tokens + 6}


def test_a_cache_that_was_reset_reads_the_next_prompt_afresh(model: PreTrainedModel) -> None:
    cache, logits = read(model, 40, spec="snapkv:observe=8")
    list(greedy(model, cache, logits, 8))
    cache.reset()
    fresh, expected = read(model, 33, 1, spec="snapkv:observe=8")
    assert torch.equal(prefill(model, prompt(33, 1), cache), expected)
    assert list(greedy(model, cache, expected, 20)) == list(greedy(model, fresh, expected, 20))


@pytest.mark.slow
@pytest.mark.skipif(
    not models.find_parts(models.GEMMA), reason=f"Gemma-3-270M is not installed ({models.PACKAGED[models.GEMMA].install})"
)
def test_gemma_replays_prompts_longer_than_its_window() -> None:
    model, words = wk.load(models.GEMMA, dtype=torch.float32, device="cpu")
    text = " ".join(f"Line {n}: the register of town {n * 7 % 50} is {n * 331 % 997}." for n in range(40))
    ids = words(text, return_tensors="pt").input_ids
    assert ids.shape[1] > model.config.sliding_window
    recorded = wk.CompactCache(model, "full", 1, record=8)
    logits = prefill(model, ids, recorded)
    live, replayed = wk.CompactCache(model, "snapkv:observe=8", 0.3), recorded.replay("snapkv:observe=8", 0.3)
    prefill(model, ids, live)
    assert len(live.compact_layers) == 3
    whole = [replayed, recorded.replay("full", 1)]
    expected = [list(greedy(model, cache, logits, 8)) for cache in (live, recorded.replay("full", 1))]
    assert greedy_rows(whole, logits.repeat(2, 1), 8, lambda _: False) == expected
