"""What was asked for a text is checked before anything is read, and what it claims of the memory is enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import hybrid
from support.tokenizers import ChatLetters
from winnowkv.cache.layer import CompactLayer
from winnowkv.contexts.making import plan_context

TEXT = "The archive of Oakham was founded in 1712. Its keeper, Mary Lund, wrote the history. " * 3
QUESTION = "Who wrote it?"


def plan(model: PreTrainedModel, **asked: Any) -> Any:
    return plan_context(model, ChatLetters(), TEXT, **{"budget": 128, **asked})


@pytest.mark.parametrize(
    "asked",
    [
        {"study": "none"}, {"study": "lean"}, pytest.param({"study": "full"}, marks=pytest.mark.slow), {"hint": QUESTION},
        {"portable": False}, {"policy": "kvzip:equal=true"}, {"policy": "full", "budget": 1.0},
        {"portable": False, "policy": "adakv:of=snapkv:observe=4", "budget": 0.2},
    ],
    ids=str,
)  # fmt: skip
def test_no_more_tokens_are_held_than_were_claimed(
    llama: PreTrainedModel, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(llama, **asked)
    held, update = [0], CompactLayer.update

    def noting(layer: CompactLayer, *states: Any, **more: Any) -> Any:
        found = update(layer, *states, **more)
        held.append(layer.length)
        return found

    monkeypatch.setattr(CompactLayer, "update", noting)
    document = made.read()
    assert made.tokens <= max(held) <= made.held_tokens
    kept = [sum(row) / len(row) for row in document.report.kept_entries]
    assert kept == [pytest.approx(made.entries, abs=1)]
    assert document.cache.decode_budget is None


def test_a_text_without_room_to_be_read_again_is_not_studied_and_that_is_said(llama: PreTrainedModel) -> None:
    assert plan(llama).study is not None
    llama.config.max_position_embeddings = 300
    made = plan(llama)
    assert made.study is None
    assert made.notes == ("the model has no positions left to read the document again: a hint says what must not be lost",)
    with pytest.raises(wk.InputError, match="study: "):
        plan(llama, study="lean")


@pytest.mark.parametrize(
    ("asked", "error", "why"),
    [
        (
            {"policy": "pyramidkv:observe=4"},
            wk.PolicyError,
            "may keep different numbers of entries in layers and heads, a context",
        ),
        (
            {"policy": "winnow", "study": "lean"},
            wk.PolicyError,
            "of a text that is studied, a context .* use a policy with equal",
        ),
        ({"budget": "auto:0.9"}, wk.BudgetError, "a context needs a number beforehand"),
        ({"hint": QUESTION, "study": "lean"}, wk.InputError, "give one of the two"),
        ({"policy": "snapkv:lookahead=4"}, wk.InputError, "leave both out"),
        ({"policy": "full", "study": "full"}, wk.InputError, "nothing to study"),
        ({"hint": " "}, wk.InputError, "the question is empty"),
        ({"system": "Be brief.", "chat": False}, wk.InputError, "a system message needs a chat template"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_is_read(
    llama: PreTrainedModel, asked: dict[str, Any], error: type[Exception], why: str
) -> None:
    llama.register_forward_pre_hook(lambda *_: pytest.fail("it was read"))
    with pytest.raises(error, match=why):
        plan(llama, **asked)


def test_a_model_whose_keys_cannot_be_moved_makes_saved_contexts_only(llama: PreTrainedModel) -> None:
    llama.config.attn_temperature_tuning = True
    with pytest.raises(wk.UnsupportedModelError, match="scales queries by their position"):
        plan(llama)
    assert plan(llama, portable=False).entries == 128
    assert torch.is_tensor(plan(hybrid(), policy="snapkv:observe=4").read().cache.compact_layers[0].keys)
