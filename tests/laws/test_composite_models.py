"""Models that see images: the language model's cache is compressed, and the vision tower is left alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.families import FAMILIES, IMAGE
from support.models import prompt
from support.reference import generate

SNAP = "snapkv:observe=8:kernel=3"
CLOSE = {"rtol": 0, "atol": 1e-4}
PATCHES = 4  # image tokens of an image of 28 pixels


def seen(name: str) -> tuple[PreTrainedModel, Tensor, dict[str, Any]]:
    """A model, a prompt of text with an image in it, and the image."""
    model = FAMILIES[name].build()
    for weights, values in model.named_parameters():
        if weights.endswith("mm_input_projection_weight"):  # zero in a new Gemma 3, which then sees nothing
            torch.nn.init.normal_(values, std=0.3, generator=torch.Generator().manual_seed(4))
    patches = 1 if name.startswith("Qwen") else PATCHES  # Qwen merges four patches into one token
    before, after = prompt(20), prompt(40, seed=1)
    ids = torch.cat([before, torch.full((1, patches), IMAGE), after], 1)
    generator = torch.Generator().manual_seed(3)
    if name.startswith("Qwen"):
        pixels = torch.randn(4, 3 * 2 * 14 * 14, generator=generator)
        image: dict[str, Any] = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]])}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # not in older releases
            image["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        image = {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    if name == "Gemma 3":
        image["token_type_ids"] = (ids == IMAGE).long()
    if name == "PaliGemma":
        image["token_type_ids"] = torch.cat([torch.zeros(1, 20 + patches), torch.ones(1, 40)], 1).long()
    return model, ids, image


# Of the last two the tokens of an image, or of PaliGemma's whole question, attend both ways.
SERVED = {"LLaVA": 3, "Qwen2-VL": 3, "Qwen2.5-VL": 3, "Gemma 3": 2, "PaliGemma": 3}


@pytest.mark.parametrize("name", SERVED)
def test_enough_budget_gives_the_uncompressed_tokens(name: str) -> None:
    model, ids, image = seen(name)
    expected = generate(model, ids, 6, **image)
    with wk.compress(model, SNAP, 200) as run:
        assert generate(model, ids, 6, **image) == expected
    assert run.report.prompt_tokens == [ids.shape[1]]


@pytest.mark.parametrize("name", SERVED)
def test_image_tokens_are_evicted_as_others_are(name: str) -> None:
    """What a compact cache computes of the prompt is what the model does, and it goes on over what was kept."""
    model, ids, image = seen(name)
    towers = {id(module.config): module.config._attn_implementation for module in vision_parts(model)}
    with torch.no_grad():
        expected = model(input_ids=ids, **image).logits[:, -1]
        other = model(input_ids=ids, **{**image, "pixel_values": -image["pixel_values"]}).logits[:, -1]
    with wk.compress(model, SNAP, 20) as run:
        inside = {id(module.config): module.config._attn_implementation for module in vision_parts(model)}
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=True, **image).logits[:, -1]
        tokens = generate(model, ids, 6, **image)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (logits - other).abs().max() > 1e-2  # the image is seen
    assert run.report.kept_entries == [[20] * SERVED[name]]
    assert len(tokens[0]) == 6
    assert inside == towers
    assert towers


def vision_parts(model: PreTrainedModel) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and "vision" in type(m.config).__name__.lower()]


@pytest.mark.parametrize("name", ["Gemma 3", "PaliGemma"])
def test_an_image_that_looks_ahead_is_refused_where_it_would_be_wrong(name: str) -> None:
    """In a padded batch, and after a prompt: eviction may have taken what its tokens would see."""
    model, ids, image = seen(name)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with wk.compress(model, SNAP, 20), pytest.raises(wk.UnsupportedModelError, match="plainly causal"):
        generate(model, ids, 2, attention_mask=mask, **image)
    cache = wk.CompactCache(model, SNAP, 20)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, **image)
        with pytest.raises(wk.UnsupportedModelError, match="plainly causal"):
            model(input_ids=ids, past_key_values=cache, **image)
