"""Law 11: what cannot be honoured is refused or warned of by name, at the call."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import winnowkv as wk
from support.batch import padded
from support.cases import Case
from support.models import PROMPT, hybrid, prompt
from support.reference import generate

SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 20}

# Calls that would not be compressed


@pytest.mark.parametrize("name", ["static", "quantized", "offloaded", "offloaded_static"])
def test_another_cache_implementation_is_refused(llama: PreTrainedModel, name: str) -> None:
    plain = generate(llama, prompt(PROMPT), 4)
    with wk.compress(llama, **SNAP) as run, pytest.raises((wk.InputError, ImportError), match=f"{name}|quanto"):
        generate(llama, prompt(PROMPT), 4, cache_implementation=name)
    assert run.reports == []
    assert generate(llama, prompt(PROMPT), 4) == plain


def test_generating_without_a_cache_is_refused(llama: PreTrainedModel) -> None:
    with wk.compress(llama, **SNAP) as run, pytest.raises(wk.InputError, match="use_cache=False"):
        generate(llama, prompt(PROMPT), 4, use_cache=False)
    assert run.reports == []


def test_a_forward_without_a_cache_is_warned_of_once(llama: PreTrainedModel) -> None:
    with wk.compress(llama, **SNAP) as run, torch.no_grad():
        with pytest.warns(UserWarning, match="use_cache is False"):
            llama(prompt(PROMPT), use_cache=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llama(prompt(PROMPT), use_cache=False)
    assert run.reports == []


def test_a_prompt_in_somebody_elses_cache_is_warned_of(llama: PreTrainedModel) -> None:
    with wk.compress(llama, **SNAP), torch.no_grad(), pytest.warns(UserWarning, match="StaticCache was passed"):
        llama(prompt(PROMPT), past_key_values=StaticCache(config=llama.config, max_cache_len=100))


def test_a_conversation_in_ones_own_cache_goes_on_without_a_warning(llama: PreTrainedModel) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # newer releases have another name for past_key_values
        llama(prompt(PROMPT), past_key_values=cache)
        with wk.compress(llama, **SNAP) as run:
            llama(prompt(3), past_key_values=cache)
    assert run.reports == []


@pytest.mark.parametrize("own", [True, False])
def test_chunks_of_transformers_are_refused(llama: PreTrainedModel, own: bool) -> None:
    options = {"past_key_values": wk.CompactCache(llama, **SNAP)} if own else {}
    block = nullcontext() if own else wk.compress(llama, **SNAP)
    with block, pytest.raises(wk.InputError, match=r"prefill_chunk_size=16 .*chunk=16"):
        generate(llama, prompt(PROMPT), 4, prefill_chunk_size=16, **options)


# Masks


def test_a_mask_that_hides_what_was_read_is_refused(model: PreTrainedModel, case: Case) -> None:
    cache, mask = wk.CompactCache(model, **case.settings), torch.ones(1, PROMPT + 3, dtype=torch.long)
    more = prompt(3, seed=2)
    with torch.no_grad():
        model(prompt(PROMPT), past_key_values=cache)
        mask[0, 5] = 0
        with pytest.raises(wk.InputError, match="hides token 5 of row 0"):
            model(more, attention_mask=mask, past_key_values=cache)


def test_after_that_refusal_the_cache_goes_on(llama: PreTrainedModel) -> None:
    more, mask = prompt(3, seed=2), torch.ones(1, PROMPT + 3, dtype=torch.long)
    caches = [wk.CompactCache(llama, **SNAP) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            llama(prompt(PROMPT), past_key_values=cache)
        expected = llama(more, past_key_values=caches[0]).logits
        mask[0, 5] = 0
        with pytest.raises(wk.InputError):
            llama(more, attention_mask=mask, past_key_values=caches[1])
        mask[0, 5] = 1
        assert torch.equal(llama(more, attention_mask=mask, past_key_values=caches[1]).logits, expected)


@pytest.mark.parametrize("width", [3, PROMPT, PROMPT + 2, PROMPT + 4])
def test_a_mask_of_another_length_is_refused(llama: PreTrainedModel, width: int) -> None:
    cache = wk.CompactCache(llama, **SNAP)
    with torch.no_grad():
        llama(prompt(PROMPT), past_key_values=cache)
        with pytest.raises(wk.InputError, match=f"covers {width} tokens, but the cache has read {PROMPT} and 3 come"):
            llama(prompt(3), attention_mask=torch.ones(1, width, dtype=torch.long), past_key_values=cache)


def test_padding_of_several_turns_stays_hidden(llama: PreTrainedModel) -> None:
    """A batch whose second turn is padded, too: what was hidden when it came may stay hidden, and must match single runs."""
    first, mask = padded([prompt(PROMPT), prompt(50, seed=1)])
    second, more = padded([prompt(9, seed=2), prompt(4, seed=3)])
    whole = torch.cat([mask, more, torch.ones(2, 1, dtype=mask.dtype)], 1)
    places = (whole.cumsum(-1) - 1).clamp(min=0)
    cache, last, begin = wk.CompactCache(llama, **SNAP), prompt(1, seed=7).repeat(2, 1), 0
    with torch.no_grad():
        for ids in (first, second, last):
            end = begin + ids.shape[1]
            inputs = {"attention_mask": whole[:, :end], "position_ids": places[:, begin:end]}
            output = llama(ids, **inputs, past_key_values=cache).logits[:, -1]
            begin = end
        for row, texts in enumerate(((prompt(PROMPT), prompt(9, seed=2)), (prompt(50, seed=1), prompt(4, seed=3)))):
            single = wk.CompactCache(llama, **SNAP)
            for ids in (*texts, last[:1]):
                expected = llama(ids, past_key_values=single).logits[:, -1]
            torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_was_read_already_is_not_read_twice(llama: PreTrainedModel) -> None:
    cache, ids = wk.CompactCache(llama, **SNAP), prompt(PROMPT)
    logits = wk.prefill(llama, ids, cache)
    held = cache.held_bytes
    with pytest.raises(wk.InputError, match=f"has read {PROMPT} tokens already and .* {PROMPT}: give all"):
        generate(llama, ids, 4, past_key_values=cache)
    assert cache.held_bytes == held
    # The way out: what comes after the prompt follows it.
    tokens = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    after = generate(llama, tokens, 4, past_key_values=cache)
    with wk.compress(llama, **SNAP):
        assert [[int(tokens[0, -1]), *after[0]]] == generate(llama, ids, 5)


# Gradients


def test_gradients_through_a_compact_cache_are_refused(llama: PreTrainedModel) -> None:
    with wk.compress(llama, **SNAP):
        loss = llama(prompt(PROMPT)).logits.sum()
        with pytest.raises(wk.InputError, match="no gradients through a compact cache"):
            loss.backward()
    llama(prompt(PROMPT)).logits.sum().backward()
    assert all(layer.self_attn.k_proj.weight.grad is not None for layer in llama.model.layers)


# After a failure


def fails(*_: Any) -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("family", [None, hybrid])
@pytest.mark.parametrize("after", [0, PROMPT])
def test_a_cache_whose_pass_failed_says_so(
    llama: PreTrainedModel, family: Callable[[], PreTrainedModel] | None, after: int
) -> None:
    model = llama if family is None else family()
    cache = wk.CompactCache(model, **SNAP)
    with torch.no_grad():
        if after:
            model(prompt(after), past_key_values=cache)
        handle = model.model.layers[-1].register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(prompt(5), past_key_values=cache)
        handle.remove()
        for _ in range(2):
            with pytest.raises(wk.CacheError, match=r"failed.*reset\(\)"):
                model(prompt(5), past_key_values=cache)
        cache.reset()
        expected = model(prompt(PROMPT), past_key_values=wk.CompactCache(model, **SNAP)).logits
        assert torch.equal(model(prompt(PROMPT), past_key_values=cache).logits, expected)


def test_a_failed_pass_in_a_block_leaves_the_model_as_it_was(llama: PreTrainedModel) -> None:
    handle = llama.model.layers[3].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError) as caught, wk.compress(llama, **SNAP):
        generate(llama, prompt(PROMPT), 2)
    handle.remove()
    assert llama.config._attn_implementation == "sdpa"
    assert caught.value.args == ("in the middle",)


def test_pickle_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match=r"cannot be pickled: save it with wk\.save_cache"):
        pickle.dumps(wk.CompactCache(llama, **SNAP))
