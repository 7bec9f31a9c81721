"""Every way to generate gives what greedy or sampled generation from the same compact cache gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

import winnowkv as wk
from support.batch import padded
from support.cases import Case
from support.models import PROMPT, hybrid, prompt, tiny_model
from support.reference import generate, positions, same_positions

SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 20}
NEW = 24
END = {"eos_token_id": 127}  # assisted decoding of older releases needs an end token


def repeating() -> Tensor:
    """A prompt that repeats itself, so that a lookup in it finds drafts."""
    return prompt(PROMPT // 3).repeat(1, 3)


# Assisted decoding


@pytest.mark.parametrize("assistant", ["lookup", "model"])
def test_assisted_decoding_gives_the_same_tokens(llama: PreTrainedModel, case: Case, assistant: str) -> None:
    ids = repeating()
    options: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 4} if assistant == "lookup" else {"assistant_model": tiny_model("llama")}
    )
    with wk.compress(llama, **case.settings) as plain:
        expected = generate(llama, ids, NEW, **END)
    cache = wk.CompactCache(llama, **case.settings)
    assert generate(llama, ids, NEW, **END, past_key_values=cache, **options)[0][:NEW] == expected[0]
    alone = wk.CompactCache(llama, **case.settings)
    wk.prefill(llama, ids, alone)
    assert same_positions(positions(cache), positions(alone))
    with wk.compress(llama, **case.settings) as run:
        assert generate(llama, ids, NEW, **END, **options)[0][:NEW] == expected[0]  # older releases give some more
    for report in (cache.report, run.report):
        assert report.prompt_tokens == [ids.shape[1]]  # a draft is none of the prompt
        assert report.kept_entries == plain.report.kept_entries
        assert -1 <= report.decode_tokens - len(expected[0]) <= 4  # and what was taken back does not count


@pytest.mark.parametrize("policy", ["snapkv:observe=8:quantize=int8", "int4"])
def test_assisted_decoding_of_a_quantized_cache(llama: PreTrainedModel, policy: str) -> None:
    with wk.compress(llama, policy, 20):
        expected = generate(llama, repeating(), NEW, **END)
        assert generate(llama, repeating(), NEW, **END, prompt_lookup_num_tokens=4) == expected


def test_assisted_decoding_with_a_decode_budget(llama: PreTrainedModel) -> None:
    with wk.compress(llama, **SNAP, decode_budget=64) as run:
        generate(llama, repeating(), 200, **END, prompt_lookup_num_tokens=4)
    assert run.report.decode_entries <= 128


def test_assisted_decoding_over_sliding_windows() -> None:
    model = hybrid()
    with wk.compress(model, **SNAP):
        expected = generate(model, repeating(), NEW, **END)
        if hasattr(DynamicSlidingWindowLayer, "activate_past_recording"):
            assert generate(model, repeating(), NEW, **END, prompt_lookup_num_tokens=4) == expected
            return
        with pytest.raises(wk.CacheError, match="window"):  # older releases cannot take tokens of a window back
            generate(model, repeating(), NEW, **END, prompt_lookup_num_tokens=4)


# One prompt, several answers


class Passes:
    """Notes how many rows and tokens each forward pass reads."""

    def __init__(self, model: Any) -> None:
        self.sizes: list[tuple[int, int]] = []
        model.model.embed_tokens.register_forward_pre_hook(lambda _, args: self.sizes.append(tuple(args[0].shape)))


def sampled(model: PreTrainedModel, ids: Tensor, **options: Any) -> list[list[int]]:
    torch.manual_seed(7)
    return generate(model, ids, 8, do_sample=True, **options)


def beams(model: PreTrainedModel, ids: Tensor, **options: Any) -> list[list[int]]:
    return generate(model, ids, 8, num_beams=3, **options)


@pytest.mark.parametrize("read", [sampled, beams])
def test_several_answers_read_the_prompt_once(llama: PreTrainedModel, case: Case, read: Callable[..., Any]) -> None:
    """The answers are those of a cache that read every row, which is what a cache of one's own does."""
    ids, mask = padded([prompt(PROMPT), prompt(50, seed=1)])
    expected = read(
        llama, ids, attention_mask=mask, num_return_sequences=3, past_key_values=wk.CompactCache(llama, **case.settings)
    )
    passes = Passes(llama)
    with wk.compress(llama, **case.settings) as run:
        assert read(llama, ids, attention_mask=mask, num_return_sequences=3) == expected
    assert passes.sizes == [(2, PROMPT), *[(6, 1)] * 7]
    assert run.report.prompt_tokens == [PROMPT, 50]


def test_several_answers_of_the_whole_cache_are_the_models_own(model: PreTrainedModel) -> None:
    expected = sampled(model, prompt(PROMPT), num_return_sequences=4)
    assert len({tuple(tokens) for tokens in expected}) > 1
    with wk.compress(model, "full", 1):
        assert sampled(model, prompt(PROMPT), num_return_sequences=4) == expected
