"""Moved entries give a plain model with a plain cache what our own cache gives; what cannot be moved is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import winnowkv as wk
from support.architectures import COMMON, REFUSED, ROTARY, SERVED, build
from support.models import PROMPT, WINDOW, built, hybrid, prompt
from support.tokenizers import ChatLetters
from winnowkv.cache.reading import prefill
from winnowkv.contexts.export import export_context
from winnowkv.contexts.flat import flat_states, moved
from winnowkv.models.rope import Rotation, read_rotation

SCALED = {"factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
    "yarn": {"rope_type": "yarn", **SCALED},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama-{kind}": ("LlamaConfig", {**COMMON, "rope_scaling": options}) for kind, options in KINDS.items()},
    "qwen3": SERVED["qwen3"][:2],
    "phi-partial": ("PhiConfig", COMMON),
    "gpt-neox-partial": ("GPTNeoXConfig", ROTARY),
    "glm-interleaved-partial": ("GlmConfig", {**COMMON, "head_dim": 16}),
    "cohere-interleaved": ("CohereConfig", COMMON),
}
MORE = 12  # tokens after the prompt
SEEN, KEPT = 8064, 968


def turned(states: Tensor, positions: Tensor, frequencies: Tensor, *, interleaved: bool) -> Tensor:
    """``[k, D]`` states that were turned for position 0, at other positions: pairs as complex numbers, in float64."""
    size = 2 * len(frequencies)
    first, second = (
        (states[:, 0:size:2], states[:, 1:size:2]) if interleaved else (states[:, : size // 2], states[:, size // 2 : size])
    )
    pairs = torch.complex(first, second) * torch.polar(torch.ones(()).double(), positions.double()[:, None] * frequencies)
    parts = torch.stack([pairs.real, pairs.imag], -1).flatten(1) if interleaved else torch.cat([pairs.real, pairs.imag], 1)
    return torch.cat([parts, states[:, size:]], 1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_moved_keys_equal_the_original_ones(kind: str, partial: bool, interleaved: bool) -> None:
    """A query at ``n + i`` over kept keys at their own positions, and at ``n' + i`` over moved ones: float64, 8,064 -> 968."""
    rotation = read_rotation(build("LlamaConfig", {**COMMON, "head_dim": 64, "rope_scaling": KINDS[kind]}))
    assert rotation is not None
    rotation = Rotation(rotation.frequencies, interleaved)
    frequencies = torch.tensor(rotation.frequencies).double()
    generator = torch.Generator().manual_seed(5)
    size = 80 if partial else 64
    keys, queries = (torch.randn(k, size, generator=generator, dtype=torch.float64) for k in (KEPT, 9))
    positions = torch.randperm(SEEN, generator=generator)[:KEPT].sort().values
    own = turned(keys, positions, frequencies, interleaved=interleaved)
    after = torch.arange(len(queries))
    scores = turned(queries, SEEN + after, frequencies, interleaved=interleaved) @ own.T
    shifted = turned(queries, KEPT + after, frequencies, interleaved=interleaved)
    flat = moved(own[None], rotation, KEPT - SEEN)[:, 0]
    torch.testing.assert_close(shifted @ flat.T, scores, atol=1e-8, rtol=0)
    renumbered = turned(keys, torch.arange(KEPT), frequencies, interleaved=interleaved)
    assert (shifted @ renumbered.T - scores).abs().max() > 1, "renumbering does as well: the test shows nothing"


def plain_logits(model: PreTrainedModel, cache: wk.CompactCache, more: Tensor, shift: int = 0) -> Tensor:
    """Logits of a plain model that goes on from the exported entries in transformers' own cache, at positions ``n'``, ... ."""
    states = flat_states(cache)
    entries = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(states.keys, states.values, strict=True)):
        entries.update(keys.transpose(0, 1)[None].clone(), values.transpose(0, 1)[None].clone(), layer)
    positions = states.kept + shift + torch.arange(more.shape[1])[None]
    with torch.no_grad():
        return model(input_ids=more, past_key_values=entries, position_ids=positions).logits


@pytest.mark.parametrize("policy", ["snapkv:observe=8:kernel=3", "streaming", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_cache_of_the_entries_gives_the_logits_of_ours(name: str, policy: str) -> None:
    """The main law: one engine's first ``n'`` tokens are the other's kept entries."""
    model = build(*MODELS[name])
    model.get_decoder().apply(lambda part: part.weight.data.mul_(4) if isinstance(part, torch.nn.Linear) else None)
    cache = wk.CompactCache(model, policy, 24)
    prefill(model, prompt(PROMPT), cache)
    more = prompt(MORE, seed=7)
    found = plain_logits(model, cache, more)
    elsewhere = plain_logits(model, cache, more, shift=PROMPT - 24)
    with torch.no_grad():
        expected = model(input_ids=more, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (elsewhere - expected).abs().max() > 1e-3, "positions change nothing here: the test shows nothing"


@pytest.mark.parametrize("budget", [WINDOW - 1, WINDOW, 24])
def test_layers_that_slide_give_their_last_tokens(budget: int) -> None:
    """Gemma 3: each kind of layer turns by its own frequencies; what follows is longer than the window."""
    model = hybrid()
    cache = read(model, "snapkv:observe=8:kernel=3", budget)
    more = prompt(WINDOW + 9, seed=7)
    found = plain_logits(model, cache, more)
    with torch.no_grad():
        expected = model(input_ids=more, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_turns_that_were_read_since_are_exported_with_the_rest(family: str) -> None:
    model = copy.deepcopy(built(family))
    cache = wk.CompactCache(model, "snapkv:observe=8:kernel=3", 24)
    prefill(model, prompt(PROMPT), cache)
    with torch.no_grad():
        model(input_ids=prompt(9, seed=2), past_key_values=cache)
    assert (flat_states(cache).kept, flat_states(cache).seen) == (24 + 9, PROMPT + 9)
    more = prompt(MORE, seed=7)
    found = plain_logits(model, cache, more)
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=more, past_key_values=cache).logits, atol=1e-4, rtol=1e-4)


def test_a_document_with_turns_asks_in_a_turn_of_its_own(llama: PreTrainedModel, tmp_path: Any) -> None:
    """The last token of an answer, which waits for the next turn, belongs to the context, and a question ends that answer."""
    tokenizer = ChatLetters()
    doc = wk.read(llama, tokenizer, "a text of some words " * 4, "snapkv:observe=8:kernel=3", 24, chat=True)
    doc.chat("what of it?", 5)
    context = export_context(doc, tmp_path, block=1)
    assert context.header.turns
    assert context.seen == len(doc.ids) == doc.cache.compact_layers[0].seen
    asked = context.ask(tokenizer, "and then?").ids[context.kept :]
    before = len(doc.ids)
    doc.chat("and then?", 1)
    assert asked == doc.ids[before : before + len(asked)]


def read(
    model: PreTrainedModel, policy: str = "snapkv:observe=8:kernel=3", budget: int = 24, **options: Any
) -> wk.CompactCache:
    cache = wk.CompactCache(model, policy, budget, **options)
    prefill(model, prompt(PROMPT), cache)
    return cache


def test_a_cache_that_was_not_read_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="nothing was read into this cache yet"):
        flat_states(wk.CompactCache(llama, "snapkv", 24))


def test_several_rows_are_refused(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=8:kernel=3", 24)
    prefill(llama, prompt(PROMPT).repeat(2, 1), cache)
    with pytest.raises(wk.CacheError, match="this cache holds 2 rows: export each by itself"):
        flat_states(cache)


def test_quantized_entries_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="entries are not quantized: leave quantize out"):
        flat_states(read(llama, "snapkv:observe=8:kernel=3:quantize=int8"))


def test_heads_with_different_numbers_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match=r"heads hold \d+ to \d+ entries, .* the same number in all: use a policy"):
        flat_states(read(llama, "adakv:of=snapkv:observe=8"))


def test_layers_with_different_numbers_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match=r"layers hold \d+ to \d+ entries, .* the same number in all: use a policy"):
        flat_states(read(llama, "pyramidkv:observe=8"))


def test_generated_entries_that_were_evicted_are_refused(llama: PreTrainedModel) -> None:
    cache = read(llama, decode_budget=64)
    with torch.no_grad():
        for step in range(4):
            llama(input_ids=prompt(60, seed=step), past_key_values=cache)
    with pytest.raises(wk.CacheError, match=r"\d+ generated entries were evicted, head by head: export the document before"):
        flat_states(cache)


def test_a_cache_that_has_not_chosen_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="exported"):
        flat_states(read(llama, "snapkv:observe=8:kernel=3:lookahead=4"))


def test_entries_that_do_not_cover_a_sliding_window_are_refused() -> None:
    with pytest.raises(wk.CacheError, match=f"12 entries are fewer than the {WINDOW - 1} tokens that a sliding layer sees"):
        flat_states(read(hybrid(), budget=12))


LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "first_k_dense_replace": 4, "num_key_value_heads": 4,
}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **SCALED}
UNMOVED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2-learned-positions": (*SERVED["gpt2-learned-positions"][:2], "learned positions"),
    "opt-learned-positions": (*SERVED["opt"][:2], "learned positions"),
    "dynamic": (
        "LlamaConfig",
        {**COMMON, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        r"\(dynamic\) changes with",
    ),
    "longrope": ("Phi3Config", {**COMMON, "rope_scaling": LONG}, r"\(longrope\) changes with"),
    "deepseek-latent-keys": ("DeepseekV3Config", {**COMMON, **LATENT}, "latent"),
    "smollm3-layers-without-positions": ("SmolLM3Config", COMMON, "layers without positions"),
}


@pytest.mark.parametrize("name", UNMOVED)
def test_models_whose_keys_cannot_be_moved_are_refused(name: str) -> None:
    config, arguments, why = UNMOVED[name]
    with pytest.raises(wk.UnsupportedModelError, match=why):
        flat_states(read(build(config, arguments), "streaming"))


def test_alibi_is_refused_before_there_is_a_cache() -> None:
    """No cache of ours serves attention that BLOOM computes by itself; the rotation says the same."""
    model = build(*REFUSED["bloom-own-attention"][:2])
    assert read_rotation(model) is None
    with pytest.raises(wk.UnsupportedModelError):
        read(model, "streaming")


@pytest.mark.parametrize("option", ["attn_temperature_tuning", "llama_4_scaling_beta"])
def test_queries_that_are_scaled_by_their_position_are_refused(llama: PreTrainedModel, option: str) -> None:
    """Llama 4 tunes the temperature, Ministral 3 has it among the options of its RoPE."""
    cache = read(llama)
    if option == "attn_temperature_tuning":
        llama.config.attn_temperature_tuning = True
    else:
        llama.config.rope_parameters = {**llama.config.rope_parameters, option: 0.1}
    with pytest.raises(wk.UnsupportedModelError, match="scales queries by their position"):
        flat_states(cache)


def test_a_cache_needs_its_tokens(llama: PreTrainedModel, tmp_path: Any) -> None:
    cache = read(llama)
    with pytest.raises(wk.InputError, match=r"does not know its token ids: .* tokens="):
        export_context(cache, tmp_path)
    ids = prompt(PROMPT)[0].tolist()
    with pytest.raises(wk.InputError, match=f"holds {PROMPT - 1} token ids, the cache has seen {PROMPT}"):
        export_context(cache, tmp_path, tokens=ids[:-1])
    assert export_context(cache, tmp_path, block=8, tokens=ids).kept == 24
    assert not list(tmp_path.glob("*.part"))
