"""Caches stacked into one batch decode as they would alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import Case
from support.models import prompt, tiny_model
from winnowkv.cache.reading import extend, prefill
from winnowkv.cache.stacked import stack


def read(model: PreTrainedModel, spec: str, budget: float, tokens: int, seed: int = 0) -> tuple[wk.CompactCache, torch.Tensor]:
    cache = wk.CompactCache(model, spec, budget)
    return cache, prefill(model, prompt(tokens, seed=seed), cache)


def test_every_policy_stacks_beside_a_longer_prompt(model: PreTrainedModel, case: Case) -> None:
    """Rows of other lengths, budgets and prompts; logits of two tokens at once, then one."""
    lengths, budgets, more = (72, 57), (case.budget, 0.75), torch.cat([prompt(3, seed=5), prompt(3, seed=6)])
    caches = []
    expected = []
    for row, (tokens, budget) in enumerate(zip(lengths, budgets, strict=True)):
        for target in (caches, expected):
            cache = wk.CompactCache(model, case.spec, budget, task=case.task)
            prefill(model, prompt(tokens, seed=row), cache)
            target.append(cache)
    stacked = stack(caches)
    for begin, end in ((0, 2), (2, 3)):
        seen = [tokens + begin for tokens in lengths]
        logits = extend(model, stacked, more[:, begin:end], seen)
        for row, cache in enumerate(expected):
            single = extend(model, cache, more[row : row + 1, begin:end], seen[row : row + 1])
            torch.testing.assert_close(logits[row : row + 1], single, rtol=0, atol=1e-4)


def test_caches_that_cannot_be_stacked_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="no cache was given"):
        stack([])
    other = tiny_model("llama")
    with pytest.raises(wk.CacheError, match="several models"):
        stack([read(llama, "full", 1, 20)[0], read(other, "full", 1, 20)[0]])
