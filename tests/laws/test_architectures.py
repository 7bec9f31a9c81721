"""Any model whose attention goes through the interface is served, on the oldest and newest transformers; others are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.architectures import REFUSED, SERVED, build
from support.models import prompt


def answer(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_supported_architectures_are_served(name: str) -> None:
    config, arguments, layers = SERVED[name]
    model = build(config, arguments)
    batch = prompt(60).repeat(2, 1)
    mask = torch.ones_like(batch)
    mask[1, :25] = 0
    plain = answer(model, batch, mask)
    before = model.config._attn_implementation
    with wk.compress(model, "snapkv:observe=8:kernel=3", 100) as run:
        assert torch.equal(answer(model, batch, mask), plain)
    assert run.report.kept_entries == [[60] * layers, [35] * layers]
    with wk.compress(model, "snapkv:observe=8:kernel=3", 20) as run:
        answer(model, batch, mask)
    assert run.report.kept_entries == [[20] * layers] * 2
    assert run.report.held_bytes == run.report.kept_bytes < run.report.full_bytes
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_architectures_are_refused(name: str) -> None:
    config, arguments, message = REFUSED[name]
    model = build(config, arguments)
    before = model.config._attn_implementation
    ids = prompt(60)
    with pytest.raises(wk.UnsupportedModelError, match=message), wk.compress(model, "snapkv:observe=8", 20):
        answer(model, ids, torch.ones_like(ids))
    assert model.config._attn_implementation == before
