"""Any model whose attention goes through the interface is served, on both ends of transformers; others are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import winnowkv as wk
from conftest import VOCABULARY, prompt

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROTARY = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
HYBRID = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
# Name: config class, arguments, layers that are compressed.
SERVED = {
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": None}, 4),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16}, 4),
    "phi3-fused-projection": ("Phi3Config", COMMON, 4),
    "gemma": ("GemmaConfig", {**COMMON, "head_dim": 16}, 4),
    "gemma3-hybrid": ("Gemma3TextConfig", {**COMMON, **HYBRID}, 2),
    "gpt-neox-no-gqa": ("GPTNeoXConfig", ROTARY, 4),
    "gpt2-learned-positions": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4}, 4),
    "opt": ("OPTConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 4,
                          "num_attention_heads": 4, "word_embed_proj_dim": 64}, 4),
    "mixtral-experts": ("MixtralConfig", {**COMMON, "num_local_experts": 2, "sliding_window": None}, 4),
}  # fmt: skip
REFUSED = {
    "gemma2-softcap": ("Gemma2Config", {**COMMON, "head_dim": 16, "sliding_window": 16}, "softcap"),
    "gpt-oss-learned-sinks": ("GptOssConfig", {**COMMON, **HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
    "bloom-own-attention": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
                            "AttentionInterface"),
    "mistral-all-sliding": ("MistralConfig", {**COMMON, "sliding_window": 16}, "no full-attention layer"),
    "mamba-no-attention": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2},
                           "no full-attention layer|did not put keys"),
}  # fmt: skip


def build(config: str, arguments: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments)).eval().float()


def answer(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
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
def test_refused(name: str) -> None:
    config, arguments, message = REFUSED[name]
    model = build(config, arguments)
    before = model.config._attn_implementation
    ids = prompt(60)
    with pytest.raises(wk.UnsupportedModelError, match=message), wk.compress(model, "snapkv:observe=8", 20):
        answer(model, ids, torch.ones_like(ids))
    assert model.config._attn_implementation == before
