"""Forks: each goes on as a cache that read everything by itself, and what they share is stored once."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, VOCABULARY, built, hybrid, prompt
from winnowkv.cache.forks import fork, stored_bytes

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"policy": "snapkv:observe=4:kernel=3", "budget": 20},
    "ragged heads": {"policy": "adakv:floor=0:of=snapkv:observe=4:sinks=2", "budget": 20},
    "quantized": {"policy": "snapkv:observe=4:kernel=3:quantize=int8", "budget": 20},
    "whole": {"policy": "full", "budget": 1.0},
    "decode budget": {"policy": "snapkv:observe=4:kernel=3", "budget": 20, "decode_budget": 64},
    "sliding": {"policy": "snapkv:observe=4:kernel=3", "budget": 20},
}
Step = tuple[str, int]  # what to do, with which seed or number


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    llama = copy.deepcopy(built("llama"))
    return {kind: hybrid() if kind == "sliding" else llama for kind in KINDS}


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def take(model: PreTrainedModel, cache: wk.CompactCache, step: Step) -> None:
    what, number = step
    if what == "read":
        model(input_ids=tokens(1 + number % 40, number), past_key_values=cache, use_cache=True)
    elif what == "crop":
        back = min(number % 5, cache.compact_layers[0].generated)
        if back:
            cache.crop(-back)
    elif what == "compact":
        for layer in cache.compact_layers:
            layer.compact(32 + number % 20)


def fresh(model: PreTrainedModel, kind: str) -> wk.CompactCache:
    cache = wk.CompactCache(model, **KINDS[kind])
    wk.prefill(model, prompt(PROMPT), cache)
    for layer in cache.compact_layers:
        layer.watched = kind != "sliding"
    return cache


@torch.no_grad()
def next_logits(model: PreTrainedModel, cache: wk.CompactCache) -> Tensor:
    return model(input_ids=tokens(1, 7), past_key_values=cache, use_cache=True).logits


def kinds_of_step(kind: str) -> tuple[str, ...]:
    # A window that has slid cannot be cropped, and unwatched layers cannot be compacted.
    return ("fork", "read", "fork", "read") if kind == "sliding" else ("fork", "read", "read", "crop", "compact")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(plan=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 999), st.integers(0, 4)), min_size=3, max_size=12))
def test_a_fork_is_a_cache_that_read_the_same_by_itself(
    models: dict[str, PreTrainedModel], kind: str, plan: list[tuple[int, int, int]]
) -> None:
    model, steps = models[kind], kinds_of_step(kind)
    family: list[tuple[wk.CompactCache, list[Step]]] = [(fresh(model, kind), [])]
    for which, number, what in plan:
        cache, history = family[which % len(family)]
        step = (steps[what % len(steps)], number)
        if step[0] == "fork":
            family.append((fork(cache), list(history)))
        else:
            take(model, cache, step)
            history.append(step)
    for cache, history in family:
        alone = fresh(model, kind)
        for step in history:
            take(model, alone, step)
        assert cache.get_seq_length() == alone.get_seq_length()
        for mine, its in zip(cache.compact_layers, alone.compact_layers, strict=True):
            assert (mine.length, mine.seen, mine.dropped, mine.pads) == (its.length, its.seen, its.dropped, its.pads)
            for one, other in zip(mine.entries_in_use(), its.entries_in_use(), strict=True):
                assert torch.equal(one, other)
        torch.testing.assert_close(next_logits(model, cache), next_logits(model, alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_forks_share_is_stored_once(models: dict[str, PreTrainedModel], kind: str) -> None:
    model = models[kind]
    first = fresh(model, kind)
    alone = first.held_bytes
    second = fork(first)
    third = fork(second)
    assert stored_bytes([first, second, third]) == alone == second.held_bytes
    take(model, second, ("read", 4))
    frozen = sum(part.held_bytes for layer in first.compact_layers for part in layer.quantized)
    assert stored_bytes([first, second, third]) == alone + second.held_bytes - frozen
    assert first.held_bytes == third.held_bytes == alone
    assert first.report.decode_tokens == 0
    assert second.report.decode_tokens == 5


def test_a_cache_is_forked_once_its_prompt_is_read(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="read a prompt, then fork"):
        fork(wk.CompactCache(llama, "full", 1.0))


def test_a_batch_can_be_forked(llama: PreTrainedModel) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :9] = 0
    cache = wk.CompactCache(llama, "adakv:floor=0:of=snapkv:observe=4", 20)
    wk.prefill(llama, torch.cat([prompt(PROMPT), prompt(PROMPT, 1)]), cache, mask)
    other = fork(cache)
    before = [layer.valid.clone() for layer in cache.compact_layers if layer.valid is not None]
    with torch.no_grad():
        llama(input_ids=tokens(3, 1).expand(2, -1), past_key_values=other, use_cache=True)
    for layer, valid in zip(cache.compact_layers, before, strict=True):
        assert torch.equal(layer.valid, valid)
        assert layer.length == valid.shape[-1]


def test_threads_may_each_read_into_their_own_fork(llama: PreTrainedModel) -> None:
    whole = fresh(llama, "plain")
    want = [next_after(llama, fork(whole), seed) for seed in range(4)]
    got: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda s=seed: got.update({s: next_after(llama, fork(whole), s)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], want[seed]) for seed in range(4))


@torch.no_grad()
def next_after(model: PreTrainedModel, cache: wk.CompactCache, seed: int) -> Tensor:
    for step in range(6):
        logits = model(input_ids=tokens(3, 10 * seed + step), past_key_values=cache, use_cache=True).logits
    return logits
