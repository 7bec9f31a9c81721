"""The laws hold if a prompt is held whole until its answer has begun, and if a draft is listened to."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.batch import BATCH_LENGTHS, padded
from support.cases import EVICTING, Case
from support.looking import LOOKING_CASES, chosen_by_hand, looking
from support.models import PROMPT, prompt
from support.reference import compact_logits, generate, positions, reference_logits, same_positions

TOKENS = 12  # of an answer, more than any lookahead here


@pytest.fixture(params=LOOKING_CASES, ids=str)
def seeing(request: pytest.FixtureRequest) -> Case:
    """Each case that evicts, with lookahead, draft and refit."""
    return request.param


def test_a_budget_of_the_whole_prompt_changes_no_token(llama: PreTrainedModel, seeing: Case) -> None:
    ids = prompt(40)
    full = generate(llama, ids, TOKENS)
    with wk.compress(llama, seeing.spec, 40, task=seeing.task) as run:
        assert generate(llama, ids, TOKENS) == full
    assert run.report.kept_fraction == 1


def test_budgets_are_met_to_the_entry(llama: PreTrainedModel, seeing: Case) -> None:
    cache = wk.CompactCache(llama, **seeing.settings)
    generate(llama, prompt(PROMPT), TOKENS, past_key_values=cache)
    layers = cache.compact_layers
    entries = sum(count for layer in layers for count in layer.counts(0))
    assert entries == seeing.budget * sum(layer.keys.shape[1] for layer in layers)
    for kept in positions(cache):
        for head in kept if kept is not None else ():
            held = head[head >= 0]
            assert (held.diff() > 0).all()
            assert held.max() < PROMPT
    assert cache.report.lookahead_tokens == 4
    assert cache.report.draft_tokens == 3
    assert cache.held_bytes == sum(part.untyped_storage().nbytes() for layer in layers for part in (layer.keys, layer.values))


def test_the_first_words_are_the_full_caches_and_nothing_goes_before(llama: PreTrainedModel, seeing: Case) -> None:
    ids = prompt(PROMPT)
    full = generate(llama, ids, 5)
    cache = wk.CompactCache(llama, **seeing.settings)
    assert generate(llama, ids, 5, past_key_values=cache) == full  # the fifth comes from the fourth, which was read whole
    assert all(kept is None for kept in positions(cache))
    assert cache.report.kept_fraction == 1


@pytest.mark.parametrize("case", EVICTING, ids=str)
def test_what_stays_is_what_the_heard_queries_choose(llama: PreTrainedModel, case: Case) -> None:
    """Against queries of one pass without a cache; and attention equals masked attention over the full cache."""
    seen = looking(case, "lookahead=4")
    ids, spoken = prompt(PROMPT), prompt(9, seed=3)
    by_hand, _ = chosen_by_hand(llama, seen, ids, spoken)
    cache = wk.CompactCache(llama, **seen.settings)
    logits = compact_logits(llama, cache, ids, [spoken[:, :1], spoken[:, 1:4], spoken[:, 4:6], spoken[:, 6:]])
    assert same_positions(positions(cache), by_hand)
    whole = reference_logits(llama, ids, spoken, [None] * len(by_hand))
    torch.testing.assert_close(logits[:5], whole[:5], rtol=0, atol=1e-5)
    plain = wk.CompactCache(llama, **case.settings)
    compact_logits(llama, plain, ids, [])
    if case.name != "windowkv":  # a window or two of so short a prompt may be the same
        assert not same_positions(positions(plain), by_hand)  # what was heard matters


def test_a_left_padded_batch_equals_single_runs(llama: PreTrainedModel, seeing: Case) -> None:
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    ids, mask = padded(rows)
    cache = wk.CompactCache(llama, **seeing.settings)
    together = generate(llama, ids, TOKENS, attention_mask=mask, past_key_values=cache)
    for at, row in enumerate(rows):
        alone = wk.CompactCache(llama, **seeing.settings)
        assert generate(llama, row, TOKENS, past_key_values=alone) == [together[at]]
        assert same_positions(positions(cache, at), positions(alone))
        assert cache.report.kept_entries[at] == alone.report.kept_entries[0]


def test_two_prompts_in_a_row_equal_each_alone_and_the_model_is_as_before(llama: PreTrainedModel, seeing: Case) -> None:
    before = (dict(llama._forward_pre_hooks), dict(llama._forward_hooks), llama.config._attn_implementation)
    prompts = [prompt(PROMPT), prompt(60, seed=5)]
    alone = []
    for ids in prompts:
        with wk.compress(llama, seeing.spec, seeing.budget, task=seeing.task):
            alone.append(generate(llama, ids, TOKENS))
    with wk.compress(llama, seeing.spec, seeing.budget, task=seeing.task) as run:
        assert [generate(llama, ids, TOKENS) for ids in prompts] == alone
        assert len(run.reports) == 2
    assert (dict(llama._forward_pre_hooks), dict(llama._forward_hooks), llama.config._attn_implementation) == before


def test_a_block_and_a_cache_of_ones_own_give_the_same(llama: PreTrainedModel, seeing: Case) -> None:
    ids, cache = prompt(PROMPT), wk.CompactCache(llama, **seeing.settings)
    own = generate(llama, ids, TOKENS, past_key_values=cache)
    with wk.compress(llama, seeing.spec, seeing.budget, task=seeing.task) as run:
        assert generate(llama, ids, TOKENS) == own
    assert run.report.kept_entries == cache.report.kept_entries
    assert run.report.refitted == cache.report.refitted


def test_a_draft_leaves_nothing_behind(llama: PreTrainedModel, seeing: Case) -> None:
    """After a draft the cache holds what it would hold if the draft's queries had come from nowhere."""
    ids, cache = prompt(PROMPT), wk.CompactCache(llama, **seeing.settings)
    generate(llama, ids, TOKENS, past_key_values=cache)
    for layer in cache.compact_layers:
        assert layer.seen == PROMPT + TOKENS - 1
        assert layer.generated == TOKENS - 1
    assert cache.looking is None
    assert cache.report.decode_tokens == TOKENS - 1


@pytest.mark.parametrize("spec", ["snapkv:observe=4", "winnow:observe=4:heads=3:least=4:samples=16"])
def test_a_cache_may_be_copied_while_it_looks(llama: PreTrainedModel, spec: str) -> None:
    cache = wk.CompactCache(llama, f"{spec}:lookahead=4:draft=3:refit=true", 20)
    ids, more = prompt(PROMPT), prompt(8, seed=4)
    compact_logits(llama, cache, ids, [more[:, :2]])
    other = copy.deepcopy(cache)
    with torch.no_grad():
        left, right = (
            torch.cat([llama(input_ids=token, past_key_values=one).logits for token in more[:, 2:].split(1, 1)])
            for one in (cache, other)
        )
    torch.testing.assert_close(left, right)
    assert cache.report.kept_fraction == other.report.kept_fraction < 1
