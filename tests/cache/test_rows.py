"""One forward pass of several whole caches gives each row what a pass of its own gives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.families import FAMILIES
from support.models import DEVICE, hybrid, prompt, tiny_model
from winnowkv.cache.reading import prefill
from winnowkv.cache.rows import read_rows
from winnowkv.engine.slots import Slots

LENGTHS = (72, 9, 33)
SPEC = "snapkv:observe=4:lookahead=50"


def eager() -> PreTrainedModel:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model("llama"), "eager": eager, "sliding windows": hybrid,
    **{name: FAMILIES[name].build for name in ("Gemma 2", "Gemma 3n text", "Gemma 4 text, shared KV", "gpt-oss")
       if name in FAMILIES and FAMILIES[name].exists},
}  # fmt: skip


def read(model: PreTrainedModel) -> list[wk.CompactCache]:
    caches = [wk.CompactCache(model, SPEC, 20) for _ in LENGTHS]
    for row, (cache, tokens) in enumerate(zip(caches, LENGTHS, strict=True)):
        prefill(model, prompt(tokens, row), cache)
    return caches


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_single_passes(name: str) -> None:
    model = MODELS[name]()
    slots = Slots(model)  # holds the model's routing
    alone, together = read(model), read(model)
    for step in range(20):
        tokens = prompt(len(LENGTHS), 50 + step)[0].tolist()
        single = [read_rows(model, [cache], [token], DEVICE) for cache, token in zip(alone, tokens, strict=True)]
        torch.testing.assert_close(read_rows(model, together, tokens, DEVICE), torch.cat(single), rtol=0, atol=1e-4)
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.looking.heard.tokens == theirs.looking.heard.tokens == 20
        assert mine.held_bytes == theirs.held_bytes
        assert mine.report.decode_tokens == theirs.report.decode_tokens == 20
        for number, layer in enumerate(theirs.compact_layers):
            heard = mine.looking.heard.of(number)
            if layer.keys is None:
                assert heard is None
                continue
            torch.testing.assert_close(heard, theirs.looking.heard.of(number), rtol=0, atol=1e-4)
            held = mine.compact_layers[number].entries_in_use()
            torch.testing.assert_close(held, layer.entries_in_use(), rtol=0, atol=1e-4)
    assert slots.rows == 0
