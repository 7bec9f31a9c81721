"""Tiny seeded models, and random prompts for them."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

DEVICE = os.environ.get("WINNOW_TEST_DEVICE", "cpu")  # of tiny models and prompts: cuda runs the laws on a GPU
VOCABULARY = 128
PROMPT = 72  # tokens of a usual test prompt
WINDOW = 16  # tokens of the sliding windows of hybrid()
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Larger than usual: attention must be peaked, or dropping an entry would change nothing that a test can see.
    "initializer_range": 0.15,
    # No stop token: every generation has the length that was asked for.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}


def tiny_model(family: str) -> PreTrainedModel:
    """A seeded float32 model: ``llama`` with 5 layers or ``qwen2`` with 7 and biases that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=5, **TINY)).eval()
        else:
            model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=7, **TINY)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    # Logits of about 1 and not 5: float32 noise is relative (the framework's own cache is 1.2e-5 off at 5),
    # and the laws say 1e-5.
    model.lm_head.weight.data *= 0.25
    return model.to(DEVICE)


def prompt(tokens: int, seed: int = 0) -> Tensor:
    """A random prompt ``[1, tokens]`` that depends on its seed only."""
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1000 + seed)).to(DEVICE)


@functools.cache
def built(family: str) -> PreTrainedModel:
    """The tiny model of a family, made once; tests take copies."""
    return tiny_model(family)


def hybrid(vocabulary: int = TINY["vocab_size"]) -> PreTrainedModel:
    """A small Gemma 3 of which layers 2 and 5 attend to everything."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 4, "sliding_window": WINDOW, "layer_types": kinds}
    with torch.random.fork_rng():
        torch.manual_seed(20)
        config = Gemma3TextConfig(**{**TINY, **sizes, "vocab_size": vocabulary, "max_position_embeddings": 2048})
        # Tied embeddings would make a random model repeat its last token for ever.
        config.tie_word_embeddings = False
        return Gemma3ForCausalLM(config).eval().to(DEVICE)
