"""How a model turns queries and keys by their position (RoPE): what a query would see from elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses import FakeTensor

UNTURNED = ("no_rope_layers", "no_rope_layer_interval")  # options of configs in which some layers know no positions
LATENT = ("qk_rope_head_dim",)  # of configs that turn the last dimensions of a head
LOCAL = ("cohere2", "exaone4", "exaone_moe", "afmoe")  # kinds of models of which only layers that slide know positions


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of the first ``2 * len(frequencies)`` dimensions of a head.

    Attributes
    ----------
    frequencies: radians a position, for each pair of dimensions.
    interleaved: pairs are neighbours, as in GLM and Cohere; else a dimension's partner is half the turned part away.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False

    def turn(
        self, states: Float[Tensor, "B H k D"], by: Float[Tensor, " k"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "B H k D"]:
        """Queries or keys that were turned for their own positions, moved ``by`` so many positions; computed in ``dtype``."""
        angle = by.to(dtype)[:, None] * _table(self.frequencies, states.device)
        cos, sin = angle.cos(), angle.sin()
        size = 2 * len(self.frequencies)
        turned, rest = states[..., :size].to(dtype), states[..., size:].to(dtype)
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, -1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1)


@lru_cache(maxsize=16)  # copied to an accelerator once and not for every layer, which would wait for it
@torch.inference_mode(False)  # or the next prompt, which may be read outside of it, could not use it
def _table(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(frequencies, device=device)


def read_rotation(model: Any) -> Rotation | None:
    """How all full-attention layers turn queries and keys by their position; None if they do not, or if it cannot be told."""
    return _rotation_of(model, "full_attention_inv_freq")


def sliding_rotation(model: Any) -> Rotation | None:
    """The same of the layers that slide."""
    return _rotation_of(model, "sliding_attention_inv_freq")


def _rotation_of(model: Any, own_frequencies: str) -> Rotation | None:
    config = model.config.get_text_config(decoder=True)
    if config.model_type in LOCAL or any(getattr(config, name, None) for name in (*UNTURNED, *LATENT)):
        return None
    for module in model.get_decoder().modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        # Models whose sliding layers turn otherwise name the frequencies by the kind of layer.
        found = getattr(module, own_frequencies, getattr(module, "inv_freq", None))
        half = _quarter_turn(sys.modules[type(module).__module__])
        if found is None or half is None or found.is_meta or isinstance(found, FakeTensor):  # no values to read
            return None
        interleaved = half(torch.arange(4.0)).tolist() == [-1, 0, -3, 2]
        return Rotation(tuple(found.float().tolist()), interleaved)
    return None


def _quarter_turn(file: Any) -> Callable[[Tensor], Tensor] | None:
    """What a model's file turns all pairs of dimensions by 90 degrees with; gpt-oss has only a turn by any angle."""
    if hasattr(file, "rotate_half"):
        half: Callable[[Tensor], Tensor] = file.rotate_half
        return half
    turn = getattr(file, "_apply_rotary_emb", None)
    return None if turn is None else lambda states: turn(states, torch.zeros(2), torch.ones(2))


LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds of RoPE whose frequencies change with the length of the prompt
LENGTH_OPTIONS = ("factor", "original_max_position_embeddings", "long_factor", "short_factor")  # and what they change by


def rotation_numbers(model: Any) -> dict[str, list[float]]:
    """All numbers that a model turns queries and keys by, by name; two models with other ones cannot read each other's keys.

    Inverse frequencies of every kind of layer, the factors that cosine and sine are scaled by, and, where the frequencies
    depend on the prompt's length, what they are made from. Tensors without values (meta, fake) are left out.
    """
    found: dict[str, list[float]] = {}
    for path, module in model.get_decoder().named_modules():
        buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if "inv_freq" in name}
        for name, buffer in buffers.items():
            # Of frequencies that change with the length, those that the model begins with.
            start = buffers.get(name.replace("inv_freq", "original_inv_freq"), buffer)
            if "original" not in name and not start.is_meta and not isinstance(start, FakeTensor):
                found[f"{path}.{name}"] = start.float().tolist()
        if buffers:
            scales = {name: value for name, value in vars(module).items() if name.endswith("attention_scaling")}
            found |= {f"{path}.{name}": [float(value)] for name, value in scales.items() if isinstance(value, int | float)}
    options = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    nested = options if all(isinstance(one, dict) for one in options.values()) else {"": options}
    for kind, each in nested.items():
        if each.get("rope_type") in LENGTH_DEPENDENT:
            for name in LENGTH_OPTIONS:
                value = each.get(name)
                if value is not None:
                    found[f"{kind}.{name}"] = [float(one) for one in (value if isinstance(value, list) else [value])]
    return found
