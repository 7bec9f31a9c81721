"""Policies that say so keep the same number of entries in every layer and head, whatever the prompt; others do not say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import CASES, EVICTING, STUDIED, Case
from support.models import PROMPT, prompt
from support.policies import KV_HEADS, bind, decided, drawn_states, run
from support.profiles import PROFILES
from support.study import attended
from support.tokenizers import ChatLetters
from winnowkv.cache.listening import again_ids
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import PromptInfo
from winnowkv.policies.expected import Expected
from winnowkv.policies.parts import Allocator
from winnowkv.policies.studied import StudiedPolicy
from winnowkv.prompt.chat import open_turn, text_begin
from winnowkv.prompt.structure import read_structure

TEXT = "The archive of Oakham was founded in 1712.\nIts first keeper wrote the history of the town; it has nine rooms."
SPANS = [(1, 4), (30, 33), (PROMPT - 2, PROMPT - 1)]
EQUAL = {
    "full", "int4", "int8", "random", "streaming", "snapkv", "tova", "h2o", "keydiff", "knorm", "lagkv", "expected:equal=true",
    "winnow:equal=true", "winnow:observe=context:equal=true", "kvzip:equal=true", "compresskv:budgets=uniform",
    "criticalkv:of=snapkv", "criticalkv:of=expected:equal=true", "chunkkv:of=snapkv", "chunkkv:of=winnow:equal=true",
    "snapkv:lookahead=8:draft=4:refit=true",
}  # fmt: skip
UNEQUAL = {
    "expected", "winnow", "winnow:observe=context", "kvzip", "kvzip:plus=true", "cake", "pyramidkv", "dynamickv", "headkv",
    "compresskv", "windowkv", "adakv", "adakv:of=expected:equal=true", "defensivekv", "criticalkv:of=expected",
    "criticalkv:of=adakv", "chunkkv:of=cake",
}  # fmt: skip
FLAT = [case for case in EVICTING if wk.policy(case.spec).keeps_equal]


def numbers(cache: wk.CompactCache) -> set[tuple[int, bool, int]]:
    """Of all layers the entries held, whether none of them is padding, and the entries of each head."""
    layers = cache.compact_layers
    assert all(layer.keys.shape[2] >= layer.length for layer in layers)
    return {(layer.length, layer.valid is None, layer.positions[0].shape[-1]) for layer in layers}  # type: ignore[union-attr]


def test_every_policy_says_what_it_keeps() -> None:
    assert {spec for spec in EQUAL | UNEQUAL if wk.policy(spec).keeps_equal} == EQUAL
    assert {spec.split(":")[0] for spec in EQUAL | UNEQUAL} >= {case.name for case in [*CASES, *STUDIED]}


@pytest.mark.parametrize("spec", sorted(EQUAL | UNEQUAL))
def test_after_a_study_only_the_option_keeps_equal(spec: str) -> None:
    """But where the policy selects by itself."""
    policy = wk.policy(spec)
    own = policy.own_selector or policy.keeps_spans or not policy.evicts
    assert StudiedPolicy(of=policy).keeps_equal == (policy.keeps_equal if own else policy.keeps_equal and policy.equal)


def test_a_policy_that_decides_numbers_has_to_say_so_anew() -> None:
    class Later(Allocator):
        def allocate(self, scores: Sequence[Tensor], held: Sequence[Any]) -> list[int]:
            return [self.prompt.budget + 1, self.prompt.budget - 1]

    @dataclass(frozen=True, kw_only=True)
    class Mine(Expected):
        def allocator(self, model: Any, prompt: PromptInfo) -> Allocator:
            return Later(prompt)

    @dataclass(frozen=True, kw_only=True)
    class Renamed(Expected):
        ahead: int = 64

    assert not Mine(equal=True).keeps_equal
    assert Renamed(equal=True).keeps_equal


def test_a_prompt_that_is_kept_whole_is_equal() -> None:
    assert bind("expected:observe=4:samples=16", 40, 5, 40).keeps_equal
    assert not bind("expected:observe=4:samples=16", 40, 5, 39).keeps_equal
    assert bind("expected:observe=4:samples=16:equal=true", 40, 5, 39).keeps_equal


@pytest.mark.parametrize("case", FLAT, ids=str)
def test_all_layers_and_heads_hold_the_budget_without_padding(model: PreTrainedModel, case: Case) -> None:
    cache = wk.CompactCache(model, **case.settings)
    wk.prefill(model, prompt(PROMPT), cache)
    assert numbers(cache) == {(case.budget, True, case.budget)}


@pytest.mark.parametrize("case", FLAT, ids=str)
def test_also_with_protected_spans_and_in_chunks(llama: PreTrainedModel, case: Case) -> None:
    budget = case.budget + 7
    cache = wk.CompactCache(llama, **{**case.settings, "budget": budget}, keep=SPANS)
    wk.prefill(llama, prompt(PROMPT), cache, chunk=64)
    assert numbers(cache) == {(budget, True, budget)}


@pytest.mark.parametrize("spec", ["winnow:observe=4:heads=3:samples=16", "expected:observe=4:samples=16", "snapkv:observe=4"])
def test_also_after_lookahead_draft_and_refit(llama: PreTrainedModel, spec: str) -> None:
    options = "lookahead=3:draft=2:refit=true" + (":equal=true" if "snapkv" not in spec else "")
    ids = prompt(PROMPT)
    with wk.compress(llama, f"{spec}:{options}", 20) as run_:
        llama.generate(ids, max_new_tokens=6, do_sample=False)
    assert set(run_.report.kept_entries[0]) == {20}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_of_any_prompt(data: st.DataObject) -> None:
    """Any length, budget, number of layers and protected span; also where all scores tie."""
    draw = data.draw
    spec = draw(st.sampled_from([case.spec for case in FLAT] + ["kvzip:equal=true", "criticalkv:of=expected:equal=true"]))
    tokens, layers = draw(st.integers(2, 90)), draw(st.integers(1, 7))
    budget, first = draw(st.integers(1, tokens)), draw(st.integers(0, tokens - 1))
    keep = draw(st.sampled_from([(), ((first, min(first + 3, tokens)),)]))
    model = bind("full", 1, layers, 1).model
    try:
        found = decided(spec, layers).bind(model, PromptInfo(tokens, layers, budget, wk.TaskProfile.of("localization"), keep))
    except (wk.BudgetError, wk.PolicyError):
        return
    assert found.keeps_equal
    selection, generator = PromptSelection(found), torch.Generator().manual_seed(draw(st.integers(0, 9)))
    constant = draw(st.booleans())
    for layer in range(layers):
        selection.observe(drawn_states(found, layer, generator, constant=constant))
    if not found.evicts:
        assert selection.kept == [None] * layers
        return
    for kept in selection.kept:
        rows = [[*range(tokens)]] if kept is None else kept[0].tolist()
        assert all(len({*row}) == len(row) == budget and min(row) >= 0 for row in rows)


def test_winnow_keeps_the_same_sentences_with_and_without() -> None:
    """Only how layers share what is left changes; a layer that is read after the last of the heads is at its budget at once."""
    spec = f"winnow:observe=8:heads=6:least=12:share=0.5:longest=5:peak=0.6:profile={PROFILES}"
    (uneven, _), (even, _) = (run(made, 120, 9, 40) for made in (spec, f"{spec}:equal=true"))
    assert even.common is not None
    assert uneven.common is not None
    assert even.common.shape[-1] == 20
    assert torch.equal(even.common, uneven.common)
    assert len({kept.shape[-1] for kept in uneven.kept if kept is not None}) > 1
    generator = torch.Generator().manual_seed(0)
    selection = PromptSelection(bind(f"{spec}:equal=true", 120, 9, 40))
    stop = selection.bound.parts.allocator.awaited.stop
    assert stop < 9
    for layer in range(9):
        selection.observe(drawn_states(selection.bound, layer, generator))
        if layer >= stop:
            assert {kept.shape for kept in selection.kept if kept is not None} == {(1, KV_HEADS, 40)}
            assert None not in selection.kept


STUDY = ["winnow:observe=context:samples=16", "expected:observe=4:samples=16", "criticalkv:of=expected:samples=16", "kvzip"]


def plain_sentences(most: Tensor, ends: Sequence[int], room: int) -> list[int]:
    """Positions of the sentences with the best mean after the sinks; of the last one its best tokens."""
    bounds = [4, *(end for end in ends if end > 4), len(most)]
    bounds = sorted({0, *(cut for begin, end in pairwise(bounds) for cut in range(begin, end, 64)), len(most)})
    spans = sorted(pairwise(bounds), key=lambda span: -most[slice(*span)].mean().item())
    order = [at for span in spans for at in sorted(range(*span), key=lambda at: -most[at].item()) if at >= 4]
    return order[:room]


@pytest.mark.parametrize("spec", [*STUDY, "kvzip:plus=true"])
@pytest.mark.parametrize(("budget", "share"), [(12, 0.0), (12, 0.5), (60, 0.0), (60, 0.75)])
def test_a_study_chooses_the_best_of_every_head(model: PreTrainedModel, spec: str, budget: int, share: float) -> None:
    """By the whole attention: the root mean square over what was read again, for kvzip the maximum; sinks stay.

    The best sentences come first if they have a share, by the maximum over all heads of all layers; not for kvzip.
    """
    doc = wk.read(model, ChatLetters(), TEXT, f"{spec}:equal=true", budget, study=wk.Study(sentences=share))
    assert numbers(doc.cache) == {(budget, True, budget)}
    ids = open_turn(ChatLetters(), TEXT, chat=True)
    ((instruction, chunk),) = again_ids(ChatLetters(), ids, text_begin(ChatLetters(), ids, chat=True), 2048, chat=True)
    found = attended(model, ids, [*instruction, *chunk], plus="plus" in spec)
    most = torch.cat([whole.unflatten(0, (2, -1)).amax((1, 2)) for whole in found]).mean(0)
    first = plain_sentences(most, read_structure(ChatLetters(), ids).ends, int(share * budget))
    for layer, whole in zip(doc.cache.compact_layers, found, strict=True):
        by_head = whole.unflatten(0, (2, -1))
        scores = by_head.amax((1, 2)) if "kvzip" in spec else by_head.square().mean(2).sqrt().mean(1)
        if "kvzip" not in spec:
            scores[:, first] = torch.inf
        scores[:, :4] = torch.inf
        (held,) = layer.positions
        assert torch.equal(held.cpu().long(), scores.topk(budget).indices.sort().values.cpu())


@pytest.mark.parametrize("spec", ["winnow:observe=4:heads=3:samples=16:equal=true", "expected:samples=16:equal=true", "snapkv"])
@pytest.mark.parametrize("hint", ["Who wrote the history?", None])
def test_documents_with_and_without_a_hint(llama: PreTrainedModel, spec: str, hint: str | None) -> None:
    """Also with protected spans; a hint leaves no entry behind."""
    for options in ({}, {"keep": [(20, 26)]}, {"chunk": 64}):
        doc = wk.read(llama, ChatLetters(), TEXT, spec, 50, hint=hint, **options)
        assert numbers(doc.cache) == {(50, True, 50)}


def test_refitted_values_are_those_of_the_same_tokens(llama: PreTrainedModel) -> None:
    """Refit changes values alone, and changes them."""
    plain, fitted = (
        wk.read(llama, ChatLetters(), TEXT, f"winnow:observe=context:samples=16:equal=true{more}", 20, study="lean")
        for more in ("", ":refit=true")
    )
    assert numbers(fitted.cache) == {(20, True, 20)}
    assert fitted.report.refitted > 0
    for one, other in zip(plain.cache.compact_layers, fitted.cache.compact_layers, strict=True):
        assert torch.equal(one.positions[0], other.positions[0])
        (keys, values), (same, changed) = one.entries_in_use(), other.entries_in_use()
        assert torch.equal(keys, same)
        assert not torch.equal(values, changed) or fitted.report.refitted < 1


def test_without_the_option_numbers_differ(llama: PreTrainedModel) -> None:
    """Of the same text, in the same ways: the laws above would find it."""
    for spec in STUDY:
        doc = wk.read(llama, ChatLetters(), TEXT, spec, 20, study=None if spec == "kvzip" else "lean")
        assert len(numbers(doc.cache)) > 1
    assert replace(Expected(equal=True), equal=False) == wk.policy("expected") == wk.policy("expected:equal=false")
