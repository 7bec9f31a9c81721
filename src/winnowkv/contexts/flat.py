"""The entries of a compact cache as the first ``n'`` tokens of a prompt of another engine.

Every layer and KV head must hold the same number ``n'`` of the ``n`` tokens that were read. The engine gives the tokens that
follow the positions ``n'``, ``n' + 1``, ... . So all kept keys are rotated by one constant, ``-(n - n')``: every distance to
what follows stays what it was. Renumbering the keys to ``0 .. n' - 1`` would change them (design: scores off by 48 where their
standard deviation is 8). The earliest keys then stand at negative positions, which changes nothing.

Layers that slide over the last ``W`` tokens are not compressed. What follows sees their last ``W - 1`` tokens, which stand at
the end of the ``n'``; in front of them are zeros that no query sees. So ``n'`` must be at least ``W - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.looking import check_chosen
from winnowkv.contexts.fit import why_unmovable
from winnowkv.errors import CacheError, UnsupportedModelError
from winnowkv.models.head_group import HeadGroup
from winnowkv.models.rope import Rotation, read_rotation, sliding_rotation
from winnowkv.types import Keys, Values

EQUAL_POLICIES = "winnow:equal=true, expected:equal=true, kvzip:equal=true or snapkv"


@dataclass(frozen=True)
class FlatStates:
    """Keys and values of all layers ``[L, n', Hkv, D]`` on the CPU, keys rotated; ``seen`` is ``n``."""

    keys: Float[Tensor, "L n Hkv D"]
    values: Float[Tensor, "L n Hkv D"]
    seen: int

    @property
    def kept(self) -> int:
        """Entries of each layer and KV head."""
        return self.keys.shape[1]


def flat_states(cache: CompactCache) -> FlatStates:
    """The entries of a cache after prefill, and of what was read since.

    Raises
    ------
    CacheError
        For a cache that was not read yet or is held whole (lookahead), with several rows, quantized, with generated entries
        evicted, whose layers or heads hold different numbers of entries, or fewer than a layer slides over.
    UnsupportedModelError
        For a model whose rotation is not known or none, or depends on the prompt's length, that scales queries by their
        position, or that has layers which share keys or keep none.
    """
    model = cache.model
    HeadGroup.of(model).check_alone("exporting a context")
    rotation = context_rotation(model)
    layers = cache.compact_layers
    held = len(layers) + len(cache.sliding_layers)
    if held != (all_layers := model.config.get_text_config(decoder=True).num_hidden_layers):
        raise UnsupportedModelError(
            f"{all_layers - held} of this model's {all_layers} layers have no keys of their own: a context needs those of all"
        )
    if not layers[0].seen:
        raise CacheError("nothing was read into this cache yet: there is nothing to export")
    check_chosen(cache, "exported")
    for layer in layers:
        check_flat(layer)
    lengths = [layer.length for layer in layers]
    if len(set(lengths)) > 1:
        raise CacheError(
            f"layers hold {min(lengths)} to {max(lengths)} entries, a context needs the same number in all: use a policy that "
            f"keeps equally many, such as {EQUAL_POLICIES}"
        )
    kept, seen = lengths[0], layers[0].seen
    keys, values = [], []
    every: list[Any] = cache.layers
    for each in every:
        if isinstance(each, CompactLayer):
            turns, states = rotation, each.entries_in_use()
        else:
            turns = sliding_rotation(model) or rotation
            states = window_states(each.sliding_window, each.keys, each.values, kept, seen)
        keys.append(moved(states[0][0], turns, kept - seen))
        values.append(states[1][0].transpose(0, 1).cpu())
    shapes = {tuple(part.shape[1:]) for part in (*keys, *values)}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"keys and values of {sorted(shapes)[:2]} heads and dimensions: a context needs one size")
    return FlatStates(torch.stack(keys), torch.stack(values), seen)


def window_states(window: int, keys: Keys, values: Values, kept: int, seen: int) -> tuple[Keys, Values]:
    """Keys and values ``[1, Hkv, n', D]`` of a layer that slides over ``window`` tokens: those of its last tokens, after zeros.

    Raises CacheError if what follows would see tokens that do not fit.
    """
    visible = min(window - 1, seen)
    if kept < visible:
        raise CacheError(
            f"{kept} entries are fewer than the {visible} tokens that a sliding layer sees: a budget of {visible} or more fits"
        )
    in_front = (0, 0, kept - visible, 0)
    return pad(keys[:, :, keys.shape[2] - visible :], in_front), pad(values[:, :, values.shape[2] - visible :], in_front)


def moved(keys: Float[Tensor, "Hkv n D"], rotation: Rotation, by: int) -> Float[Tensor, "n Hkv D"]:
    """Keys turned ``by`` so many positions in float64 (float32 differs by up to 2.5e-4), token by token, on the CPU."""
    positions = torch.tensor([by], device="cpu")
    turned = rotation.turn(keys[None].cpu(), positions, torch.float64) if by else keys[None].cpu()
    return turned[0].to(keys.dtype).transpose(0, 1).contiguous()


def context_rotation(model: object) -> Rotation:
    """The model's rotation, if it is one by which keys can be moved. Raises UnsupportedModelError if not."""
    config = model.config  # type: ignore[attr-defined]
    if (why := why_unmovable(config)) is not None:
        raise UnsupportedModelError(f"{why}, so its keys cannot be moved: no context")
    rotation = read_rotation(model)
    if rotation is None:
        raise UnsupportedModelError(
            "this model does not rotate all keys by their position, or in a way that is not known here (learned positions, "
            "ALiBi, layers without positions, latent keys): its keys cannot be moved, no context"
        )
    return rotation


def check_flat(layer: CompactLayer) -> None:
    """Raise CacheError for a layer whose heads cannot be the same prefix of one prompt."""
    if len(layer.pads) != 1:
        raise CacheError(f"a context is one document, this cache holds {len(layer.pads)} rows: export each by itself")
    if layer.quantized:
        raise CacheError("a context's entries are not quantized: leave quantize out of the policy")
    if layer.dropped:
        raise CacheError(f"{layer.dropped} generated entries were evicted, head by head: export the document before any turn")
    if layer.valid is not None:
        counts = layer.valid[0, :, : layer.length].sum(-1)
        raise CacheError(
            f"heads hold {int(counts.min())} to {int(counts.max())} entries, a context needs the same number in all: use a "
            f"policy that keeps equally many, such as {EQUAL_POLICIES}"
        )
