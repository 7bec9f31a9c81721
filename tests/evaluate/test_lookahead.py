"""Lookahead, draft and refit in evaluation: every answer is the live one, and what the full cache says is found once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import hybrid, prompt
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.stacked import stack
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import greedy_rows
from winnowkv.evaluate.lookahead import FirstTokens, check_asked_later, looked, read_answer
from winnowkv.evaluate.settings import Kept, continue_all, policies_for, read_prompt, replay, settings

TASK = wk.TaskProfile.of("localization")
TOKENS, LIMIT = 72, 14
SNAPKV = "snapkv:observe=8:kernel=3"
SPECS = (
    f"{SNAPKV}:lookahead=4",
    f"{SNAPKV}:lookahead=7:draft=5",
    f"{SNAPKV}:draft=5",
    f"{SNAPKV}:refit=true",
    f"{SNAPKV}:lookahead=4:draft=5:rounds=2:refit=true",
    f"adakv:floor=0:of={SNAPKV}:lookahead=4:draft=3:refit=true",
    "expected:observe=4:samples=16:lookahead=1",
    "winnow:observe=4:heads=3:sinks=2:samples=16:least=4:lookahead=4:draft=5",
    SNAPKV,
)


def never(tokens: list[int]) -> bool:
    return False


def live(model: PreTrainedModel, spec: str, budget: float, limit: int = LIMIT) -> tuple[list[int], wk.CompactCache]:
    cache = wk.CompactCache(model, spec, budget, task=TASK)
    return list(greedy(model, cache, prefill(model, prompt(TOKENS), cache), limit)), cache


def replayed(
    model: PreTrainedModel, specs: tuple[str, ...], done: Callable[[list[int]], bool] = never, budget: float = 24
) -> tuple[list[Kept], Tensor]:
    asked = settings(specs, [budget])
    made = policies_for(asked, model, TASK)
    recorded, logits, _ = read_prompt(model, prompt(TOKENS)[0].tolist(), made.values(), TASK)
    return replay(recorded, asked, made, TASK, first=FirstTokens(model, logits, LIMIT, done)), logits


def positions(cache: Any) -> list[Any]:
    return [None if p is None else p.tolist() for layer in cache.compact_layers for p in layer.positions]


def seen_of(cache: Any) -> int:
    return cache.compact_layers[0].seen


@pytest.mark.parametrize("order", [1, -1])
def test_every_setting_answers_as_it_does_live(model: PreTrainedModel, order: int) -> None:
    kept, logits = replayed(model, SPECS[::order])
    chosen = {one.setting: positions(one.cache) for one in kept}
    answers = continue_all(model, kept, logits, [], LIMIT, never)
    for one in kept:
        tokens, cache = live(model, one.setting.policy, 24)
        assert answers[one.setting].tokens == tokens
        assert chosen[one.setting] == positions(cache)
        mine, theirs = looked(one.cache), looked(cache)
        assert {**mine, "draft_s": 0} == {**theirs, "draft_s": 0}
        assert (mine["draft_s"] > 0) == bool(mine["draft_tokens"])
    assert len({tuple(tokens) for one in kept if (tokens := answers[one.setting].tokens)}) > 1, "all keep the same: no test"


def test_sliding_windows_and_a_budget_that_keeps_all() -> None:
    model = hybrid()
    for budget in (24, 1.0):
        kept, logits = replayed(model, SPECS[:5], budget=budget)
        answers = continue_all(model, kept, logits, [], LIMIT, never)
        for one in kept:
            assert answers[one.setting].tokens == live(model, one.setting.policy, budget)[0]


def test_the_full_caches_tokens_are_found_once_and_then_read_in_one_pass(llama: PreTrainedModel, monkeypatch: Any) -> None:
    sizes: list[int] = []
    forward = llama.forward

    def watched(*args: object, **kwargs: Tensor) -> object:
        sizes.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", watched)
    kept, _ = replayed(llama, tuple(f"{SNAPKV}:lookahead={ahead}" for ahead in (4, 6, 2)))
    assert sizes == [TOKENS, 1, 1, 1, 1, 4, 1, 1, 2]
    assert [len(one.spoken) for one in kept] == [4, 6, 2]
    assert kept[1].spoken[:4] == kept[0].spoken


def test_queries_of_one_pass_are_those_of_single_tokens(llama: PreTrainedModel) -> None:
    """So that what is chosen does not depend on which setting was read first."""
    spec = f"{SNAPKV}:lookahead=6"
    (single, together), logits = replayed(llama, (spec, f"{spec}:heard=0.70001"))
    recorded, _, _ = read_prompt(llama, prompt(TOKENS)[0].tolist(), [wk.policy(spec)], TASK)
    one_by_one, at_once = (recorded.replay(spec, 24, task=TASK) for _ in range(2))
    tokens = torch.tensor([single.spoken], device=logits.device)
    for at in range(6):
        extend(llama, one_by_one, tokens[:, at : at + 1], [TOKENS + at])
    extend(llama, at_once, tokens, [TOKENS])
    for layer in range(len(single.cache.compact_layers)):
        torch.testing.assert_close(at_once.looking.heard.of(layer), one_by_one.looking.heard.of(layer), rtol=0, atol=1e-5)
    assert positions(single.cache) == positions(together.cache)


@pytest.mark.parametrize("last", [0, 3, 4, 5])
def test_an_answer_that_ends_within_the_lookahead_evicts_nothing(llama: PreTrainedModel, last: int) -> None:
    """Token ``last`` ends the answer: with lookahead=4 the first that is read from the compact cache is token 4."""
    free, _ = live(llama, "full", 1)
    (one, other), logits = replayed(
        llama, (f"{SNAPKV}:lookahead=4", f"{SNAPKV}:lookahead=2"), lambda tokens: tokens == free[: last + 1]
    )
    answers = continue_all(llama, [one, other], logits, [], LIMIT, lambda tokens: tokens == free[: last + 1])
    whole = last <= 4
    assert looked(one.cache)["whole"] is whole
    assert (one.cache.report.kept_bytes == one.cache.report.full_bytes) is whole
    assert ("evicts nothing" in " ".join(one.cache.report.notes)) is whole
    if whole:
        assert answers[one.setting].tokens == free[: last + 1]
        assert (answers[one.setting].steps, answers[one.setting].seconds) == (0, 0.0)
    assert looked(other.cache)["whole"] is (last <= 2)
    _, cache = live(llama, f"{SNAPKV}:lookahead=4", 24, last + 1)
    assert looked(cache)["whole"] is whole  # a live answer of so many tokens does the same


def test_a_logit_that_is_no_number_ends_the_lookahead(llama: PreTrainedModel) -> None:
    asked = settings((f"{SNAPKV}:lookahead=4", "full"), [24])
    made = policies_for(asked, llama, TASK)
    recorded, logits, _ = read_prompt(llama, prompt(TOKENS)[0].tolist(), made.values(), TASK)
    broken = logits.clone()
    broken[0, 3] = float("nan")
    again = replay(recorded, asked, made, TASK, first=FirstTokens(llama, broken, LIMIT, never))
    answers = continue_all(llama, again, logits, [], LIMIT, never)
    assert answers[asked[0]].tokens is None
    assert answers[asked[1]].tokens is not None


def test_a_known_answer_is_read_as_far_as_it_goes_on(llama: PreTrainedModel) -> None:
    """As a free one of the same tokens: what is chosen, and whether anything is evicted at all."""
    free, whole = live(llama, "full", 1)
    whole = wk.CompactCache(llama, "full", 1)
    first = prefill(llama, prompt(TOKENS), whole)
    truth = torch.cat([first, extend(llama, whole, torch.tensor([free[:-1]], device=first.device), [TOKENS])[0]])
    for tokens, evicts in ((free, True), (free[:6], True), (free[:5], False), (free[:1], False)):
        cache = wk.CompactCache(llama, SPECS[4], 24, task=TASK)
        prefill(llama, prompt(TOKENS), cache)
        begun = FirstTokens.known(llama, tokens, truth[: len(tokens)]).begin(cache)
        assert begun.over is not evicts
        assert (cache.looking is None) is evicts
        if evicts:
            assert begun.tokens == tuple(free[:4])
            assert positions(cache) == positions(live(llama, SPECS[4], 24)[1])
            assert seen_of(cache) == TOKENS + 4
            torch.testing.assert_close(begun.logits, truth[4:5])


@pytest.mark.parametrize("spec", SPECS)
def test_a_continuation_read_at_once_is_that_of_single_tokens(llama: PreTrainedModel, spec: str) -> None:
    """A draft hears one token of it, as in an answer, not all that is forced."""
    forced = prompt(10, seed=7)
    single, together = (wk.CompactCache(llama, spec, 24, task=TASK) for _ in range(2))
    for cache in (single, together):
        prefill(llama, prompt(TOKENS), cache)
    expected = torch.cat([extend(llama, single, forced[:, at : at + 1], [TOKENS + at]) for at in range(10)], 1)
    torch.testing.assert_close(read_answer(llama, together, forced), expected, rtol=0, atol=1e-4)
    assert positions(together) == positions(single)
    short = wk.CompactCache(llama, spec, 24, task=TASK)
    prefill(llama, prompt(TOKENS), short)
    torch.testing.assert_close(read_answer(llama, short, forced[:, :1]), expected[:, :1], rtol=0, atol=1e-4)


def test_what_still_holds_its_prompt_is_not_stacked_nor_placed(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, f"{SNAPKV}:lookahead=4", 24)
    logits = prefill(llama, prompt(TOKENS), cache)
    message = "holds its whole prompt until 5 more tokens of its answer come, and cannot be"
    with pytest.raises(wk.CacheError, match=f"{message} stacked"):
        stack([cache])
    with pytest.raises(wk.CacheError, match=f"{message} placed in a slot"):
        Slots(llama).place(cache, 8)
    with pytest.raises(wk.CacheError, match="leave lookahead and draft out of the policy"):
        greedy_rows([cache], logits, 4, never)
    extend(llama, cache, prompt(4, seed=3), [TOKENS])
    with pytest.raises(wk.CacheError, match="until 1 more tokens"):
        stack([cache])
    extend(llama, cache, prompt(1, seed=4), [TOKENS + 4])
    assert len(stack([cache]).compact_layers) == len(cache.compact_layers)


def test_begun_rows_continue_beside_fresh_ones(llama: PreTrainedModel) -> None:
    alone = [live(llama, spec, 24)[0] for spec in (f"{SNAPKV}:lookahead=4", "full")]
    (begun, fresh), logits = replayed(llama, (f"{SNAPKV}:lookahead=4", "full"))
    told: list[list[int]] = []

    def done(tokens: list[int]) -> bool:
        told.append(list(tokens))
        return False

    rows = greedy_rows([begun.cache, fresh.cache], torch.cat([begun.logits, logits]), LIMIT, done, [begun.spoken, ()])
    assert rows == alone
    assert told[0] == alone[0][:5]


def test_a_text_compressed_before_its_question_is_known_is_not_asked_with_a_lookahead() -> None:
    check_asked_later(["full", SNAPKV, f"{SNAPKV}:refit=true"])
    for spec in (f"{SNAPKV}:lookahead=4", f"adakv:of={SNAPKV}:draft=4"):
        with pytest.raises(wk.InputError, match="hears the answer before it evicts"):
            check_asked_later(["full", spec])
