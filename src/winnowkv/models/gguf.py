"""Read a GGUF file as a transformers folder: config, weights, tokenizer. A small table an architecture.

The tokenizers are built from the file's own vocabulary, because transformers' GGUF reader gets them wrong
(SmolLM2's it takes for CodeLlama's, older releases put a BOS token in front; Gemma's falls apart into characters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from winnowkv.errors import ModelNotFoundError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF's token types
SPACE = "\u2581"  # what SentencePiece writes for a space
GLOBAL_EVERY = 6  # Gemma 3: five layers slide, the sixth is global; the file does not say it
LOCAL_THETA = 10_000.0  # RoPE base of the layers that slide; the file has the global layers' only

Fields = Mapping[str, Any]

LLAMA_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA_NAMES = {
    **LLAMA_NAMES, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """How the GGUF files of one architecture become a transformers model."""

    model: type[PreTrainedModel]
    config: Callable[[Fields], PreTrainedConfig]
    names: Mapping[str, str]
    weight: Callable[[str, Tensor, PreTrainedConfig], Tensor]
    tokenizer: Callable[[Fields], PreTrainedTokenizerFast]

    def name(self, tensor: str) -> str:
        """A tensor's GGUF name in transformers' model."""
        fixed = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        if tensor in fixed:
            return fixed[tensor]
        if tensor == "output.weight":
            return "lm_head.weight"
        _, layer, kind, suffix = tensor.split(".")
        return f"model.layers.{layer}.{self.names[kind]}.{suffix}"


def dequantize(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file as a transformers folder. Raises ModelNotFoundError for an architecture that is not in the table."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize as to_float
    except ImportError:
        raise ModelNotFoundError("reading a GGUF file needs the package gguf: pip install 'winnowkv[demo]'") from None
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    known = ARCHITECTURES.get(kind := fields["general.architecture"])
    if known is None:
        raise ModelNotFoundError(f"{source.name}: architecture {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    config = known.config(fields)
    config.tie_word_embeddings = not any(t.name == "output.weight" for t in reader.tensors)
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(to_float(tensor.data, tensor.tensor_type).copy())
        weights[known.name(tensor.name)] = known.weight(tensor.name, values, config)
    with torch.device("meta"):
        model = known.model(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise ModelNotFoundError(f"{source.name} lacks the weights {left[:3]}")
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]  # a decorated method in transformers
    known.tokenizer(fields).save_pretrained(folder)


def llama_config(fields: Fields) -> LlamaConfig:
    """Sizes of a Llama-architecture file."""
    return LlamaConfig(
        **sizes(fields, "llama"),
        vocab_size=fields["llama.vocab_size"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
    )


def gemma_config(fields: Fields) -> Gemma3TextConfig:
    """Sizes of a Gemma 3 text model's file."""
    layers, size = fields["gemma3.block_count"], fields["gemma3.attention.key_length"]
    thetas = {"full_attention": fields["gemma3.rope.freq_base"], "sliding_attention": LOCAL_THETA}
    return Gemma3TextConfig(
        **sizes(fields, "gemma3"),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        head_dim=size,
        query_pre_attn_scalar=size,
        sliding_window=fields["gemma3.attention.sliding_window"],
        layer_types=["sliding_attention" if n % GLOBAL_EVERY else "full_attention" for n in range(1, layers + 1)],
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    )


def sizes(fields: Fields, kind: str) -> dict[str, Any]:
    """What every architecture's config has, and its special tokens."""
    return {
        "hidden_size": fields[f"{kind}.embedding_length"],
        "intermediate_size": fields[f"{kind}.feed_forward_length"],
        "num_hidden_layers": fields[f"{kind}.block_count"],
        "num_attention_heads": fields[f"{kind}.attention.head_count"],
        "num_key_value_heads": fields[f"{kind}.attention.head_count_kv"],
        "max_position_embeddings": fields[f"{kind}.context_length"],
        "rms_norm_eps": fields[f"{kind}.attention.layer_norm_rms_epsilon"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def llama_weight(name: str, values: Tensor, config: PreTrainedConfig) -> Tensor:
    """Query and key rows go back from GGUF's interleaved RoPE order to transformers' halves."""
    for part, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
        if part in name:
            return values.view(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
    return values


def gemma_weight(name: str, values: Tensor, config: PreTrainedConfig) -> Tensor:
    """The file's norms have the 1 in them that transformers adds itself; its RoPE order is transformers' own."""
    return values - 1 if name.endswith("norm.weight") else values


def byte_level_tokenizer(fields: Fields) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE from the file's vocabulary and merges; digits stand alone, no BOS is added."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control_tokens(tokens, types))
    return fast_tokenizer(tokenizer, fields)


def sentencepiece_tokenizer(fields: Fields) -> PreTrainedTokenizerFast:
    """Gemma's SentencePiece BPE from the file's pieces and scores, with byte fallback, BOS in front."""
    types = fields["tokenizer.ggml.token_type"]
    # GGUF writes runs of spaces, which are pieces that the vocabulary's makers defined, as spaces.
    tokens = [
        piece.replace(" ", SPACE) if kind == USER_DEFINED else piece
        for piece, kind in zip(fields["tokenizer.ggml.tokens"], types, strict=True)
    ]
    normal = [kind == NORMAL for kind in types]
    unknown, bos = (tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("unknown", "bos"))
    vocabulary = {piece: i for i, piece in enumerate(tokens)}
    merges = merges_of(tokens, fields["tokenizer.ggml.scores"], normal)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(control_tokens(tokens, types))
    # Found before anything is merged, the longest first, after the normalizer, as they have its spaces.
    defined = [piece for piece, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in defined])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return fast_tokenizer(tokenizer, fields)


def merges_of(tokens: list[str], scores: list[float], normal: list[bool]) -> list[tuple[str, str]]:
    """Merges that join pieces as SentencePiece does: whichever neighbours make the piece of the highest score."""
    known = {piece for piece, usual in zip(tokens, normal, strict=True) if usual}
    ranked = sorted((i for i, usual in enumerate(normal) if usual), key=lambda i: -scores[i])
    return [
        (tokens[i][:cut], tokens[i][cut:])
        for i in ranked
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in known and tokens[i][cut:] in known
    ]


def control_tokens(tokens: list[str], types: list[int]) -> list[AddedToken]:
    """Tokens that stand for themselves and never come out of a decoded text."""
    return [
        AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == CONTROL
    ]


def fast_tokenizer(tokenizer: Tokenizer, fields: Fields) -> PreTrainedTokenizerFast:
    """As a transformers tokenizer, with the file's special tokens and its chat template, if it has one."""
    tokens = fields["tokenizer.ggml.tokens"]
    named = (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template"),
        **{name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in named},
    )


ARCHITECTURES = {
    "llama": Architecture(LlamaForCausalLM, llama_config, LLAMA_NAMES, llama_weight, byte_level_tokenizer),
    "gemma3": Architecture(Gemma3ForCausalLM, gemma_config, GEMMA_NAMES, gemma_weight, sentencepiece_tokenizer),
}
