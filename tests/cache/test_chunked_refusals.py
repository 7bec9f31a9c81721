"""What cannot be read in chunks is refused, and what is interrupted leaves an empty cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, cache_utils

import winnowkv as wk
from support.chunks import CEILING, CHUNK, TOKENS, assert_same, read
from support.families import FAMILIES
from support.models import prompt
from winnowkv.cache.reading import prefill
from winnowkv.prompt.structure import Structure


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("snapkv:observe=8", {"chunk": 63}, "chunk=63 is too small: give at least 64"),
        ("snapkv:observe=8", {"chunk": 100.0}, "chunk=100.0 is too small"),
        ("snapkv:observe=90", {"chunk": 64}, "below the 90 last tokens that snapkv looks from: give chunk=90"),
        ("winnow:observe=90", {"chunk": 64}, "below the 90 last tokens that winnow looks from"),
        ("snapkv:observe=8", {"ceiling": 100}, "give chunk= too"),
        ("snapkv:observe=8", {"chunk": 64, "ceiling": 0}, "ceiling=0 must be entries"),
        ("snapkv:observe=8", {"chunk": 64, "ceiling": 1.5}, "ceiling=1.5 must be entries"),
        ("snapkv:observe=8", {"chunk": 64, "ceiling": "half"}, "ceiling='half' must be entries"),
        ("snapkv:observe=8", {"chunk": 64, "ceiling": 30}, "below the 95 that the budget"),
        ("full", {"chunk": 64, "ceiling": 30}, "below the 36 that"),
    ],
)
def test_a_chunk_or_ceiling_that_cannot_be_is_refused(llama: PreTrainedModel, spec: str, options: Any, message: str) -> None:
    cache = wk.CompactCache(llama, spec, 95)
    with pytest.raises(wk.InputError, match=message):
        read(llama, cache, **options)
    assert cache.get_seq_length() == 0


def test_a_question_longer_than_a_chunk_is_refused(llama: PreTrainedModel) -> None:
    task = wk.TaskProfile("localization", structure=Structure(TOKENS, 70, 3, (20, 100)))
    with pytest.raises(wk.InputError, match="below the 70 last tokens"):
        read(llama, wk.CompactCache(llama, "winnow", 95, task=task), chunk=CHUNK)


def test_several_or_padded_prompts_are_refused(llama: PreTrainedModel) -> None:
    cache, mask = wk.CompactCache(llama, "snapkv:observe=8", 20), torch.ones(1, TOKENS, dtype=torch.long)
    prefill(llama, prompt(TOKENS), cache, mask, chunk=CHUNK)
    cache.reset()
    mask[0, :3] = 0
    with pytest.raises(wk.InputError, match="one prompt without padding"):
        prefill(llama, prompt(TOKENS), cache, mask, chunk=CHUNK)
    with pytest.raises(wk.InputError, match="batch of 2"):
        prefill(llama, prompt(TOKENS).repeat(2, 1), cache, chunk=CHUNK)


def test_a_used_cache_is_refused(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=8", 20)
    read(llama, cache)
    with pytest.raises(wk.CacheError, match="reset"):
        read(llama, cache, chunk=CHUNK)


def test_recording_under_a_ceiling_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="leave the ceiling out"):
        read(llama, wk.CompactCache(llama, "full", 1, record=8), chunk=CHUNK, ceiling=CEILING)


def test_a_budget_below_the_window_is_refused_before_anything_is_read(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=32", 20)
    with pytest.raises(wk.BudgetError, match="keep at least 32"):
        read(llama, cache, chunk=CHUNK)
    assert cache.get_seq_length() == 0


def test_an_interrupted_prompt_leaves_an_empty_cache(llama: PreTrainedModel) -> None:
    calls = []
    cache, whole = (wk.CompactCache(llama, "snapkv:observe=8", 20, keep_scores=True) for _ in range(2))

    def interrupt(*_: object) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = llama.model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(llama, cache, chunk=CHUNK, ceiling=CEILING)
    hook.remove()
    assert cache.get_seq_length() == 0
    assert torch.equal(read(llama, cache), read(llama, whole))
    assert_same(llama, cache, whole)


def test_chunks_are_read_within_a_compress_block(llama: PreTrainedModel) -> None:
    cache, whole = (wk.CompactCache(llama, "snapkv:observe=8", 20, keep_scores=True) for _ in range(2))
    read(llama, whole)
    with wk.compress(llama, "streaming", 8) as run:
        read(llama, cache, chunk=CHUNK)
    assert_same(llama, cache, whole)
    assert not run.reports


def test_a_model_that_uses_the_cache_in_part_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=8", 20)
    update, skipped = cache.update, []

    def forgetful(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if layer == 3:
            skipped.append(layer)
            return keys, values
        return update(keys, values, layer, *args, **kwargs)

    monkeypatch.setattr(cache, "update", forgetful)
    with pytest.raises(wk.UnsupportedModelError, match="every attention layer"):
        read(llama, cache, chunk=CHUNK, ceiling=CEILING)
    assert len(skipped) == 1  # after the first chunk


def test_a_users_own_chunks_compress_the_first_only(llama: PreTrainedModel) -> None:
    """Without ``chunk=`` the first forward pass on a fresh cache is the prompt, and later ones are not."""
    own = wk.CompactCache(llama, "snapkv:observe=8", 20)
    with torch.no_grad():
        for part in prompt(150).split(64, 1):
            llama(input_ids=part, past_key_values=own)
    assert own.report.prompt_tokens == [64]
    assert own.compact_layers[0].length == 20 + 86


@pytest.mark.skipif(not hasattr(cache_utils, "LinearAttentionLayer"), reason="older releases refuse such models")
def test_states_that_chunks_may_lose_are_warned_of() -> None:
    model = FAMILIES["Jamba"].build()
    with pytest.warns(UserWarning, match="JambaForCausalLM keeps states"):
        prefill(model, prompt(130), wk.CompactCache(model, "snapkv:observe=8", 20), chunk=64)
