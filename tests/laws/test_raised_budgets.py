"""A fraction below what always stays is raised to it, at every door, and the report says so; entries below it are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.batch import padded
from support.cases import Case
from support.models import PROMPT, prompt
from support.tokenizers import word_tokenizer
from winnowkv.memory.plan import need
from winnowkv.memory.shape import shape_of
from winnowkv.models.info import ModelInfo

SNAP, LEAST = "snapkv:observe=8:sinks=2", 10
RAISED = "the budget is a fraction that gives {} entries of this prompt, fewer than always stay .* it was raised to {}$"


def read(model: PreTrainedModel, spec: str, budget: int | float, tokens: int, task: str | None = None) -> wk.CompactCache:
    cache = wk.CompactCache(model, spec, budget, task=task)
    wk.prefill(model, prompt(tokens), cache)
    return cache


def raised(report: wk.Report, of: int, to: int) -> bool:
    return any(re.search(RAISED.format(of, to), note) for note in report.notes)


def test_a_fraction_keeps_what_the_least_number_of_entries_keeps(llama: PreTrainedModel, evicting: Case) -> None:
    info, task = wk.PromptInfo(PROMPT, 5, PROMPT, wk.TaskProfile.of(evicting.task)), evicting.task
    least = wk.policy(evicting.spec).minimum_budget(info)
    small, entries = 0.5 / PROMPT, read(llama, evicting.spec, least, PROMPT, task)
    cache = read(llama, evicting.spec, small, PROMPT, task)
    assert cache.report.kept_entries == entries.report.kept_entries
    assert raised(cache.report, 0, least)
    assert not raised(entries.report, 0, least)
    if least > 1:
        with pytest.raises(wk.BudgetError, match=f"a budget of {least - 1} entries .*keep at least {least} entries"):
            read(llama, evicting.spec, least - 1, PROMPT, task)


@pytest.mark.parametrize("tokens", range(32, 43))
def test_winnow_reads_prompts_little_longer_than_its_window(llama: PreTrainedModel, tokens: int) -> None:
    """12% of 33 to 41 tokens is less than four sinks and the last token."""
    cache = read(llama, "winnow", 0.12, tokens)
    whole = tokens == 32
    assert cache.report.kept_entries == [[tokens if whole else 5] * 5] or sum(cache.report.kept_entries[0]) == 25
    assert raised(cache.report, int(0.12 * tokens), 5) == (32 < tokens < 42)


def test_a_prompt_that_cannot_hold_what_stays_is_kept_whole(llama: PreTrainedModel) -> None:
    cache = read(llama, SNAP, 0.5, 9)
    assert cache.report.kept_entries == [[9] * 5]
    assert raised(cache.report, 4, 9)


def test_each_row_of_a_padded_batch_is_raised_by_itself(llama: PreTrainedModel) -> None:
    ids, mask = padded([prompt(n, n) for n in (60, 20, 6)])
    cache = wk.CompactCache(llama, SNAP, 0.3)
    wk.prefill(llama, ids, cache, mask)
    assert cache.report.kept_entries == [[18] * 5, [10] * 5, [6] * 5]
    assert raised(cache.report, 6, LEAST)
    assert not raised(cache.report, 18, LEAST)
    for row, tokens in enumerate((60, 20, 6)):
        alone = wk.CompactCache(llama, SNAP, 0.3)
        wk.prefill(llama, prompt(tokens, tokens), alone)
        assert cache.report.kept_entries[row] == alone.report.kept_entries[0]


def test_an_impossible_row_of_a_batch_is_named(llama: PreTrainedModel) -> None:
    ids, mask = padded([prompt(n, n) for n in (6, 60, 20)])
    with pytest.raises(wk.BudgetError, match=r"^row 1 of a batch of 3: snapkv: a budget of 9 entries .* at least 10 entries"):
        wk.prefill(llama, ids, wk.CompactCache(llama, SNAP, 9), mask)
    with wk.compress(llama, SNAP, 9), pytest.raises(wk.BudgetError, match=r"^row 1 of a batch of 3: snapkv"):
        llama.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("ceiling", [None, 40])
def test_chunks(llama: PreTrainedModel, ceiling: int | None) -> None:
    cache = wk.CompactCache(llama, SNAP, 0.03)
    wk.prefill(llama, prompt(200), cache, chunk=64, ceiling=ceiling)
    assert cache.report.kept_entries == [[LEAST] * 5]
    assert raised(cache.report, 6, LEAST)


def test_replay_and_block(llama: PreTrainedModel) -> None:
    recorded = wk.CompactCache(llama, "full", 1, record=PROMPT)
    wk.prefill(llama, prompt(PROMPT), recorded)
    assert raised(recorded.replay(SNAP, 0.1).report, 7, LEAST)
    with wk.compress(llama, SNAP, 0.1) as run:
        llama.generate(prompt(PROMPT), max_new_tokens=2, do_sample=False)
    assert raised(run.report, 7, LEAST)


def test_the_engine_counts_the_raised_budget(llama: PreTrainedModel) -> None:
    engine = wk.Engine(llama, word_tokenizer(), SNAP, 0.1)
    request = engine.submit(prompt(PROMPT)[0].tolist(), wk.Sampling(max_new_tokens=3))
    assert request.claim.entries == [LEAST] * 5
    engine.step()
    assert raised(request.report, 7, LEAST)
    exact = wk.Engine(llama, word_tokenizer(), SNAP, LEAST).submit(prompt(PROMPT)[0].tolist(), wk.Sampling(max_new_tokens=3))
    assert replace(exact.claim, compression=request.claim.compression) == request.claim
    chunked = wk.Engine(llama, word_tokenizer(), SNAP, 0.03, prefill_chunk=64)
    assert chunked.submit(prompt(200)[0].tolist()).claim.entries == [LEAST] * 5


def test_plans_count_the_raised_budget(llama: PreTrainedModel) -> None:
    shape = shape_of(read(llama, "full", 1, 4).layers, llama)
    given = [need(shape, wk.policy(SNAP), wk.Budget.of(budget), PROMPT, wk.TaskProfile()) for budget in (0.1, LEAST)]
    assert given[0] == given[1]
    with pytest.raises(wk.BudgetError):
        need(shape, wk.policy(SNAP), wk.Budget.of(LEAST - 1), PROMPT, wk.TaskProfile())


def test_the_command_line_plans_and_generates_with_a_raised_budget(
    winnow: Callable[..., Any], llama: PreTrainedModel, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    how = ("--model", tmp_path / "model")
    code, out, err = winnow("plan", *how, "--context", 72, "--memory", "1GiB", "--policies", SNAP, "--budgets", "0.1", "--json")
    assert code == 0, err
    assert '"entries": 10' in out
    code, out, err = winnow("generate", *how, "--policy", SNAP, "--budget", "0.1", "--max-new-tokens", 2, "--no-chat",
                            " ".join(f"w{n}" for n in prompt(PROMPT)[0].tolist()))  # fmt: skip
    assert code == 0, err
    assert "it was raised to 10" in " ".join((out + err).split())


def test_a_fraction_as_text_and_one_of_numpy_are_fractions(llama: PreTrainedModel) -> None:
    for budget in ("0.1", torch.tensor(0.1, dtype=torch.float64).numpy()[()]):
        assert raised(read(llama, SNAP, budget, PROMPT).report, 7, LEAST)


def test_a_policy_of_ones_own_is_raised_by_its_own_minimum(llama: PreTrainedModel) -> None:
    made = wk.policy("streaming")
    bound = made.bind(ModelInfo.of(llama), made.prompt_info(wk.Budget(0.01), 50, 5))
    assert (bound.prompt.budget, bound.prompt.raised_from) == (5, 0)
    assert made.prompt_info(wk.Budget(3), 50, 5) == wk.PromptInfo(50, 5, 3)
