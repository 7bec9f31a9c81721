"""KVzip: the maximum of attention while the text is read again, one top-k over all layers and heads."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import DEVICE, prompt
from support.policies import KV_HEADS, bind, drawn_states
from support.study import attended
from support.tokenizers import ChatLetters
from winnowkv.cache.listening import again_ids
from winnowkv.cache.selection import PromptSelection
from winnowkv.prompt.chat import open_turn, text_begin

TEXT = "The archive of Oakham was founded in 1712.\nIts first keeper wrote the history of the town; it has nine rooms."
ELSEWHERE = r"kvzip: scores tokens while the model reads the text again, which wk\.read\(model, tokenizer, text, 'kvzip'\) does"


def best(scores: list[Tensor], sinks: int, total: int) -> list[list[list[int]]]:
    """By layer and head, the positions of the best ``total`` of all, the first ``sinks`` of every head among them."""
    ranked = sorted(
        (-float("inf") if at < sinks else -float(score), layer, head, at)
        for layer, heads in enumerate(scores)
        for head, row in enumerate(heads)
        for at, score in enumerate(row)
    )
    kept: list[list[list[int]]] = [[[] for _ in heads] for heads in scores]
    for _, layer, head, at in ranked[:total]:
        kept[layer][head].append(at)
    return [[sorted(row) for row in heads] for heads in kept]


@pytest.mark.parametrize("spec", ["kvzip", "kvzip:plus=true", "kvzip:sinks=0"])
@pytest.mark.parametrize("budget", [12, 60])
def test_what_stays_is_what_the_whole_attention_says(model: PreTrainedModel, spec: str, budget: int) -> None:
    doc = wk.read(model, ChatLetters(), TEXT, spec, budget)
    ids, plus = open_turn(ChatLetters(), TEXT, chat=True), "plus" in spec
    begin = text_begin(ChatLetters(), ids, chat=True)
    ((instruction, chunk),) = again_ids(ChatLetters(), ids, begin, 2048, chat=True)
    whole = attended(model, ids, [*instruction, *chunk], plus=plus)
    scores = [heads.unflatten(0, (2, -1)).amax((1, 2)) for heads in whole]
    expected = best(scores, 0 if "sinks" in spec else 4, budget * len(scores) * 2)
    kept = [layer.positions[0] for layer in doc.cache.compact_layers]
    assert [[row[row >= 0].tolist() for row in layer] for layer in kept] == expected
    assert sum(sum(map(len, layer)) for layer in expected) == budget * len(scores) * 2


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 70), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99), st.booleans(), st.integers(0, 6))
def test_the_budget_is_met_to_the_entry(tokens: int, layers: int, budget: int, seed: int, constant: bool, sinks: int) -> None:
    policy = wk.policy(f"kvzip:sinks={sinks}")
    if max(sinks, 1) > budget or budget > tokens:
        return
    selection = PromptSelection(bind(policy, tokens, layers, budget))
    generator = torch.Generator().manual_seed(seed)
    for layer in range(layers):
        selection.observe(drawn_states(selection.bound, layer, generator, constant=constant))
    if budget == tokens:
        assert selection.kept == [None] * layers
        return
    counts = 0
    for kept in selection.kept:
        rows = [[*range(tokens)]] * KV_HEADS if kept is None else [row[row >= 0].tolist() for row in kept[0]]
        for row in rows:
            assert row == sorted(set(row))
            assert set(range(min(sinks, tokens))) <= set(row) <= set(range(tokens))
            counts += len(row)
    assert counts == budget * layers * KV_HEADS


def test_the_allocator_gives_fractions_that_sum_to_the_budget() -> None:
    bound = bind("kvzip", 40, 3, 11)
    scores = [torch.rand(1, 3, 40, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    limits = bound.parts.allocator.allocate(scores, [40, 40, 40])
    assert sum(limits) == 33
    assert all(Fraction(limit).denominator in (1, 3) for limit in limits)


@pytest.mark.parametrize("way", ["compress", "cache", "prefill", "replay", "engine"])
def test_where_the_text_is_not_read_again_it_is_refused_before_anything_is_read(llama: PreTrainedModel, way: str) -> None:
    ids = prompt(40)

    def tried() -> Any:
        if way == "compress":
            with wk.compress(llama, "kvzip", 20):
                return llama(input_ids=ids)
        if way == "replay":
            recorded = wk.CompactCache(llama, "full", 1, record=8)
            wk.prefill(llama, ids, recorded)
            return recorded.replay("kvzip", 20)
        if way == "engine":
            (ended,) = wk.Engine(llama, ChatLetters(), "kvzip", 20).generate([ids[0].tolist()])
            raise wk.PolicyError(str(ended.error))
        cache = wk.CompactCache(llama, "kvzip", 20)
        try:
            return wk.prefill(llama, ids, cache) if way == "prefill" else llama(input_ids=ids, past_key_values=cache)
        finally:
            assert not cache.get_seq_length()

    with pytest.raises(wk.PolicyError, match=ELSEWHERE):
        tried()
    assert torch.isfinite(llama(input_ids=ids.to(DEVICE)).logits).all()
