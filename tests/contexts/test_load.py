"""A stored context goes on as the cache that it was made of; what is not this model's, or damaged, is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.architectures import COMMON, ROTARY, SERVED, build
from support.models import PROMPT, WINDOW, built, hybrid, prompt
from support.tokenizers import Letters
from support.vllm_engine import ANSWER, QUESTIONS, SETTINGS, fill
from winnowkv.cache.forks import fork, stored_bytes
from winnowkv.cache.reading import prefill
from winnowkv.cache.snapshot import read_one
from winnowkv.contexts.context import Context
from winnowkv.contexts.export import export_context
from winnowkv.contexts.flat import FlatStates
from winnowkv.contexts.load import load_context
from winnowkv.contexts.store import ContextStore
from winnowkv.engine.engine import Engine

POLICY = "snapkv:observe=8:kernel=3"
KEPT = 24
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", {**COMMON, "rope_scaling": LLAMA3}),
    "qwen3": SERVED["qwen3"][:2],
    "gpt-neox-partial": ("GPTNeoXConfig", ROTARY),
    "glm-interleaved-partial": ("GlmConfig", {**COMMON, "head_dim": 16}),
}


def stored(model: PreTrainedModel, store: Path, budget: int = KEPT) -> tuple[wk.CompactCache, Context]:
    """A cache after prefill, and the context that was made of it."""
    cache = wk.CompactCache(model, POLICY, budget)
    prefill(model, prompt(PROMPT), cache)
    return cache, export_context(cache, store, block=1, tokens=prompt(PROMPT)[0].tolist(), name="drawn")


@torch.no_grad()
def logits(model: PreTrainedModel, cache: wk.CompactCache, sizes: tuple[int, ...] = (1, 9, 1, 1, 5)) -> Tensor:
    """What the model says after each of some more tokens, read in several passes."""
    passes = [model(input_ids=prompt(size, seed=seed), past_key_values=cache).logits for seed, size in enumerate(sizes)]
    return torch.cat(passes, 1)


@pytest.mark.parametrize("budget", [KEPT, PROMPT], ids=["compressed", "whole"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_context_goes_on_as_the_cache_that_it_was_made_of(name: str, budget: int, tmp_path: Path) -> None:
    """The law: the same logits but for the rounding of one rotation; the position is the only thing that differs."""
    model = build(*MODELS[name])
    model.get_decoder().apply(lambda part: part.weight.data.mul_(4) if isinstance(part, torch.nn.Linear) else None)
    cache, context = stored(model, tmp_path, budget)
    loaded = load_context(ContextStore(tmp_path), context.id, model)
    assert loaded.get_seq_length() == budget
    torch.testing.assert_close(logits(model, loaded), logits(model, cache), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [WINDOW - 1, WINDOW, KEPT])
def test_layers_that_slide_go_on_from_their_last_tokens(budget: int, tmp_path: Path) -> None:
    model = hybrid()
    cache, context = stored(model, tmp_path, budget)
    loaded = load_context(ContextStore(tmp_path), context, model)
    assert {layer.keys.shape[2] for layer in loaded.sliding_layers} == {WINDOW - 1}
    sizes = (1, WINDOW + 9, 1, 1, 5)
    torch.testing.assert_close(logits(model, loaded, sizes), logits(model, cache, sizes), atol=1e-4, rtol=1e-4)


def test_forks_of_a_loaded_context_leave_it_as_it_was(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, context = stored(llama, tmp_path)
    loaded = load_context(ContextStore(tmp_path), context, llama)
    expected = logits(llama, cache)
    for _ in range(2):
        torch.testing.assert_close(logits(llama, fork(loaded)), expected, atol=1e-5, rtol=1e-5)
    assert loaded.get_seq_length() == KEPT
    assert loaded.held_bytes == stored_bytes([loaded, fork(loaded)]) == loaded.report.kept_bytes


@pytest.mark.parametrize("family", ["llama", "hybrid"])
def test_an_engine_goes_on_from_it_beside_others(family: str, tmp_path: Path) -> None:
    """In rows of the slots, on one context and on none: the same tokens as alone."""
    model = hybrid() if family == "hybrid" else copy.deepcopy(built("llama"))
    cache, context = stored(model, tmp_path)
    loaded = load_context(ContextStore(tmp_path), context, model)
    engine = Engine(model, Letters(), POLICY, KEPT)
    sampling = wk.Sampling(max_new_tokens=2 * WINDOW)
    asked = [prompt(size, seed=size)[0].tolist() for size in (1, 7, WINDOW + 3)]
    requests = [engine.submit(ids, sampling, after=loaded) for ids in asked]
    other = engine.submit(prompt(40)[0].tolist(), sampling)
    while other.completion is None or any(one.completion is None for one in requests):
        engine.step()
    for ids, request in zip(asked, requests, strict=True):
        alone, expected = fork(cache), list[int]()
        with torch.no_grad():
            while len(expected) < 2 * WINDOW:
                new = [*ids, *expected][alone.get_seq_length() - PROMPT :]
                expected.append(int(model(input_ids=torch.tensor([new]), past_key_values=alone).logits[0, -1].argmax()))
        assert request.tokens == expected


def test_the_report_is_that_of_the_document(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, context = stored(llama, tmp_path)
    report = load_context(ContextStore(tmp_path), context, llama).report
    for name in ("prompt_tokens", "kept_entries", "kept_bytes", "full_bytes", "policy"):
        assert getattr(report, name) == getattr(cache.report, name)


def test_a_context_takes_the_dtype_of_the_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    _, context = stored(llama, tmp_path)
    loaded = load_context(ContextStore(tmp_path), context, llama.bfloat16())
    assert {part.dtype for layer in loaded.compact_layers for part in (layer.keys, layer.values)} == {torch.bfloat16}
    assert logits(llama, loaded).isfinite().all()


def test_nothing_is_read_if_a_cache_shows_what_the_layers_hold(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, context = stored(llama, tmp_path)
    like, passes = read_one(llama), []
    llama.register_forward_pre_hook(lambda *_: passes.append(1))
    loaded = load_context(ContextStore(tmp_path), context, llama, like=like)
    assert not passes
    torch.testing.assert_close(logits(llama, loaded), logits(llama, cache), atol=1e-5, rtol=1e-5)


def test_a_context_of_another_model_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    _, context = stored(llama, tmp_path)
    other = copy.deepcopy(llama)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 500000.0}
    with pytest.raises(wk.CacheError, match=r"is of another model: its model's rope.rope_theta is 10000.0, here 500000.0"):
        load_context(ContextStore(tmp_path), context.id, other)


def test_a_context_that_says_it_fits_and_does_not_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Whoever can write files can give them a digest: shapes are compared with the model's."""
    _, context = stored(llama, tmp_path)
    store = ContextStore(tmp_path)
    states = store.states(context.id)
    for what, keys in ("4 layers", states.keys[:4]), ("1 heads", states.keys[:, :, :1]), ("heads of 4", states.keys[..., :4]):
        layers, _, heads, size = keys.shape
        header = context.header.model_copy(update={"layers": layers, "kv_heads": heads, "head_dim": size})
        forged = store.add(header, FlatStates(keys.contiguous(), keys.clone(), PROMPT), context.tokens)
        with pytest.raises(wk.CacheError, match=what):
            load_context(store, forged, llama)


def test_a_context_shorter_than_a_sliding_window_is_refused(tmp_path: Path) -> None:
    model = hybrid()
    _, context = stored(model, tmp_path)
    store = ContextStore(tmp_path)
    states = store.states(context.id)
    short = FlatStates(states.keys[:, :9].contiguous(), states.values[:, :9].contiguous(), PROMPT)
    forged = store.add(context.header.model_copy(update={"kept": 9}), short, context.tokens)
    with pytest.raises(wk.CacheError, match=f"slides over {WINDOW - 1} tokens, the context keeps 9 entries"):
        load_context(store, forged, model)


def test_a_changed_byte_is_noticed(llama: PreTrainedModel, tmp_path: Path) -> None:
    _, context = stored(llama, tmp_path)
    (file,) = tmp_path.glob("*.context")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(wk.CacheError, match="its content is not what its name says"):
        load_context(ContextStore(tmp_path), context.id, llama)


@pytest.mark.slow
def test_the_embedded_model_answers_as_vllm_is_asked_to(tmp_path: Path) -> None:
    """A context, questions and tokens with which tests/in_vllm compare vLLM."""
    model, tokenizer = wk.load("embedded", dtype=torch.float32)
    store = ContextStore(tmp_path)
    settings = [one for one in SETTINGS if one[0] == "snapkv-250"]
    (one,) = fill(store, torch.float32, settings).values()
    loaded = load_context(store, one.context, model)
    for question, expected in zip(QUESTIONS, one.answers, strict=True):
        cache = fork(loaded)
        ids = one.context.ask(tokenizer, question).ids[one.context.kept :]
        with torch.no_grad():
            for _ in range(ANSWER):
                new = ids[cache.get_seq_length() - one.context.kept :]
                output = model(input_ids=torch.tensor([new]), past_key_values=cache)
                ids.append(int(output.logits[0, -1].argmax()))
        assert ids[-ANSWER:] == expected
