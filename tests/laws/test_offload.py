"""A model whose layers accelerate keeps on a disk between forward passes keeps and says what it does in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, built, prompt
from support.reference import positions, same_positions
from support.tokenizers import ChatLetters, word_tokenizer
from winnowkv.cache.reading import greedy, prefill
from winnowkv.models.devices import input_device, layer_devices


@pytest.fixture(params=["first", "last"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """The first two layers and the embeddings on a disk, or the others: their parameters are on ``meta`` until they work."""
    places = ("disk", "cpu") if request.param == "first" else ("cpu", "disk")
    parts = {"model.embed_tokens": places[0], "model.rotary_emb": "cpu", "model.norm": places[1], "lm_head": places[1]}
    parts |= {f"model.layers.{layer}": places[layer >= 2] for layer in range(5)}
    built("llama").save_pretrained(tmp_path / "model")
    options = {"device_map": parts, "offload_folder": tmp_path / "offloaded", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
    assert model.model.layers[0 if request.param == "first" else 4].self_attn.o_proj.weight.is_meta
    return model


# Projections are read of a layer while its weights are away; winnow and dynamickv compare layers.
@pytest.mark.parametrize("spec", ["defensivekv:observe=4", "winnow:observe=4:samples=16:least=4", "dynamickv:observe=4"])
def test_an_offloaded_model_keeps_and_says_the_same(offloaded: PreTrainedModel, spec: str, tmp_path: Path) -> None:
    caches, tokens = [], []
    for model in (built("llama"), offloaded):
        caches.append(wk.CompactCache(model, spec, 20))
        logits = prefill(model, prompt(PROMPT), caches[-1])
        wk.save_cache(caches[-1], model, tmp_path / "saved", overwrite=True)
        tokens.append(list(greedy(model, caches[-1], logits, 5)))
    assert same_positions(*map(positions, caches))
    assert tokens[0] == tokens[1]
    assert list(greedy(offloaded, wk.load_cache(tmp_path / "saved", offloaded), logits, 5)) == tokens[0]


def test_an_engine_serves_an_offloaded_model(offloaded: PreTrainedModel) -> None:
    prompts, sampling = [prompt(40, seed)[0].tolist() for seed in range(3)], wk.Sampling(max_new_tokens=5)
    answers = [
        [done.tokens for done in wk.Engine(model, word_tokenizer(), "snapkv:observe=4", 20).generate(prompts, sampling)]
        for model in (built("llama"), offloaded)
    ]
    assert answers[0] == answers[1]


def test_where_parts_work_is_known_while_their_weights_are_away(offloaded: PreTrainedModel) -> None:
    assert input_device(offloaded).type == "cpu"
    assert {device.type for device in layer_devices(offloaded, range(5))} == {"cpu"}


def test_a_document_is_read_and_asked_with_an_offloaded_model(offloaded: PreTrainedModel) -> None:
    text = "The archive was founded in 1712. Its first keeper was Mary Lund."
    answers = [
        wk.read(model, ChatLetters(), text, "snapkv:observe=4", 20).ask("Who?", max_new_tokens=5).tokens
        for model in (built("llama"), offloaded)
    ]
    assert answers[0] == answers[1]
