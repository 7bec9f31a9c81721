"""A model is routed for as long as somebody holds it, and what is none of ours computes as ever, at any moment."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

import winnowkv as wk
from support.models import PROMPT, TINY, prompt, tiny_model
from support.reference import generate
from winnowkv.attention.routing import acquire, release, release_later, routing_of

SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 20}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# Locks

HANG = """
import gc, sys
sys.path.insert(0, "tests")
import winnowkv as wk
from support.models import PROMPT, prompt, tiny_model
from transformers import AttentionInterface

one, other = tiny_model("llama"), tiny_model("llama")
gc.disable()

def keep_a_cache_in_a_cycle():
    try:
        one.generate(prompt(PROMPT), past_key_values=wk.CompactCache(one, "snapkv:observe=8", 4), max_new_tokens=1)
    except wk.BudgetError as error:
        error.itself = error

register = AttentionInterface.register

def collect_and_register(*args):
    gc.collect()  # as any allocation may: here the lock is held, and the cache's finalizer runs
    return register(*args)

AttentionInterface.register = collect_and_register
keep_a_cache_in_a_cycle()
assert one.config._attn_implementation.startswith("winnow")
with wk.compress(other, "snapkv:observe=8", 20):
    assert one.config._attn_implementation == "sdpa"
print("done")
"""


def test_garbage_collected_while_a_model_is_routed_does_not_wait_for_itself() -> None:
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "done\n"


def test_what_is_given_back_while_the_lock_is_taken_is_taken_off_afterwards(llama: PreTrainedModel) -> None:
    from winnowkv.attention import routing

    held = acquire(llama)
    with routing._lock:
        release_later(held)  # as a finalizer that runs inside the module would
        assert routing_of(llama) is held
    other = acquire(tiny_model("llama"))
    assert routing_of(llama) is None
    release(other)


# A plain forward pass in another thread


def own_registered(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """A user's own attention: it attends twice as sharply, so that no other function gives the same."""
    kwargs["scaling"] = 2 * kwargs["scaling"]
    return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)


@contextmanager
def registered(name: str, *, mask: bool) -> Iterator[None]:
    AttentionInterface.register(name, own_registered)
    if mask:
        AttentionMaskInterface.register(name, sdpa_mask)
    yield


@pytest.fixture(params=["sdpa", "eager", "flex_attention", "own_masked"])
def base(request: pytest.FixtureRequest, llama: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The tiny model with an attention implementation of its own choice."""
    with registered("own_masked", mask=True):
        llama.set_attn_implementation(request.param)
        yield llama


class At:
    """Calls something when a layer of a model is about to be computed."""

    def __init__(self, model: Any, layer: int, act: Callable[[], None]) -> None:
        self.handle = model.model.layers[layer].register_forward_pre_hook(lambda *_: act())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("opens", [False, True])
def test_a_plain_forward_ends_as_it_began_when_a_block_opens_or_closes_inside_it(
    base: PreTrainedModel, opens: bool, padded: bool
) -> None:
    ids, mask = prompt(40).repeat(2, 1), torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[1, :9] = 0
    held: list[Any] = []
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).logits
        if opens:
            handle = At(base, 2, lambda: held.append(acquire(base))).handle
        else:
            held.append(acquire(base))
            handle = At(base, 2, lambda: release(held.pop())).handle
        try:
            assert torch.equal(base(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
        finally:
            handle.remove()
            for each in held:
                release(each)


@pytest.mark.filterwarnings("ignore:.*cannot serve a compact cache")
def test_a_block_that_ends_while_another_thread_reads_into_its_cache_waits_for_that_pass(base: PreTrainedModel) -> None:
    ids, more = prompt(PROMPT), prompt(6, seed=4)
    with torch.no_grad(), wk.compress(base, **SNAP):
        expected = base(more, past_key_values=base(ids).past_key_values).logits
    inside, ended = threading.Event(), threading.Event()
    results: list[Any] = []

    def pause() -> None:
        inside.set()
        assert ended.wait(30)

    def work(cache: Any) -> None:
        with torch.no_grad():
            results.append(base(more, past_key_values=cache).logits)

    with torch.no_grad(), wk.compress(base, **SNAP):
        cache = base(ids).past_key_values
        handle = At(base, 2, pause).handle
        thread = threading.Thread(target=work, args=(cache,))
        thread.start()
        assert inside.wait(30)
    ended.set()
    thread.join(60)
    handle.remove()
    torch.testing.assert_close(results[0], expected, **CLOSE)
    assert routing_of(base) is None


# The model's own attention


@pytest.mark.parametrize("masked", [False, True])
def test_a_registered_implementation_serves_prompts_and_steps(llama: PreTrainedModel, masked: bool) -> None:
    name = f"own_counted_{masked}"
    calls: list[int] = []

    def counted(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return own_registered(module, query, *args, **kwargs)

    AttentionInterface.register(name, counted)
    if masked:
        AttentionMaskInterface.register(name, sdpa_mask)
    llama.set_attn_implementation(name)
    expected, outside = generate(llama, prompt(PROMPT), 4), list(calls)
    calls.clear()
    with wk.compress(llama, "full", 1):
        assert generate(llama, prompt(PROMPT), 4) == expected
    assert calls == outside == [PROMPT] * 5 + [1] * 15
    assert llama.config._attn_implementation == name


def test_what_it_cannot_serve_is_served_by_sdpa_with_a_warning(llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("flex_attention")
    ids, mask = prompt(40).repeat(2, 1), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask).logits
        with wk.compress(llama, "full", 1), pytest.warns(UserWarning, match="flex_attention cannot serve .* SDPA does"):
            output = llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], **CLOSE)


def test_eager_attention_stays_eager(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    own, queries = modeling_llama.eager_attention_forward, []

    def counted(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query.shape[2])
        return own(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    llama.set_attn_implementation("eager")
    ids, mask = prompt(300).repeat(2, 1), torch.ones(2, 300, dtype=torch.long)
    mask[1, :40] = 0
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask).logits
        queries.clear()
        with wk.compress(llama, "full", 1):
            output = llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], **CLOSE)
    assert queries == [256, 44] * 5  # in blocks


def test_attention_weights_are_refused(llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("eager")
    with wk.compress(llama, **SNAP), pytest.raises(wk.InputError, match="output_attentions"):
        llama(prompt(PROMPT), output_attentions=True)
    assert llama(prompt(PROMPT), output_attentions=True).attentions[0].shape[-1] == PROMPT


# Configs


def test_composite_configs_come_back_each_as_it_was() -> None:
    text = LlamaConfig(num_hidden_layers=2, **{**TINY, "pad_token_id": None})
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = AutoModelForImageTextToText.from_config(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    ).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})

    def state() -> list[str]:
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        return [config._attn_implementation for config in configs.values()]

    before = state()
    assert {"eager", "sdpa"} <= set(before)
    expected = generate(model, prompt(PROMPT), 4)
    with wk.compress(model, "full", 1) as run:
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
        assert generate(model, prompt(PROMPT), 4) == expected
    assert state() == before
    assert run.report.kept_entries == [[PROMPT] * 2]


# Copies


def test_a_copy_of_a_model_made_in_a_block_is_a_model_of_its_own(llama: PreTrainedModel) -> None:
    expected = generate(llama, prompt(PROMPT), 6)
    with wk.compress(llama, **SNAP) as run:
        compressed = generate(llama, prompt(PROMPT), 6)
        twin = copy.deepcopy(llama)
        assert generate(twin, prompt(PROMPT), 6) == expected
        with wk.compress(twin, **SNAP) as other:
            assert generate(twin, prompt(PROMPT), 6) == compressed
    assert (len(run.reports), len(other.reports)) == (1, 1)
    twin.model.embed_tokens.weight.data.neg_()
    assert generate(twin, prompt(PROMPT), 6) != expected == generate(llama, prompt(PROMPT), 6)
    with wk.compress(twin, "full", 1):
        assert generate(twin, prompt(PROMPT), 6) == generate(twin, prompt(PROMPT), 6)


def test_a_copied_cache_may_outlive_its_original(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, **SNAP)
    more = prompt(3, seed=2)
    with torch.no_grad():
        llama(prompt(PROMPT), past_key_values=cache)
        twin = copy.deepcopy(cache)
        expected = llama(more, past_key_values=cache).logits
        del cache
        gc.collect()
        assert torch.equal(llama(more, past_key_values=twin).logits, expected)
    del twin
    gc.collect()
    assert llama.config._attn_implementation == "sdpa"
