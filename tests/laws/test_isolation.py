"""Laws 5 and 10: nothing leaks between prompts, blocks and threads; the model is as before afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import Case
from support.models import PROMPT, prompt
from support.reference import compact_logits, generate, positions, same_positions

SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 20}
STREAM = {"policy": "streaming:sinks=2", "budget": 12}


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that a compress block could leave changed, weights aside."""
    modules = {
        name: (sorted(vars(module)), {k: len(v) for k, v in vars(module).items() if "hooks" in k})
        for name, module in model.named_modules()
    }
    return {
        "modules": modules,
        "attention": model.config._attn_implementation,
        "inner": model.model.config._attn_implementation,
        "config": model.config.to_dict(),
        "forward": model.forward.__func__,
        "generation": model.generation_config.to_dict(),
    }


def alone(model: PreTrainedModel, settings: dict[str, Any], seed: int) -> list[list[int]]:
    """Tokens of one prompt in a block of its own."""
    with wk.compress(model, **settings):
        return generate(model, prompt(PROMPT, seed=seed), 8)


# Law 5


def test_prompts_in_a_row_equal_each_alone(model: PreTrainedModel, case: Case) -> None:
    lengths = [PROMPT, 60, PROMPT]
    expected = []
    for seed, tokens in enumerate(lengths):
        cache = wk.CompactCache(model, **case.settings)
        logits = compact_logits(model, cache, prompt(tokens, seed=seed), [])
        expected.append((logits, positions(cache)))
    with wk.compress(model, **case.settings) as run, torch.no_grad():
        for seed, tokens in enumerate(lengths):
            output = model(input_ids=prompt(tokens, seed=seed))
            assert torch.equal(output.logits[0, -1:], expected[seed][0])
            assert same_positions(positions(output.past_key_values), expected[seed][1])
    assert [report.prompt_tokens for report in run.reports] == [[tokens] for tokens in lengths]


def test_a_reset_cache_compresses_the_next_prompt_as_a_fresh_one(model: PreTrainedModel, case: Case) -> None:
    fresh = wk.CompactCache(model, **case.settings)
    expected = compact_logits(model, fresh, prompt(60, seed=1), [])
    cache = wk.CompactCache(model, **case.settings)
    compact_logits(model, cache, prompt(PROMPT), [])
    cache.reset()
    assert cache.held_bytes == 0
    assert torch.equal(compact_logits(model, cache, prompt(60, seed=1), []), expected)
    assert same_positions(positions(cache), positions(fresh))
    assert cache.report.kept_entries == fresh.report.kept_entries
    assert cache.report.decode_tokens == 0


def test_two_caches_interleaved_equal_each_alone(model: PreTrainedModel, case: Case) -> None:
    seeds, more = (0, 1), prompt(4, seed=9)
    expected = [
        compact_logits(model, wk.CompactCache(model, **case.settings), prompt(PROMPT, seed=s), more.split(1, dim=1))
        for s in seeds
    ]
    caches = [wk.CompactCache(model, **case.settings) for _ in seeds]
    logits = [compact_logits(model, cache, prompt(PROMPT, seed=s), []) for cache, s in zip(caches, seeds, strict=True)]
    for token in more.split(1, dim=1):
        with torch.no_grad():
            for i, cache in enumerate(caches):
                logits[i] = torch.cat([logits[i], model(input_ids=token, past_key_values=cache).logits[0]])
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


def test_the_global_generator_is_not_touched(model: PreTrainedModel, case: Case) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    compact_logits(model, wk.CompactCache(model, **case.settings), prompt(PROMPT), [prompt(2)])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_not_read(llama: PreTrainedModel) -> None:
    kept = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        cache = wk.CompactCache(llama, "random", 20)
        compact_logits(llama, cache, prompt(PROMPT), [])
        kept.append(positions(cache))
    assert same_positions(*kept)


def test_the_innermost_block_wins(model: PreTrainedModel) -> None:
    ids = prompt(PROMPT)
    expected = [alone(model, settings, 0) for settings in (SNAP, STREAM)]
    assert expected[0] != expected[1]
    with wk.compress(model, **SNAP) as outer:
        with wk.compress(model, **STREAM) as inner:
            assert generate(model, ids, 8) == expected[1]
            assert (len(outer.reports), len(inner.reports)) == (0, 1)
        assert generate(model, ids, 8) == expected[0]
        assert (len(outer.reports), len(inner.reports)) == (1, 1)


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs at the same time; their results, or the first error."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results


def test_threads_with_blocks_of_their_own(model: PreTrainedModel) -> None:
    before = state(model)
    expected = [[alone(model, settings, seed) for seed in range(4)] for settings in (SNAP, STREAM)]
    both_open = threading.Barrier(2, timeout=30)

    def job(settings: dict[str, Any]) -> tuple[list[list[list[int]]], list[list[int]]]:
        with wk.compress(model, **settings) as run:
            both_open.wait()
            tokens = [generate(model, prompt(PROMPT, seed=seed), 8) for seed in range(4)]
            both_open.wait()  # neither leaves while the other still works
        return tokens, [report.kept_entries[0] for report in run.reports]

    results = in_threads(lambda: job(SNAP), lambda: job(STREAM))
    assert [tokens for tokens, _ in results] == expected
    layers = model.config.num_hidden_layers
    assert [kept for _, kept in results] == [[[20] * layers] * 4, [[12] * layers] * 4]
    assert state(model) == before


def test_a_block_that_ends_leaves_the_other_thread_its_own(model: PreTrainedModel) -> None:
    """The first thread opens and leaves first: the model must stay routed for the second."""
    before, expected = state(model), alone(model, STREAM, 1)
    opened, left = threading.Event(), threading.Event()

    def first() -> None:
        with wk.compress(model, **SNAP):
            assert opened.wait(30)
        left.set()

    def second() -> list[list[int]]:
        with wk.compress(model, **STREAM):
            opened.set()
            assert left.wait(30)
            return generate(model, prompt(PROMPT, seed=1), 8)

    assert in_threads(first, second)[1] == expected
    assert state(model) == before


def test_a_helper_thread_that_enters_the_block_is_served(model: PreTrainedModel) -> None:
    expected = alone(model, SNAP, 0)

    def helper(run: wk.Run) -> list[list[int]]:
        with run.in_thread():
            return generate(model, prompt(PROMPT), 8)

    with wk.compress(model, **SNAP) as run:
        assert in_threads(lambda: helper(run)) == [expected]
        assert len(run.reports) == 1
        assert alone(model, SNAP, 0) == expected
    with pytest.raises(wk.CacheError, match="has ended"):
        helper(run)


def test_a_helper_thread_may_stay_longer_than_the_block(model: PreTrainedModel) -> None:
    before, expected = state(model), alone(model, SNAP, 0)
    entered, left = threading.Event(), threading.Event()

    def helper(run: wk.Run) -> list[list[int]]:
        with run.in_thread():
            entered.set()
            assert left.wait(30)
            return generate(model, prompt(PROMPT), 8)

    def owner() -> list[list[int]]:
        with wk.compress(model, **SNAP) as run:
            thread.append(threading.Thread(target=lambda: results.append(helper(run))))
            thread[0].start()
            assert entered.wait(30)
        left.set()
        thread[0].join(30)
        return results[0]

    thread: list[threading.Thread] = []
    results: list[list[list[int]]] = []
    assert owner() == expected
    assert state(model) == before


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_thread_without_a_block_reads_as_ever_and_is_warned(model: PreTrainedModel, blocks: int) -> None:
    expected = generate(model, prompt(PROMPT), 8)
    own = generate(model, prompt(PROMPT), 4, past_key_values=wk.CompactCache(model, **SNAP))
    opened, done = threading.Barrier(blocks + 1, timeout=30), threading.Event()

    def holder(settings: dict[str, Any]) -> int:
        with wk.compress(model, **settings) as run:
            opened.wait()
            assert done.wait(30)
        return len(run.reports)

    def thread_without_block() -> list[list[int]]:
        opened.wait()
        try:
            with pytest.warns(UserWarning, match="opened by another thread") as warned:
                tokens = [generate(model, prompt(PROMPT), 8) for _ in range(2)]
            assert len(warned) == blocks
            assert generate(model, prompt(PROMPT), 4, past_key_values=wk.CompactCache(model, **SNAP)) == own
            assert tokens[0] == tokens[1]
            return tokens[0]
        finally:
            done.set()

    holders = [partial(holder, settings) for settings in (SNAP, STREAM)[:blocks]]
    results = in_threads(*holders, thread_without_block)
    assert results == [*[0] * blocks, expected]


# Law 10


INERT = """
import json
import torch, transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama import modeling_llama

def look():
    registries = [{k: id(v) for k, v in r().items()} for r in (AttentionInterface, AttentionMaskInterface)]
    patched = [id(v) for v in vars(modeling_llama.LlamaAttention).values()]
    return [registries, patched, torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist()]

before = look()
import winnowkv
print(json.dumps([before == look(), any("winnow" in key for key in AttentionInterface().keys())]))
"""


@pytest.mark.slow
def test_import_changes_nothing_in_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", INERT], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_leaving_a_block_restores_the_model(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    before, ids = state(model), prompt(PROMPT)
    expected = generate(model, ids, 8)
    with wk.compress(model, **SNAP):
        assert state(model) != before
        with wk.compress(model, **STREAM):
            generate(model, ids, 2)
        generate(model, ids, 2)
    assert state(model) == before
    assert generate(model, ids, 8) == expected


def test_an_exception_in_a_block_restores_the_model(model: PreTrainedModel) -> None:
    before = state(model)

    def fail_inside() -> None:
        with wk.compress(model, **SNAP), wk.compress(model, **STREAM):
            generate(model, prompt(PROMPT), 2)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail_inside()
    assert state(model) == before
    # An error of the package itself, from the middle of a forward pass.
    with pytest.raises(wk.BudgetError), wk.compress(model, "snapkv:observe=8", 4):
        generate(model, prompt(PROMPT), 2)
    assert state(model) == before


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"policy": "snapkvv"}, wk.PolicyError),
        ({"policy": "windowkv"}, wk.PolicyError),  # no task
        ({"budget": 0}, wk.BudgetError),
        ({"task": "poetry"}, wk.PolicyError),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_touched(
    model: PreTrainedModel, settings: dict[str, Any], error: type[Exception]
) -> None:
    before = state(model)
    with pytest.raises(error), wk.compress(model, **settings):
        pytest.fail("the block was entered")
    with pytest.raises(error):
        wk.CompactCache(model, **settings)
    assert state(model) == before


def test_deleting_the_cache_restores_the_model(model: PreTrainedModel) -> None:
    before = state(model)
    first, second = wk.CompactCache(model, **SNAP), wk.CompactCache(model, **STREAM)
    compact_logits(model, first, prompt(PROMPT), [])
    del first
    assert model.config._attn_implementation != "sdpa", "the second cache still needs the model routed"
    compact_logits(model, second, prompt(PROMPT), [prompt(2)])
    del second
    assert state(model) == before


def test_caches_and_blocks_overlap_in_any_order(model: PreTrainedModel) -> None:
    before = state(model)
    with wk.compress(model, **SNAP):
        cache = wk.CompactCache(model, **STREAM)
        assert generate(model, prompt(PROMPT), 2, past_key_values=cache)
        assert cache.report.kept_entries[0][0] == 12, "a cache that the caller passes is left alone"
    assert generate(model, prompt(2), 2)  # an ordinary cache, while the model is still routed
    del cache
    assert state(model) == before


def test_a_cache_of_a_block_ends_with_the_block(model: PreTrainedModel) -> None:
    before = state(model)
    with wk.compress(model, **SNAP), torch.no_grad():
        cache = model(input_ids=prompt(PROMPT)).past_key_values
    assert state(model) == before, "a cache that outlives its block must not keep the model routed"
    for tokens in (1, 3):
        with pytest.raises(wk.CacheError, match="has ended"), torch.no_grad():
            model(input_ids=prompt(tokens), past_key_values=cache)


def test_other_caches_work_as_before(model: PreTrainedModel) -> None:
    """While a compact cache lives, generation without it is the framework's, padding included."""
    ids = torch.cat([prompt(30), prompt(30, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = generate(model, ids, 8, attention_mask=mask)
    cache = wk.CompactCache(model, **SNAP)
    assert generate(model, ids, 8, attention_mask=mask) == expected
    assert not cache.report.kept_entries
