"""Law 10 for models that cannot be served: they are refused with the package's own error, and left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

import winnowkv as wk
from support.models import PROMPT, VOCABULARY, prompt
from support.reference import generate

SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 20}


def test_encoder_decoder_models_are_refused() -> None:
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": VOCABULARY}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    before = model.config._attn_implementation
    refused(model, "encoder-decoder")
    assert model.config._attn_implementation == before


class OldAttention(nn.Module):
    """Attention as it was written before the interface; transformers recognizes it by its name."""


class OldConfig(PretrainedConfig):
    model_type = "winnow-test-old"
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 1, 8, 1, VOCABULARY


class OldModel(PreTrainedModel):
    """A model whose attention does not go through AttentionInterface."""

    config_class = OldConfig
    _supports_sdpa = True

    def __init__(self, config: OldConfig) -> None:
        super().__init__(config)
        self.attention = OldAttention()
        self.post_init()


def test_models_without_the_attention_interface_are_refused() -> None:
    model = OldModel(OldConfig())
    before = (model.config._attn_implementation, sorted(vars(model)))
    refused(model, "AttentionInterface")
    assert (model.config._attn_implementation, sorted(vars(model))) == before


def test_something_that_is_no_model_is_refused() -> None:
    refused(nn.Linear(2, 2), "not a transformers model")


def refused(model: Any, message: str) -> None:
    with pytest.raises(wk.UnsupportedModelError, match=message), wk.compress(model, **SNAP):
        pytest.fail("the block was entered")
    with pytest.raises(wk.UnsupportedModelError, match=message):
        wk.CompactCache(model, **SNAP)


def test_attention_that_bypasses_the_interface_is_refused(llama: PreTrainedModel) -> None:
    """A model that looks right, with one layer whose attention stores keys and never comes to our function."""
    inner = llama.model.layers[2].self_attn

    def bypass(hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, inner.head_dim)
        key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (inner.k_proj, inner.v_proj))
        cache = given["past_key_values"] if given.get("cache") is None else given["cache"]  # its name in newer releases
        cache.update(key, value, inner.layer_idx)
        return hidden_states, None

    inner.forward = bypass
    with pytest.raises(wk.UnsupportedModelError, match="layer 2"), wk.compress(llama, **SNAP):
        generate(llama, prompt(PROMPT), 2)
    llama.model.layers = llama.model.layers[:3]  # now it is the last layer, and no later one can notice
    with pytest.raises(wk.UnsupportedModelError, match="layer 2"), wk.compress(llama, **SNAP):
        generate(llama, prompt(PROMPT), 2)


def test_an_empty_prompt_is_refused(llama: PreTrainedModel) -> None:
    empty = torch.zeros(1, 0, dtype=torch.long)
    cache = wk.CompactCache(llama, **SNAP)
    with pytest.raises(wk.InputError, match="the prompt is empty"):
        llama(empty, past_key_values=cache)
    with wk.compress(llama, **SNAP), pytest.raises(wk.InputError, match="the prompt is empty"):
        llama(empty)
