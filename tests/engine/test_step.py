"""Greedy answers of many caches: each row gets the tokens it would get alone, ends by itself, and frees its slot at once."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import QUANTIZED, Case
from support.models import hybrid, prompt, tiny_model
from winnowkv.cache.reading import greedy, prefill
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import greedy_rows
from winnowkv.errors import CacheError

LENGTHS = (72, 57, 64)
BUDGETS = (0.7, 48, 1.0)
BLOCKS = 70  # tokens that outlive the room that a row is given at first


def never(tokens: list[int]) -> bool:
    return False


def read(model: PreTrainedModel, row: int, **settings: object) -> tuple[wk.CompactCache, torch.Tensor]:
    cache = wk.CompactCache(model, **settings)
    return cache, prefill(model, prompt(LENGTHS[row], seed=row), cache)


def answers(
    model: PreTrainedModel, every: list[dict[str, object]], limit: int
) -> tuple[list[list[int] | None], list[list[int]]]:
    """Tokens of rows with these settings in one batch, and of each alone."""
    made = [read(model, row % len(LENGTHS), **settings) for row, settings in enumerate(every)]
    rows = greedy_rows([cache for cache, _ in made], torch.cat([logits for _, logits in made]), limit, never)
    alone = [list(greedy(model, *read(model, row % len(LENGTHS), **settings), limit)) for row, settings in enumerate(every)]
    return rows, alone


def snapkv(model: PreTrainedModel) -> tuple[list[wk.CompactCache], torch.Tensor, list[list[int]]]:
    """Three caches, their logits, and the tokens of each alone."""
    made, again = ([read(model, row, policy="snapkv:observe=8", budget=24) for row in range(3)] for _ in range(2))
    alone = [list(greedy(model, cache, logits, 12)) for cache, logits in again]
    return [cache for cache, _ in made], torch.cat([logits for _, logits in made]), alone


def test_every_policy_answers_as_alone(llama: PreTrainedModel, case: Case) -> None:
    rows, alone = answers(llama, [{**case.settings, "budget": budget} for budget in (case.budget, *BUDGETS[1:])], 10)
    assert rows == alone


@pytest.mark.parametrize("spec", ["full", "snapkv:observe=4", "adakv:floor=0:of=snapkv:observe=4"])
def test_rows_of_sliding_window_models_answer_as_alone(spec: str) -> None:
    rows, alone = answers(hybrid(), [{"policy": spec, "budget": budget} for budget in BUDGETS], 30)
    assert rows == alone


def test_rows_decode_past_their_initial_buffers(llama: PreTrainedModel) -> None:
    rows, alone = answers(llama, [{"policy": "adakv:of=snapkv:observe=4", "budget": budget} for budget in BUDGETS], BLOCKS)
    assert rows == alone


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_rows_answer_as_alone(llama: PreTrainedModel, case: Case) -> None:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    rows, alone = answers(llama, [case.settings, {"policy": "full", "budget": 1}, case.settings], 12)
    assert rows == alone


def test_rows_end_by_themselves_and_leave_the_batch(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    caches, logits, alone = snapkv(llama)
    ends = {tuple(alone[0][:3]), tuple(alone[2][:7])}
    sizes = []
    forward = llama.forward

    def watched(*args: object, **kwargs: torch.Tensor) -> object:
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", watched)
    assert greedy_rows(caches, logits, 12, lambda tokens: tuple(tokens) in ends) == [alone[0][:3], alone[1], alone[2][:7]]
    assert sizes == [3] * 2 + [2] * 4 + [1] * 5  # and no forward pass to see what the layers are made of


def test_rows_that_end_with_their_first_token_are_never_placed(llama: PreTrainedModel) -> None:
    caches, logits, alone = snapkv(llama)
    assert greedy_rows(caches, logits, 1, never) == [tokens[:1] for tokens in alone]
    assert all(cache.held_bytes for cache in caches)


def test_a_logit_that_is_no_number_ends_its_row_only(llama: PreTrainedModel) -> None:
    """In the prompt's logits, and in those of a later step."""
    caches, logits, alone = snapkv(llama)
    logits[0, 3] = float("nan")
    caches[2].compact_layers[1].values[:] = float("nan")
    assert greedy_rows(caches, logits, 12, never) == [None, alone[1], None]


def test_caches_that_slots_do_not_take_are_refused(llama: PreTrainedModel) -> None:
    cache, logits = read(llama, 0, policy="full", budget=1)
    foreign, _ = read(tiny_model("llama"), 1, policy="full", budget=1)
    with pytest.raises(CacheError, match="another model"):
        greedy_rows([cache, foreign], logits.repeat(2, 1), 4, never)
    assert cache.held_bytes, "one that is refused takes the others with it"
    assert greedy_rows([cache], logits, 4, never) == [list(greedy(llama, *read(llama, 0, policy="full", budget=1), 4))]


def test_a_quantized_cache_shows_what_layers_are_made_of(llama: PreTrainedModel) -> None:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    cache, _ = read(llama, 0, policy="int8", budget=1)
    for mine, theirs in zip(Slots(llama, like=cache).layers, Slots(llama).layers, strict=True):
        for part in ("keys", "values"):
            one, other = getattr(mine, part), getattr(theirs, part)
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
