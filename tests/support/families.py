"""About seventy families of decoder models as tiny random configurations: the rows of docs/support.md.

A family is a config class of transformers and what makes it tiny. One that the installed release does not have has no model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from support.models import DEVICE, VOCABULARY

WINDOW = 16  # tokens of sliding windows and of chunks of attention
TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
# Three layers where all are alike: a later layer's keys already depend on what an earlier one attended to.
COMMON: dict[str, Any] = {
    **TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
NO_GROUPS = {**COMMON, "num_key_value_heads": 4}
HEADS = {**COMMON, "head_dim": 16}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 1024, "n_embd": 64, "n_layer": 3, "n_head": 4,
                       "bos_token_id": None, "eos_token_id": None}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 2
HYBRID = {**HEADS, "num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": MIXED}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EAGER = {"attn_implementation": "eager", "attn_logit_softcapping": 0.5}  # transformers 5.2 takes SDPA, without the softcap
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
          "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
          "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
SHARED = {**HEADS, "num_hidden_layers": 6, "sliding_window": WINDOW, "num_kv_shared_layers": 2,
          "layer_types": ["sliding_attention", "full_attention"] * 3, "hidden_size_per_layer_input": 8,
          "vocab_size_per_layer_input": VOCABULARY}  # fmt: skip
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 32}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip
QWEN_VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "intermediate_size": 64, "out_hidden_size": 64}
IMAGE, ROOM = VOCABULARY, {"vocab_size": VOCABULARY + 8}  # tokens of images are none that a random prompt draws
QWEN_VL = {"image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE + 2,
           "vision_end_token_id": IMAGE + 3}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """One row: the config class and what makes it tiny.

    ``kept``: layers that are compressed if the family is served, None if it has none that could be; ``composite``: a language
    model beside a vision tower.
    """

    config: str
    arguments: dict[str, Any]
    kept: int | None = 3
    composite: bool = False

    @property
    def exists(self) -> bool:
        """Whether the installed release of transformers has it."""
        return hasattr(transformers, self.config)

    def build(self) -> PreTrainedModel:
        """A seeded random model in float32, whose attention is peaked enough that a dropped entry shows."""
        config = getattr(transformers, self.config)(**copy.deepcopy(self.arguments))
        kind = AutoModelForImageTextToText if self.composite else AutoModelForCausalLM
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind.from_config(config).eval().float()
            for module in model.modules():
                if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                    inputs = module.weight.shape[-1 if isinstance(module, nn.Linear) else 0]
                    nn.init.normal_(module.weight, std=1.5 * inputs**-0.5)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight)
        head = model.get_output_embeddings()
        if head is not None:  # not tied, and logits of about 1: the laws' tolerance is absolute
            head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        model.generation_config.eos_token_id = None
        return model.to(DEVICE)


FAMILIES: dict[str, Family] = {
    "Llama": Family("LlamaConfig", COMMON),
    "Llama 4 text": Family("Llama4TextConfig", {
        **HEADS, "num_hidden_layers": 4, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW,
        "no_rope_layer_interval": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}, 2),
    "Mistral": Family("MistralConfig", {**COMMON, "sliding_window": None}),
    "Mistral, all sliding": Family("MistralConfig", {**COMMON, "sliding_window": WINDOW}, None),
    "Ministral": Family("MinistralConfig", HYBRID, 2),
    "Mixtral": Family("MixtralConfig", {**COMMON, **LOCAL_EXPERTS, "sliding_window": None}),
    "Qwen2": Family("Qwen2Config", COMMON),
    "Qwen2-MoE": Family("Qwen2MoeConfig", {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3": Family("Qwen3Config", HEADS),
    "Qwen3-MoE": Family("Qwen3MoeConfig", {**HEADS, **EXPERTS}),
    "Qwen3-Next": Family("Qwen3NextConfig", {
        **HEADS, **EXPERTS, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 32}, 2),
    "Phi": Family("PhiConfig", NO_GROUPS),
    "Phi-3": Family("Phi3Config", COMMON),
    "Phi-3.5-MoE": Family("PhimoeConfig", {**COMMON, **LOCAL_EXPERTS}),
    "Gemma": Family("GemmaConfig", HEADS),
    "Gemma 2": Family("Gemma2Config", {**HEADS, **EAGER, "num_hidden_layers": 4, "sliding_window": WINDOW}, 2),
    "Gemma 3 text": Family("Gemma3TextConfig", {**HYBRID, "query_pre_attn_scalar": 16}, 2),
    "Gemma 3n text": Family("Gemma3nTextConfig", {
        **SHARED, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6}, 2),
    "Gemma 4 text": Family("Gemma4TextConfig", {**HYBRID, **GEMMA4}, 2),
    "Gemma 4 text, shared KV": Family("Gemma4TextConfig", {**SHARED, **GEMMA4}, 2),
    "Gemma 4 text, few KV heads": Family("Gemma4TextConfig", {
        **HYBRID, **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}, 2),
    "GPT-2": Family("GPT2Config", GPT),
    "GPT-Neo": Family("GPTNeoConfig", {
        **TOKENS, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW}),
    "GPT-NeoX": Family("GPTNeoXConfig", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "GPT-J": Family("GPTJConfig", {**GPT, "rotary_dim": 8}),
    "GPT-BigCode": Family("GPTBigCodeConfig", GPT),
    "gpt-oss": Family("GptOssConfig", {**HYBRID, **LOCAL_EXPERTS}, 2),
    "OPT": Family("OPTConfig", {
        **TOKENS, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "word_embed_proj_dim": 64}),
    "BLOOM": Family("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4,
                                    "bos_token_id": None, "eos_token_id": None}),
    "Falcon": Family("FalconConfig", {**TOKENS, "hidden_size": 64, "num_hidden_layers": 3,
                                      "num_attention_heads": 4}),
    "Falcon, ALiBi": Family("FalconConfig", {**TOKENS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                                             "alibi": True}),
    "MPT": Family("MptConfig", {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 1024}),
    "StableLM": Family("StableLmConfig", COMMON),
    "StarCoder2": Family("Starcoder2Config", {**COMMON, "sliding_window": None}),
    "OLMo": Family("OlmoConfig", COMMON),
    "OLMo 2": Family("Olmo2Config", COMMON),
    "OLMo 3": Family("Olmo3Config", {k: v for k, v in HYBRID.items() if k != "head_dim"}, 2),
    "OLMoE": Family("OlmoeConfig", {**COMMON, **{k: v for k, v in EXPERTS.items() if k != "moe_intermediate_size"}}),
    "Cohere": Family("CohereConfig", {**COMMON, "logit_scale": 1.0}),
    "Cohere 2": Family("Cohere2Config", {**HYBRID, "logit_scale": 1.0}, 2),
    "Granite": Family("GraniteConfig", COMMON),
    "Granite-MoE": Family("GraniteMoeConfig", {**COMMON, **LOCAL_EXPERTS}),
    "Granite-MoE hybrid": Family("GraniteMoeHybridConfig", {
        **COMMON, **MAMBA, "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16, "shared_intermediate_size": 32}, 2),
    "GLM": Family("GlmConfig", HEADS),
    "GLM-4": Family("Glm4Config", HEADS),
    "GLM-4-MoE": Family("Glm4MoeConfig", {
        **HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1}),
    "EXAONE 4": Family("Exaone4Config", {**HYBRID, "sliding_window_pattern": 2}, 2),
    "SmolLM3": Family("SmolLM3Config", COMMON),
    "Nemotron": Family("NemotronConfig", HEADS),
    "Persimmon": Family("PersimmonConfig", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "CodeGen": Family("CodeGenConfig", {**GPT, "rotary_dim": 8, "n_ctx": 1024}),
    "DBRX": Family("DbrxConfig", {
        "vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 1024,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1}}),
    "Jamba": Family("JambaConfig", {
        **COMMON, **MAMBA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4}, 2),
    "Bamba": Family("BambaConfig", {
        **COMMON, **MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16}, 2),
    "Zamba2": Family("Zamba2Config", {
        **NO_GROUPS, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 8,
        "n_mamba_heads": 8, "mamba_ngroups": 1, "use_mamba_kernels": False, "adapter_rank": 4, "chunk_size": 16,
        "use_mem_rope": True}, 2),
    "Falcon-H1": Family("FalconH1Config", {
        **COMMON, **MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16}),
    "Falcon-Mamba": Family("FalconMambaConfig", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8,
        "bos_token_id": None, "eos_token_id": None}, None),
    "Mamba": Family("MambaConfig", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}, None),
    "RecurrentGemma": Family("RecurrentGemmaConfig", {
        **{k: v for k, v in HEADS.items() if k != "max_position_embeddings"}, "lru_width": 64, "attention_window_size": WINDOW,
        "num_hidden_layers": 3}, None),
    "DeepSeek-V2": Family("DeepseekV2Config", {**NO_GROUPS, **LATENT}),
    "DeepSeek-V3": Family("DeepseekV3Config", {**NO_GROUPS, **LATENT}),
    "MiniMax": Family("MiniMaxConfig", {
        **HEADS, **LOCAL_EXPERTS, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
        "block_size": 16}, 2),
    "MiniMax-M2": Family("MiniMaxM2Config", {**HEADS, **LOCAL_EXPERTS}),
    "DiffLlama": Family("DiffLlamaConfig", COMMON),
    "Helium": Family("HeliumConfig", HEADS),
    "ERNIE 4.5": Family("Ernie4_5Config", HEADS),
    "ERNIE 4.5-MoE": Family("Ernie4_5_MoeConfig", {
        **COMMON, "moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 2}),
    "Hunyuan": Family("HunYuanDenseV1Config", HEADS),
    "Hunyuan-MoE": Family("HunYuanMoEV1Config", {**HEADS, "num_experts": 2, "moe_topk": 1, "moe_intermediate_size": 32}),
    "Seed-OSS": Family("SeedOssConfig", {**HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "Apertus": Family("ApertusConfig", COMMON),
    "Arcee": Family("ArceeConfig", HEADS),
    "LFM2": Family("Lfm2Config", {
        **COMMON, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}, 2),
    "Doge": Family("DogeConfig", {**COMMON, "keep_window_size": 2048}),
    "BitNet": Family("BitNetConfig", COMMON),
    "BioGPT": Family("BioGptConfig", {k: v for k, v in NO_GROUPS.items() if k != "num_key_value_heads"}),
    "XGLM": Family("XGLMConfig", {
        "vocab_size": VOCABULARY, "d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4,
        "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}),
    "CTRL": Family("CTRLConfig", {
        "vocab_size": VOCABULARY, "n_positions": 1024, "n_embd": 64, "dff": 96, "n_layer": 3, "n_head": 4}),
    "dots.llm1": Family("Dots1Config", {
        **HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "nanochat": Family("NanoChatConfig", COMMON),
    "VaultGemma": Family("VaultGemmaConfig", {**HEADS, **EAGER, "num_hidden_layers": 4, "sliding_window": WINDOW}, 2),
    "Kimi Linear": Family("KimiLinearConfig", {
        **NO_GROUPS, **LATENT, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 16, "linear_num_heads": 4}, 2),
    "LLaVA": Family("LlavaConfig", {
        "image_token_index": IMAGE, "text_config": {"model_type": "llama", **COMMON, **ROOM},
        "vision_config": {"model_type": "clip_vision_model", **VISION}}, 3, composite=True),
    "PaliGemma": Family("PaliGemmaConfig", {
        "image_token_index": IMAGE, "projection_dim": 64, "text_config": {"model_type": "gemma", **HEADS, **ROOM},
        "vision_config": {"model_type": "siglip_vision_model", **VISION}}, 3, composite=True),
    "Gemma 3": Family("Gemma3Config", {
        "image_token_index": IMAGE, "mm_tokens_per_image": 4, "text_config": {**HYBRID, **ROOM, "query_pre_attn_scalar": 16},
        "vision_config": VISION}, 2, composite=True),
    "Qwen2-VL": Family("Qwen2VLConfig", {
        **QWEN_VL, "text_config": {**COMMON, **ROOM, "rope_parameters": MROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}}, 3, composite=True),
    "Qwen2.5-VL": Family("Qwen2_5_VLConfig", {
        **QWEN_VL, "text_config": {**COMMON, **ROOM, "rope_parameters": MROPE},
        "vision_config": QWEN_VISION}, 3, composite=True),
}  # fmt: skip
