"""Protected spans: every policy keeps them in every layer and head, within its budget, and chooses the rest by its own rule."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import EVICTING, QUANTIZED, Case
from support.models import PROMPT, prompt
from winnowkv.policies.protected import read_spans

SPANS = [(1, 4), (30, 33), (PROMPT - 2, PROMPT - 1)]  # at the start, in the middle, inside every observation window
COUNT = 7


def kept_heads(cache: wk.CompactCache, layer: int) -> list[set[int]]:
    (held,) = cache.compact_layers[layer].positions
    assert held is not None
    return [{int(at) for at in head if at >= 0} for head in held]


@pytest.mark.parametrize("case", [*EVICTING, *QUANTIZED[2:]], ids=str)
def test_every_layer_and_head_keeps_protected_spans_within_the_budget(model: PreTrainedModel, case: Case) -> None:
    budget = case.budget + COUNT
    cache = wk.CompactCache(model, case.spec, budget, task=case.task, keep=SPANS)
    wk.prefill(model, prompt(PROMPT), cache)
    protected = {at for start, end in SPANS for at in range(start, end)}
    for layer in range(len(cache.compact_layers)):
        for head in kept_heads(cache, layer):
            assert protected <= head
    (entries,) = cache.report.kept_entries
    assert sum(Fraction(n).limit_denominator(8) for n in entries) == budget * len(entries)


@pytest.mark.parametrize("case", EVICTING, ids=str)
def test_without_spans_nothing_changes(llama: PreTrainedModel, case: Case) -> None:
    kept = []
    for options in ({}, {"keep": []}, {"keep": [(3, 3)]}):
        cache = wk.CompactCache(llama, case.spec, case.budget, task=case.task, **options)
        wk.prefill(llama, prompt(PROMPT), cache)
        kept.append([kept_heads(cache, layer) for layer in range(len(cache.compact_layers))])
    assert kept[0] == kept[1] == kept[2]


def test_a_protected_token_is_explained(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=4:kernel=3", 20, keep=SPANS, keep_scores=True)
    wk.prefill(llama, prompt(PROMPT), cache)
    assert {(fate.kept, fate.reason) for fate in cache.explain(0, 31)} == {(True, "protected")}
    assert {fate.reason for fate in cache.explain(0, 70)} == {"protected"}
    assert {fate.reason for fate in cache.explain(0, 71)} == {"recent window"}
    assert cache.report.kept_mass is not None
    assert 0 < cache.report.kept_mass[0] <= 1


def test_a_batch_and_a_block_take_spans(llama: PreTrainedModel) -> None:
    ids, mask = torch.cat([prompt(PROMPT), prompt(PROMPT, 1)]), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :10] = 0
    with torch.no_grad(), wk.compress(llama, "snapkv:observe=4:kernel=3", 20, keep=[(30, 33)]):
        cache = llama(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    for layer in cache.compact_layers:
        for held in layer.positions:
            assert all({30, 31, 32} <= set(head.tolist()) for head in held)


@pytest.mark.parametrize("ceiling", [None, 40])
def test_chunks_keep_protected_spans(llama: PreTrainedModel, ceiling: int | None) -> None:
    ids, spans = prompt(400), [(1, 4), (100, 110), (390, 395)]
    cache = wk.CompactCache(llama, "expected:observe=4:samples=16", 30, keep=spans)
    wk.prefill(llama, ids, cache, chunk=64, ceiling=None if ceiling is None else ceiling + 20)
    protected = {at for start, end in spans for at in range(start, end)}
    for layer in range(len(cache.compact_layers)):
        assert all(protected <= head for head in kept_heads(cache, layer))
    assert sum(cache.report.kept_entries[0]) == 30 * len(cache.compact_layers)


def test_spans_are_read_once_and_refused_by_name(llama: PreTrainedModel) -> None:
    assert read_spans([(5, 9), (0, 2), (2, 4), (8, 10), (7, 7)]) == ((0, 4), (5, 10))
    for wrong in (7, [3], [(1, 2, 3)], "ab", None):
        with pytest.raises(wk.InputError, match="keep="):
            read_spans(wrong)
    for wrong in ([(3, 1)], [(-1, 4)], [(0, 1.5)], [(False, True)], [("a", "b")]):
        with pytest.raises(wk.InputError, match="keep: the span"):
            read_spans(wrong)
    with pytest.raises(wk.InputError, match=r"ends after the prompt of 72 tokens"):
        wk.prefill(llama, prompt(PROMPT), wk.CompactCache(llama, "snapkv:observe=4", 20, keep=[(70, 80)]))
    with pytest.raises(wk.BudgetError, match="cannot hold the 30 protected"):
        wk.prefill(llama, prompt(PROMPT), wk.CompactCache(llama, "snapkv:observe=4", 20, keep=[(10, 40)]))


def test_a_fraction_is_raised_to_hold_protected_spans(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=4", 0.1, keep=[(10, 40)])
    wk.prefill(llama, prompt(PROMPT), cache)
    assert set(cache.report.kept_entries[0]) == {34}
    assert "it was raised to 34" in cache.report.notes[0]
