"""Configurations of other architectures: those that are served, and those that are refused."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.models import VOCABULARY

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
    # Eager by name: transformers 5.2 takes SDPA for it, which leaves the softcap out.
    "gemma2-softcap": ("Gemma2Config", {**COMMON, **HYBRID, "attn_logit_softcapping": 0.5, "attn_implementation": "eager"}, 2),
    "gpt-oss-learned-sinks": ("GptOssConfig", {**COMMON, **HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1}, 2),
    "mixtral-experts": ("MixtralConfig", {**COMMON, "num_local_experts": 2, "sliding_window": None}, 4),
}  # fmt: skip
REFUSED = {
    "bloom-own-attention": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
                            "AttentionInterface"),
    "mistral-all-sliding": ("MistralConfig", {**COMMON, "sliding_window": 16}, "no full-attention layer"),
    "mamba-no-attention": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2},
                           "no full-attention layer|cache of its own"),
}  # fmt: skip


def build(config: str, arguments: dict[str, object]) -> PreTrainedModel:
    """A seeded random model in float32 of a config class of transformers."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments)).eval().float()
