"""All that is read of a model, once: what tells its shape from another's, and how it turns keys by their position."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from winnowkv.models.rope import Rotation, read_rotation

# Named one by one: a release of transformers that adds a number to its configs must not change the hash.
HASHED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
FULL_ATTENTION, SLIDING = "full_attention", ("sliding_attention", "chunked_attention")  # as configs name kinds of layers


@dataclass(frozen=True)
class ModelInfo:
    """A model's architecture and sizes; weights are not compared, so a fine-tuned model has its base's.

    Attributes
    ----------
    architecture: class of the model.
    layers, heads, kv_heads: all layers, query heads and KV heads of each; of the whole model, however many processes share it.
    config: hash of the config's sizes.
    rotation: how queries and keys are turned by their position, None if it is not known; it is not compared.
    compressed: layers that attend to everything and have a cache of their own, None if it is not known; not compared.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    config: str
    rotation: Rotation | None = field(default=None, compare=False, repr=False)
    compressed: int | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, model: Any) -> ModelInfo:
        """Read it from a transformers model."""
        config = full_attention_config(model.config)
        sizes = {name: getattr(config, name, None) for name in HASHED}
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()
        heads = sizes["num_attention_heads"] or 0  # a model without attention is refused elsewhere, in plain words
        kv_heads = sizes["num_key_value_heads"] or heads
        layers = sizes["num_hidden_layers"] or 0
        rotation, compressed = read_rotation(model), compressed_layers(config)
        return cls(type(model).__name__, layers, heads, kv_heads, digest[:16], rotation, compressed)

    def difference(self, other: ModelInfo) -> str | None:
        """The first thing in which another model differs, in words; None if they are equal."""
        theirs = other.to_dict()
        return next(
            (f"{name} {mine}, not {theirs[name]}" for name, mine in self.to_dict().items() if mine != theirs[name]), None
        )

    def to_dict(self) -> dict[str, Any]:
        """What is compared, for JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.compare}


def full_attention_config(config: Any) -> Any:
    """The config of the language model, with the sizes of its first full-attention layer where layers differ (Gemma 4)."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    each = getattr(text, "per_layer_config", None)  # newer releases have it, also of models whose layers are alike
    return text if each is None else each[kinds.index("full_attention") if "full_attention" in kinds else 0]


def chunk_of_attention(config: Any) -> int | None:
    """Tokens of the chunks in which some layers attend (Llama 4), each token to those of its own chunk; None if none does."""
    text = config.get_text_config(decoder=True)
    return text.attention_chunk_size if "chunked_attention" in (getattr(text, "layer_types", None) or []) else None


def shares_keys_in_cache(config: Any) -> bool:
    """Whether layers get the keys that they share out of the cache object, as Gemma 3n does in older releases."""
    text = config.get_text_config(decoder=True)
    return bool(getattr(text, "num_kv_shared_layers", 0)) and not hasattr(text, "kv_sharing_modes")


def takes_no_cache(model: Any) -> bool:
    """Whether the model keeps a cache class of its own in this release of transformers, and takes no other."""
    supports = getattr(type(model), "_supports_default_dynamic_cache", None)
    return supports is not None and not supports()


def compressed_layers(config: Any) -> int | None:
    """How many layers of a text config's model have a cache that can be compressed; None for kinds that are not known here."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return None if slides else getattr(config, "num_hidden_layers", None)
    if not set(kinds) <= {FULL_ATTENTION, *SLIDING}:
        return None
    shared = getattr(config, "num_kv_shared_layers", None) or 0  # the last ones read the cache of an earlier layer
    return list(kinds)[: len(kinds) - shared].count(FULL_ATTENTION)


@cache
def _cache_name(forward: Callable[..., Any]) -> str:
    names = inspect.signature(forward).parameters
    return "cache" if "cache" in names and "past_key_values" not in names else "past_key_values"


def cache_argument(model: Any, given: Any) -> dict[str, Any]:
    """The argument by which a forward pass is given its cache: ``past_key_values``, from transformers 5.24 on ``cache``."""
    return {_cache_name(type(model).forward): given}


def position_limit(model: Any) -> int | None:
    """Most tokens that the model has positions for, None if its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def prompt_limit(model: Any, new_tokens: int, most: int | None = None) -> int | None:
    """Most prompt tokens, so that ``new_tokens`` still have positions, and at most ``most``; None if neither limits."""
    positions = position_limit(model)
    ends = [n for n in (most, positions and positions - new_tokens) if n is not None]
    return min(ends, default=None)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a generation: those of the model's generation config and the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    every = found if isinstance(found, list | tuple) else [found]
    return frozenset(int(token) for token in (*every, tokenizer.eos_token_id) if token is not None)
