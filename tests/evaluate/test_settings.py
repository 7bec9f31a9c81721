"""Settings of one prompt: one prefill serves them all, similar ones decode together, and each equals its run alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.evaluate.settings import (
    Setting,
    batches,
    continue_all,
    decode_together,
    policies_for,
    read_prompt,
    replay,
    settings,
)  # fmt: skip

TASK = wk.TaskProfile.of("localization")
SPECS = ("full", "snapkv:observe=8", "streaming:observe=8", "adakv:of=snapkv:observe=8", "windowkv:observe=8")


def never(tokens: list[int]) -> bool:
    return False


def test_a_policy_that_evicts_nothing_is_asked_once() -> None:
    asked = settings(["full", "snapkv"], [0.5, 1, 1.0])
    assert [(s.policy, s.budget) for s in asked] == [("full", 0.5), ("snapkv", 0.5), ("snapkv", 1), ("snapkv", 1.0)]
    assert len(set(asked)) == 4
    with pytest.raises(wk.InputError, match="at least one policy and one budget"):
        settings([], [0.5])
    with pytest.raises(wk.PolicyError, match="Did you mean"):
        settings(["snapvk"], [0.5])


@pytest.mark.parametrize("question", [0, 3], ids=["query-aware", "context-only"])
def test_answers_equal_single_live_runs(model: PreTrainedModel, question: int) -> None:
    ids = prompt(100)[0].tolist()
    asked_later = prompt(3, seed=9)[0].tolist()[:question]
    asked = settings(SPECS, [24, 0.4])
    made = policies_for(asked, model, TASK)
    recorded, logits, _ = read_prompt(model, ids, made.values(), TASK)
    kept = replay(recorded, asked, made, TASK)
    assert [len(batch) for batch in batches(kept)] == [8, 1]  # the full cache by itself
    answers = continue_all(model, kept, logits, asked_later, 10, never)
    for setting in asked:
        cache = wk.CompactCache(model, setting.policy, setting.budget, task=TASK)
        alone = prefill(model, torch.tensor([ids]), cache)
        if question:
            alone = extend(model, cache, torch.tensor([asked_later]), [100])[:, -1]
        assert answers[setting].tokens == list(greedy(model, cache, alone, 10))
        assert answers[setting].steps == 10


def test_a_setting_that_fails_does_not_stop_the_others(llama: PreTrainedModel) -> None:
    ids = prompt(60)[0].tolist()
    asked = [Setting("snapkv:observe=32", 16), Setting("streaming:observe=8", 16)]
    made = policies_for(asked, llama, TASK)
    recorded, logits, _ = read_prompt(llama, ids, made.values(), TASK)
    kept = replay(recorded, asked, made, TASK)
    assert kept[0].cache is None
    assert "a budget of 16 entries" in (kept[0].failed or "")
    answers = continue_all(llama, kept, logits, [], 4, never)
    assert list(answers) == [asked[1]]


def test_rows_of_other_prompts_decode_together(llama: PreTrainedModel) -> None:
    """Prompts and questions of several lengths in one batch, each as by itself."""
    asked = settings(["snapkv:observe=8", "streaming:observe=8"], [24])
    rows = [(prompt(72)[0].tolist(), ()), (prompt(55, seed=1)[0].tolist(), (5, 6, 7)), (prompt(60, seed=2)[0].tolist(), (9,))]
    started, alone = [], []
    for ids, question in rows:
        made = policies_for(asked, llama, TASK)
        for target in (started, alone):
            recorded, logits, _ = read_prompt(llama, ids, made.values(), TASK)
            target += [replace(one, logits=logits, question=question) for one in replay(recorded, asked, made, TASK)]
    assert [len(batch) for batch in batches(started)] == [6]
    together = decode_together(llama, started, 8, never)
    for one, answer in zip(alone, together, strict=True):
        (single,) = decode_together(llama, [one], 8, never)
        assert single is not None
        assert answer is not None
        assert answer.tokens == single.tokens
        assert (single.batch, answer.batch) == (1, 6)


def test_a_limit_of_no_tokens_decodes_nothing(llama: PreTrainedModel) -> None:
    assert continue_all(llama, [], torch.zeros(1, 5), [], 4, never) == {}
