"""Lookahead beside everything else a cache can do: beams, choices, assistants, chunks, bits, budgets, copies, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.auto import profile_file
from support.cases import Case
from support.looking import chosen_by_hand, looking
from support.models import PROMPT, VOCABULARY, prompt
from support.reference import compact_logits, generate, positions, same_positions
from winnowkv.cache.forks import fork
from winnowkv.cache.reading import prefill
from winnowkv.errors import CacheError, InputError, PolicyError
from winnowkv.models.curve import Curve
from winnowkv.policies import LayerStates
from winnowkv.scoring.refit import refit_values

SPEC = "snapkv:observe=4:lookahead=4:draft=3:refit=true"
BLIND = "expected:observe=4:samples=16"
STRAIGHT = Curve(((0.0, 0.0), (1.0, 1.0)), 9)
TOKENS = 12


@torch.no_grad()
def test_a_refitted_cache_equals_an_explicit_reference(llama: PreTrainedModel) -> None:
    """Values by hand from the queries of one pass without a cache; what was not refitted is the prompt's own."""
    case = looking(Case(BLIND), "lookahead=6:refit=true")
    ids, spoken = prompt(PROMPT), prompt(8, seed=3)
    kept, states = chosen_by_hand(llama, case, ids, spoken)
    cache = wk.CompactCache(llama, **case.settings)
    compact_logits(llama, cache, ids, [spoken[:, :6], spoken[:, 6:]])
    assert same_positions(positions(cache), kept)
    refitted = 0
    policy = wk.policy(case.spec)
    for number, layer in enumerate(cache.compact_layers):
        queries, keys, values, scale = states[number]
        before = values[:, :, :PROMPT]
        asked = policy.scorer(cache.compression.model, cache.compression.prompt(PROMPT, 5, cache.compression.tasks[0]))
        picked = LayerStates(number, queries[:, :, asked.query_positions()], keys[:, :, :PROMPT], before, scale)
        own = asked.answer_queries(picked)
        heard = queries[:, :, PROMPT : PROMPT + 6]
        values_by_hand, used = refit_values(own, heard, keys[:, :, :PROMPT], before, kept[number], scale, policy.heard)
        entries = layer.length - layer.generated
        torch.testing.assert_close(layer.values[0, :, :entries], values_by_hand, rtol=0, atol=1e-4)
        columns = kept[number][..., None].expand(-1, -1, values.shape[-1])
        torch.testing.assert_close(layer.keys[0, :, :entries], keys[0].gather(1, columns), rtol=0, atol=1e-5)
        lookahead = layer.values[0, :, entries : entries + 6]  # what came after it saw the compact cache
        torch.testing.assert_close(lookahead, values[0, :, PROMPT : PROMPT + 6], rtol=0, atol=1e-5)
        refitted += int(used.sum())
    assert refitted > 0
    assert cache.report.refitted == refitted / 10


def test_refit_alone_waits_for_no_answer(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, f"{BLIND}:refit=true", 20)
    compact_logits(llama, cache, prompt(PROMPT), [])
    assert cache.looking is None
    assert cache.report.refitted > 0
    plain = wk.CompactCache(llama, BLIND, 20)
    compact_logits(llama, plain, prompt(PROMPT), [])
    assert cache.report.kept_bytes == plain.report.kept_bytes


def test_beams_and_several_answers_look_row_by_row(llama: PreTrainedModel) -> None:
    ids = prompt(PROMPT)
    with wk.compress(llama, SPEC, 20) as run:
        torch.manual_seed(4)
        several = generate(llama, ids, TOKENS, do_sample=True, num_return_sequences=3, temperature=3.0)
        assert len(run.report.kept_entries) == 3
        beams = generate(llama, ids, TOKENS, num_beams=2, num_return_sequences=2)
    assert len(set(map(tuple, several))) == 3
    for answer in several:  # each row's entries are those of its own first words
        cache = wk.CompactCache(llama, SPEC.replace(":draft=3", ""), 20)
        compact_logits(llama, cache, ids, [torch.tensor([answer[:4]]), torch.tensor([answer[4:5]])])
    assert len(beams) == 2


def test_rows_that_are_reordered_take_what_they_heard_along(llama: PreTrainedModel) -> None:
    spec, more = "snapkv:observe=4:lookahead=2:refit=true", torch.cat([prompt(4, seed=at) for at in (5, 6, 7)])
    ids = torch.cat([prompt(PROMPT, seed=at) for at in range(3)])
    cache, order = wk.CompactCache(llama, spec, 20), [2, 0, 0]
    with torch.no_grad():
        llama(input_ids=ids, past_key_values=cache)
        llama(input_ids=more[:, :2], past_key_values=cache)
        cache.batch_select_indices(torch.tensor(order))
        found = llama(input_ids=more[order][:, 2:], past_key_values=cache).logits
        for row, source in enumerate(order):
            alone = wk.CompactCache(llama, spec, 20)
            for part in (ids[source][None], more[source : source + 1, :2]):
                llama(input_ids=part, past_key_values=alone)
            expected = llama(input_ids=more[source : source + 1, 2:], past_key_values=alone).logits
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-4)
            assert same_positions(positions(cache, row), positions(alone))


def test_what_an_assistant_proposed_in_vain_is_not_heard(llama: PreTrainedModel) -> None:
    """Tokens that are taken back leave nothing; several that are accepted at once are heard up to the lookahead."""
    case = looking(Case("snapkv:observe=4"), "lookahead=4")
    ids, spoken = prompt(PROMPT), prompt(7, seed=3)
    by_hand, _ = chosen_by_hand(llama, case, ids, spoken)
    cache = wk.CompactCache(llama, **case.settings)
    compact_logits(llama, cache, ids, [spoken[:, :2], prompt(5, seed=9)])
    cache.crop(-5)
    compact_logits_more(llama, cache, [spoken[:, 2:6], spoken[:, 6:]])
    assert same_positions(positions(cache), by_hand)


@torch.no_grad()
def compact_logits_more(model: PreTrainedModel, cache: wk.CompactCache, parts: list[torch.Tensor]) -> None:
    for part in parts:
        model(input_ids=part, past_key_values=cache)


def test_assisted_decoding_works(llama: PreTrainedModel) -> None:
    ids = prompt(PROMPT).repeat(1, 1)
    with wk.compress(llama, SPEC, 20) as run:
        tokens = generate(llama, ids, TOKENS, prompt_lookup_num_tokens=3, eos_token_id=VOCABULARY - 1)
    assert len(tokens[0]) == TOKENS
    assert run.report.kept_fraction < 1


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_only_the_prompts_entries_are_quantized(llama: PreTrainedModel, stored: str) -> None:
    cache = wk.CompactCache(llama, f"{SPEC}:quantize={stored}", 20)
    generate(llama, prompt(PROMPT), TOKENS, past_key_values=cache)
    for layer in cache.compact_layers:
        assert layer.frozen == 20
        assert layer.length == 20 + TOKENS - 1


def test_chunks_change_nothing(llama: PreTrainedModel) -> None:
    ids, answers = prompt(150), []
    for chunk in (None, 64):
        cache = wk.CompactCache(llama, SPEC, 40)
        logits = prefill(llama, ids, cache, chunk=chunk)
        tokens = [int(logits.argmax())]
        for _ in range(TOKENS):
            with torch.no_grad():
                tokens.append(int(llama(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache).logits.argmax()))
        answers.append((tokens, positions(cache)))
    assert answers[0][0] == answers[1][0]
    assert same_positions(answers[0][1], answers[1][1])


def test_under_a_ceiling_the_choice_is_among_what_is_left(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=4:lookahead=3:refit=true", 40)
    prefill(llama, prompt(200), cache, chunk=64, ceiling=100)
    compact_logits_more(llama, cache, [prompt(3, seed=3), prompt(1, seed=4)])
    assert all(kept.shape[-1] == 40 for kept in positions(cache))
    assert max(int(kept.max()) for kept in positions(cache)) == 199


def test_a_decode_budget_holds_for_what_comes_after(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=4:lookahead=8", 20, decode_budget=64)
    generate(llama, prompt(PROMPT), 200, past_key_values=cache)
    assert all(layer.generated < 128 for layer in cache.compact_layers)
    assert all(layer.length == 20 + layer.generated for layer in cache.compact_layers)


def test_an_auto_budget_is_chosen_with_what_was_heard(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, STRAIGHT)
    cache = wk.CompactCache(llama, "snapkv:observe=4:lookahead=3", f"auto:0.7:{path}", keep_scores=True)
    generate(llama, prompt(PROMPT), TOKENS, past_key_values=cache)
    assert 0 < cache.report.kept_mass[0] <= 1
    assert 0 < cache.report.kept_fraction < 1
    assert cache.explain(0, 10)


def test_scores_are_explained_after_the_choice_only(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=4:lookahead=3", 20, keep_scores=True)
    compact_logits(llama, cache, prompt(PROMPT), [])
    with pytest.raises(CacheError, match="nothing was chosen of it"):
        cache.explain(0, 10)
    compact_logits_more(llama, cache, [prompt(3, seed=3), prompt(1, seed=4)])
    assert len(cache.explain(0, 10)) == 2


def test_a_cache_that_looks_is_not_forked_or_saved(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = wk.CompactCache(llama, SPEC, 20)
    compact_logits(llama, cache, prompt(PROMPT), [])
    with pytest.raises(
        CacheError, match="holds its whole prompt until 5 more tokens of its answer come, and cannot be forked before"
    ):
        fork(cache)
    with pytest.raises(CacheError, match="cannot be saved before"):
        wk.save_cache(cache, llama, tmp_path / "a.winnow")
    generate_more = [prompt(4, seed=3), prompt(1, seed=4)]
    compact_logits_more(llama, cache, generate_more)
    fork(cache)
    wk.save_cache(cache, llama, tmp_path / "a.winnow")
    assert wk.load_cache(tmp_path / "a.winnow", llama).report.refitted == cache.report.refitted


def test_a_hint_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="a hint is not: leave them out, or the hint"):
        prefill(llama, prompt(PROMPT), wk.CompactCache(llama, SPEC, 20), hint=5)


def test_a_reset_cache_looks_again(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, SPEC, 20)
    compact_logits(llama, cache, prompt(PROMPT), [prompt(2, seed=1)])
    cache.reset()
    assert not llama._forward_pre_hooks
    own = generate(llama, prompt(PROMPT), TOKENS, past_key_values=cache)
    assert own == generate(llama, prompt(PROMPT), TOKENS, past_key_values=wk.CompactCache(llama, SPEC, 20))
    assert not llama._forward_pre_hooks


@pytest.mark.parametrize("option", ["lookahead=2", "draft=2", "refit=true"])
def test_nothing_to_choose_is_refused_by_name(option: str) -> None:
    for name in ("full", "int8"):
        with pytest.raises(PolicyError, match=f"{name} keeps everything"):
            wk.policy(f"{name}:{option}")


@pytest.mark.parametrize(
    ("option", "message"),
    [("lookahead=-1", "at least 0"), ("draft=-1", "at least 0"), ("rounds=0", "at least 1"), ("heard=1.5", "at most 1")],
)
def test_options_outside_their_bounds(option: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        wk.policy(f"snapkv:{option}")


def test_a_policy_without_queries_has_nothing_to_refit_by_and_says_so(llama: PreTrainedModel) -> None:
    cache, plain = (wk.CompactCache(llama, spec, 20) for spec in ("keydiff:refit=true", "keydiff"))
    ids, more = prompt(PROMPT), prompt(3, seed=2)
    torch.testing.assert_close(compact_logits(llama, cache, ids, [more]), compact_logits(llama, plain, ids, [more]))
    assert cache.report.refitted == 0
    assert any("refit changed no value" in note for note in cache.report.notes)
