"""Caches stacked into one batch decode as they would alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from conftest import Case, prompt, tiny_model
from winnowkv.engine import extend, greedy, greedy_rows, prefill
from winnowkv.stack import stack

SPECS = ("full", "snapkv:observe=8", "streaming:observe=8", "adakv:observe=8", "pyramidkv:observe=8")


def never(tokens: list[int]) -> bool:
    return False


def read(model: PreTrainedModel, spec: str, budget: float, tokens: int, seed: int = 0) -> tuple[wk.CompactCache, torch.Tensor]:
    cache = wk.CompactCache(model, spec, budget)
    return cache, prefill(model, prompt(tokens, seed=seed), cache)


def alone(model: PreTrainedModel, spec: str, budget: float, tokens: int, seed: int = 0, limit: int = 12) -> list[int]:
    cache, logits = read(model, spec, budget, tokens, seed)
    return list(greedy(model, cache, logits, limit))


def test_settings_of_one_prompt_decode_together(model: PreTrainedModel) -> None:
    made = [read(model, spec, 24, 72) for spec in SPECS]
    stacked = stack([cache for cache, _ in made])
    tokens = greedy_rows(model, stacked, torch.cat([logits for _, logits in made]), [72] * len(made), 12, never)
    assert tokens == [alone(model, spec, 24, 72) for spec in SPECS]


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


def test_rows_end_by_themselves_and_leave_the_batch(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [alone(llama, "snapkv:observe=8", 24, 60, seed) for seed in range(3)]
    ends = {tuple(whole[0][:3]), tuple(whole[2][:7])}
    made = [read(llama, "snapkv:observe=8", 24, 60, seed) for seed in range(3)]
    sizes = []
    forward = llama.forward

    def watched(*args: object, **kwargs: torch.Tensor) -> object:
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", watched)
    tokens = greedy_rows(
        llama, stack([cache for cache, _ in made]), torch.cat([logits for _, logits in made]), [60] * 3, 12,
        lambda tokens: tuple(tokens) in ends,
    )  # fmt: skip
    assert tokens == [whole[0][:3], whole[1], whole[2][:7]]
    assert sizes == [3] * 2 + [2] * 4 + [1] * 5


def test_a_logit_that_is_no_number_ends_its_row_only(llama: PreTrainedModel) -> None:
    made = [read(llama, "full", 1, 40, seed) for seed in range(2)]
    logits = torch.cat([logits for _, logits in made])
    logits[0, 3] = float("nan")
    tokens = greedy_rows(llama, stack([cache for cache, _ in made]), logits, [40, 40], 5, never)
    assert tokens == [None, alone(llama, "full", 1, 40, 1, limit=5)]


def test_what_cannot_be_stacked(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="no cache was given"):
        stack([])
    other = tiny_model("llama")
    with pytest.raises(wk.CacheError, match="several models"):
        stack([read(llama, "full", 1, 20)[0], read(other, "full", 1, 20)[0]])
