"""What a policy that looks is planned with is what its cache holds until it has chosen."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, WINDOW, hybrid, prompt
from winnowkv.budget import Budget
from winnowkv.cache.layer import BUFFER_GROWTH
from winnowkv.memory.looking import grown_to
from winnowkv.memory.plan import MemoryPlan, need
from winnowkv.memory.shape import read_shape
from winnowkv.prompt.task import TaskProfile


def held(model: PreTrainedModel, spec: str, tokens: int = PROMPT, new: int = 12) -> wk.CompactCache:
    """A cache whose prompt was answered."""
    cache = wk.CompactCache(model, spec, 20)
    model.generate(prompt(tokens), past_key_values=cache, max_new_tokens=new, do_sample=False)
    return cache


@pytest.mark.parametrize(
    "spec",
    ["snapkv:observe=8:refit=true", "winnow:observe=4:samples=16:refit=true", "winnow:observe=4:samples=16:lookahead=7",
     "snapkv:observe=8:lookahead=1", "snapkv:observe=8:lookahead=70", "keydiff:lookahead=3:refit=true"],
)  # fmt: skip
def test_the_planned_peak_is_that_of_the_report(model: PreTrainedModel, spec: str) -> None:
    one = need(read_shape(model.config, 4), wk.policy(spec), Budget(20), PROMPT, TaskProfile())
    cache = held(model, spec, new=80)
    assert cache.looking is None
    assert cache.report.peak_bytes == one.peak == one.looking > cache.report.full_bytes
    lean = need(read_shape(model.config, 4), wk.policy(spec).lean(), Budget(20), PROMPT, TaskProfile())
    assert (one.rest, lean.looking) == (lean.rest, 0)
    assert lean.peak < one.peak


def test_a_draft_counts_its_compact_copy_and_its_queries(llama: PreTrainedModel) -> None:
    shape, budget = read_shape(llama.config, 4), Budget(20)
    looks, drafts = (
        need(shape, wk.policy(f"snapkv:observe=8:lookahead=3{more}"), budget, PROMPT, TaskProfile())
        for more in ("", ":draft=9")
    )
    entry = 2 * 2 * 8 * 4  # keys and values, KV heads, head size, float32
    query = 8 * 8 * 4  # heads, head size, float32
    assert drafts.peak - looks.peak == 5 * ((20 + 3 + 9) * entry + 9 * query)


@pytest.mark.parametrize("tokens", [WINDOW - 6, WINDOW, WINDOW + 6, 3 * WINDOW, PROMPT])
def test_layers_that_slide_are_counted(tokens: int) -> None:
    model, spec = hybrid(), "snapkv:observe=4:lookahead=5"
    one = need(read_shape(model.config, 4), wk.policy(spec), Budget(8), tokens, TaskProfile())
    cache = wk.CompactCache(model, spec, 8)
    model.generate(prompt(tokens), past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.looking is not None
    assert cache.looking.ready
    sliding = sum(part.untyped_storage().nbytes() for layer in cache.sliding_layers for part in (layer.keys, layer.values))
    assert 0 < sliding <= one.peak - cache.held_bytes


@pytest.mark.parametrize("added", [0, 1, BUFFER_GROWTH, BUFFER_GROWTH + 1, BUFFER_GROWTH + 2, 3 * BUFFER_GROWTH])
def test_buffers_grow_as_planned(llama: PreTrainedModel, added: int) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=8:lookahead=500", 20)
    llama.generate(prompt(40), past_key_values=cache, max_new_tokens=added + 1, do_sample=False)
    assert {layer.keys.shape[2] for layer in cache.compact_layers} == {grown_to(40, added)}


def test_a_plan_says_what_is_held_while_a_request_looks(llama: PreTrainedModel) -> None:
    made = MemoryPlan(read_shape(llama.config, 4), 500, 3, 2**22, weights=0)
    lean, looks = (made.fit(spec, wk.policy(spec), 60) for spec in ("snapkv", "snapkv:lookahead=32:draft=16"))
    assert (lean.lookahead, lean.looking_bytes) == (0, 0)
    assert (looks.lookahead, looks.looking_bytes) == (32, looks.peak_bytes)
    assert looks.kept_bytes == lean.kept_bytes
    assert looks.needed_bytes == 2 * looks.kept_bytes + looks.peak_bytes > lean.needed_bytes
    # A prompt of which nothing goes does not look.
    assert MemoryPlan(made.shape, 50, 1, 2**22, 0).fit("snapkv", wk.policy("snapkv:lookahead=32"), 60).looking_bytes == 0


def test_lean_policies_differ_in_nothing_else() -> None:
    for spec in ("snapkv:observe=4", "adakv:of=snapkv:observe=4", "winnow:quantize=int8", "criticalkv:of=adakv:of=expected"):
        policy = wk.policy(spec + ":lookahead=4:draft=3:refit=true")
        assert policy.looks
        assert policy.lean() == wk.policy(spec)
