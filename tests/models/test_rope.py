"""A rotation moves queries and keys as the model would have turned them at other positions; None if it is unknown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.architectures import COMMON, HYBRID, SERVED, build
from support.families import FAMILIES
from support.models import hybrid, prompt
from winnowkv.memory.shape import read_shape
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import Rotation, read_rotation

TOKENS, AWAY = 20, 7
SCALED = {"factor": 4.0, "original_max_position_embeddings": 64}
LOCAL = {**HYBRID, "layer_types": ["full_attention", "sliding_attention"] * 2}  # the first layer attends to everything
UNTURNED = ["gpt2-learned-positions", "opt"]
TURNED = {
    "llama": ("LlamaConfig", COMMON),
    "llama-yarn": ("LlamaConfig", {**COMMON, "rope_scaling": {"rope_type": "yarn", **SCALED}}),
    "llama3-frequencies": (
        "LlamaConfig",
        {**COMMON, "rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}},
    ),
    "qwen2": ("Qwen2Config", COMMON),
    **{name: (config, arguments) for name, (config, arguments, _) in SERVED.items() if name not in UNTURNED},
    "gemma3-first-layer-full": ("Gemma3TextConfig", {**COMMON, **LOCAL}),
    "phi-partial": ("PhiConfig", COMMON),
    "glm-interleaved-partial": ("GlmConfig", {**COMMON, "head_dim": 16}),
    "cohere-interleaved": ("CohereConfig", COMMON),
}
if FAMILIES["Gemma 4 text"].exists:  # of a full-attention head it turns a quarter, by frequencies of the whole one
    TURNED["gemma4-proportional"] = ("Gemma4TextConfig", FAMILIES["Gemma 4 text"].arguments)
PARTIAL = ["gpt-neox-no-gqa", "phi-partial", "glm-interleaved-partial"]
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "first_k_dense_replace": 4, "num_key_value_heads": 4,
}  # fmt: skip
# Full-attention layers that know no positions, or heads of which another part is turned.
UNKNOWN = {
    **{name: SERVED[name][:2] for name in UNTURNED},
    "smollm3-some-layers": ("SmolLM3Config", COMMON),
    "cohere2-sliding-layers-only": ("Cohere2Config", {**COMMON, **LOCAL}),
    "exaone4-sliding-layers-only": ("Exaone4Config", {**COMMON, **LOCAL}),
    "afmoe-sliding-layers-only": ("AfmoeConfig", {**COMMON, **LOCAL, "num_experts": 2, "num_experts_per_tok": 1}),
    "deepseek-last-dimensions": ("DeepseekV3Config", {**COMMON, **LATENT}),
}


class Watched(wk.CompactCache):
    """Notes queries and keys of the first compressed layer as our attention function sees them."""

    seen: tuple[Tensor, Tensor] | None = None

    def observe(self, layer_idx: int, queries: Tensor, scale: float) -> None:
        if self.seen is None:
            self.seen = queries.clone(), self.layers[layer_idx].keys.clone()
        super().observe(layer_idx, queries, scale)


@torch.no_grad()
def states(model: PreTrainedModel, begin: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of a prompt whose first token stands at ``begin``."""
    cache = Watched(model, "full", 1)
    model(input_ids=prompt(TOKENS), position_ids=begin + torch.arange(TOKENS)[None], past_key_values=cache, use_cache=True)
    assert cache.seen is not None
    return cache.seen


@pytest.mark.parametrize("name", TURNED)
def test_moved_states_equal_those_of_the_model_at_the_new_positions(name: str) -> None:
    """The first layer's input knows no position, so all that differs between two places is the rotation."""
    model: Any = build(*TURNED[name])
    if name == "gemma3-hybrid":  # its first full-attention layer has read what sliding ones wrote: take them away
        for layer in model.model.layers[:1]:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.data.zero_()
    rotation = read_rotation(model)
    assert rotation is not None
    assert rotation.interleaved == ("interleaved" in name)
    at, later = states(model, 3), states(model, 3 + AWAY)
    assert (2 * len(rotation.frequencies) < at[0].shape[-1]) == (name in PARTIAL)
    for before, after in zip(at, later, strict=True):
        assert not torch.allclose(before, after, atol=1e-3), "the model turned nothing: the test shows nothing"
        torch.testing.assert_close(rotation.turn(before, torch.full((TOKENS,), AWAY)), after, atol=1e-5, rtol=1e-5)


def test_a_full_layer_among_sliding_ones_is_moved_with_its_own_frequencies() -> None:
    """Gemma 3 turns sliding layers by others."""
    model: Any = hybrid()
    rotation = read_rotation(model)
    assert rotation is not None
    inverse = model.model.rotary_emb.sliding_attention_inv_freq
    assert not torch.allclose(torch.tensor(rotation.frequencies), inverse)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_rotations_are_none(name: str) -> None:
    assert read_rotation(build(*UNKNOWN[name])) is None


def test_a_model_without_weights_has_no_rotation() -> None:
    """Plans read shapes from models on no device: no number can be read there, and none is needed."""
    model = build("LlamaConfig", COMMON)
    assert len(read_shape(model.config, 4).compressed) == COMMON["num_hidden_layers"]
    assert read_rotation(model.to("meta")) is None


def test_the_rotation_is_not_compared() -> None:
    """A calibration profile holds the model without it."""
    with_rotation = ModelInfo.of(build("LlamaConfig", COMMON))
    without = replace(with_rotation, rotation=None)
    assert with_rotation.rotation is not None
    assert without.rotation is None
    assert (with_rotation, hash(with_rotation)) == (without, hash(without))
    assert with_rotation.difference(without) is None
    assert with_rotation.to_dict() == without.to_dict()
    assert "rotation" not in with_rotation.to_dict()


rotations = st.builds(Rotation, st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple), st.booleans())
moves = st.lists(st.integers(-200, 200), min_size=3, max_size=3).map(torch.tensor)


def drawn(seed: int) -> Tensor:
    return torch.randn(1, 2, 3, 10, generator=torch.Generator().manual_seed(seed))


@given(rotations, st.integers(0, 99))
def test_turning_by_zero_positions_changes_nothing(rotation: Rotation, seed: int) -> None:
    assert torch.equal(rotation.turn(drawn(seed), torch.zeros(3)), drawn(seed))


@given(rotations, moves, moves, st.integers(0, 99))
def test_turns_add_up(rotation: Rotation, first: Tensor, second: Tensor, seed: int) -> None:
    once = rotation.turn(drawn(seed), first + second)
    torch.testing.assert_close(rotation.turn(rotation.turn(drawn(seed), first), second), once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(once.norm(dim=-1), drawn(seed).norm(dim=-1))


@given(rotations, moves, st.integers(0, 99))
def test_each_pair_turns_in_its_own_plane(rotation: Rotation, by: Tensor, seed: int) -> None:
    """As complex numbers: one pair after the other; the dimensions after the pairs stay."""
    states, pairs = drawn(seed), len(rotation.frequencies)
    turned = rotation.turn(states, by)
    for pair, frequency in enumerate(rotation.frequencies):
        real, imaginary = (2 * pair, 2 * pair + 1) if rotation.interleaved else (pair, pair + pairs)
        before = torch.complex(states[..., real], states[..., imaginary])
        after = before * torch.polar(torch.ones(3), by.float() * frequency)
        torch.testing.assert_close(turned[..., real], after.real, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(turned[..., imaginary], after.imag, atol=1e-4, rtol=1e-4)
    assert torch.equal(turned[..., 2 * pairs :], states[..., 2 * pairs :])


def test_half_precision_is_turned_in_float32() -> None:
    moved = Rotation((0.5,)).turn(drawn(0).bfloat16(), torch.tensor([1.0, 2.0, 3.0]))
    assert moved.dtype == torch.float32
