"""The connector under a small scheduler with vLLM's rules: who is given which entries, and who fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.contexts import HEAD_DIM, KV_HEADS, LAYERS, MODEL, add_context
from support.vllm_scheduler import COMPUTED, Engine, Request, sampling
from winnowkv.contexts.context import Context
from winnowkv.contexts.store import ContextStore
from winnowkv.integrations.vllm.scheduler_side import ContextScheduler, Refused
from winnowkv.integrations.vllm.worker_side import ContextMemory

BLOCK = 8
QUESTION = [501, 502, 503]
OTHER = [601, 602, 603, 604]


@pytest.fixture
def store(tmp_path: Path) -> ContextStore:
    return ContextStore(tmp_path)


def engine(store: ContextStore, limit: int = 1 << 30, **options: Any) -> Engine:
    planner = ContextScheduler(store, MODEL, BLOCK)
    sizes = {"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Engine(planner, ContextMemory(store, limit), **sizes, **options)


def has(request: Request, context: Context, store: ContextStore) -> bool:
    """Whether the request read the context's keys and values first, in order, and computed what follows."""
    states = store.states(context.id)
    for number, slots in enumerate(request.read):
        for at, held in enumerate(slots):
            if (at < context.kept) == (held is COMPUTED):
                return False
            expected = (states.keys[number, at], states.values[number, at]) if at < context.kept else ()
            if any(not torch.equal(one, other) for one, other in zip(held, expected, strict=False)):
                return False
    return bool(request.read)


def computed(request: Request) -> bool:
    """Whether every token of the prompt was computed."""
    return bool(request.read) and all(held is COMPUTED for slots in request.read for held in slots)


def test_a_request_reads_its_context_and_a_plain_one_is_computed(store: ContextStore) -> None:
    context, run = add_context(store), engine(store)
    one, plain = Request.on("one", context.prompt(QUESTION), BLOCK), Request("plain", context.prompt(QUESTION).ids, BLOCK)
    assert run.run(one, plain) == ["length", "length"]
    assert has(one, context, store)
    assert computed(plain), "the same ids without the salt are a text of their own"


def test_only_what_is_missing_is_loaded(store: ContextStore) -> None:
    """Of 20 entries in blocks of 8 two blocks are shared, four entries are each request's own."""
    context, run = add_context(store), engine(store)
    first, second = (Request.on(name, context.prompt(ids), BLOCK) for name, ids in (("first", QUESTION), ("second", OTHER)))
    run.run(first)
    run.run(second)
    assert run.loaded == [20, 4]
    assert has(second, context, store)


def test_requests_of_one_step_share_what_the_first_loads(store: ContextStore) -> None:
    context, run = add_context(store), engine(store)
    requests = [Request.on(str(at), context.prompt([*QUESTION, at]), BLOCK) for at in range(5)]
    run.run(*requests)
    assert run.loaded == [20, 4, 4, 4, 4]
    assert all(has(request, context, store) for request in requests)


def test_whole_blocks_leave_nothing_to_load(store: ContextStore) -> None:
    context, run = add_context(store, kept=24), engine(store)
    requests = [Request.on(str(at), context.prompt([*QUESTION, at]), BLOCK) for at in range(3)]
    run.run(*requests)
    assert run.loaded == [24, 0, 0]
    assert all(has(request, context, store) for request in requests)


def test_without_a_prefix_cache_each_request_loads_all(store: ContextStore) -> None:
    context, run = add_context(store), engine(store, caching=False)
    requests = [Request.on(str(at), context.prompt(QUESTION), BLOCK) for at in range(3)]
    run.run(*requests)
    assert run.loaded == [20, 20, 20]
    assert all(has(request, context, store) for request in requests)
    assert run.memory.reads == 1


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_long_question_is_computed_in_chunks(store: ContextStore, ahead: int) -> None:
    context, run = add_context(store), engine(store, chunk=5, steps_ahead=ahead)
    one, other = (Request.on(name, context.prompt(list(range(700, 733))), BLOCK) for name in ("one", "other"))
    assert run.run(one, other) == ["length", "length"]
    assert has(one, context, store)
    assert has(other, context, store)


@pytest.mark.parametrize("ahead", [0, 1])
def test_preempted_requests_load_again(store: ContextStore, ahead: int) -> None:
    """Two contexts interleaved in 12 blocks, where each request needs five."""
    contexts = [add_context(store, seed=seed) for seed in range(2)]
    run = engine(store, blocks=12, steps_ahead=ahead)
    requests = [Request.on(str(at), contexts[at % 2].prompt([500 + at]), BLOCK, max_tokens=16) for at in range(6)]
    assert run.run(*requests) == ["length"] * 6
    assert sum(request.preemptions for request in requests) > 0, "nothing was preempted: the test shows nothing"
    for at, request in enumerate(requests):
        assert has(request, contexts[at % 2], store)


def test_two_contexts_run_side_by_side(store: ContextStore) -> None:
    """Of one document, with the same entries but for their values."""
    contexts = [add_context(store, seed=seed) for seed in range(2)]
    run = engine(store)
    requests = [Request.on(str(at), contexts[at % 2].prompt(QUESTION), BLOCK) for at in range(6)]
    run.run(*requests)
    assert all(has(request, contexts[at % 2], store) for at, request in enumerate(requests))


@pytest.mark.parametrize("caching", [True, False])
def test_a_hundred_requests_read_the_store_once(store: ContextStore, caching: bool) -> None:
    context, run = add_context(store), engine(store, caching=caching)
    requests = [Request.on(str(at), context.prompt([*QUESTION, at]), BLOCK) for at in range(100)]
    assert run.run(*requests) == ["length"] * 100
    assert all(has(request, context, store) for request in requests)
    assert run.memory.reads == 1


def test_what_may_skip_the_prefix_cache_has_its_context(store: ContextStore) -> None:
    """vLLM takes no token from a connector for such a request: its placeholders would be computed."""
    context, run = add_context(store), engine(store)
    one = Request.on("one", context.prompt(QUESTION), BLOCK, sampling_params=sampling(skip_reading_prefix_cache=True))
    assert run.run(one) == ["length"]
    assert has(one, context, store)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_deleted_file_fails_only_its_requests(store: ContextStore, ahead: int) -> None:
    """After they came and before they are loaded; requests that come later are refused, and others go on."""
    gone, kept = add_context(store), add_context(store, seed=1)
    run = engine(store, steps_ahead=ahead)
    requests = [Request.on(str(at), one.prompt([*QUESTION, at]), BLOCK) for at, one in enumerate([gone, kept, gone, kept])]
    plain = Request("plain", OTHER * 3, BLOCK)
    run.add(*requests, plain)
    store.remove(gone.id)
    assert run.run() == []
    assert [run.done[request.request_id] for request in [*requests, plain]] == ["error", "length", "error", "length", "length"]
    assert has(requests[1], kept, store)
    assert has(requests[3], kept, store)
    later = Request.on("later", gone.prompt(QUESTION), BLOCK)
    assert run.run(later, Request.on("good", kept.prompt(QUESTION), BLOCK)) == ["error", "length"]


def test_a_context_that_comes_back_is_served(store: ContextStore) -> None:
    """What failed left no block behind that another request could be given."""
    context, run = add_context(store), engine(store)
    one = Request.on("one", context.prompt(QUESTION), BLOCK)
    run.add(one)
    store.remove(context.id)
    run.run()
    assert one.state == "error"
    add_context(store)
    again = Request.on("again", context.prompt(QUESTION), BLOCK)
    assert run.run(again) == ["length"]
    assert has(again, context, store)


Change = Callable[[Context], dict[str, Any]]
REFUSED: dict[str, tuple[Change, str]] = {
    "unknown": (lambda one: {"params": {"winnow_context": "0" * 32}}, "there is no context 0{32}"),
    "path": (lambda one: {"params": {"winnow_context": "../../etc/passwd"}}, "is no context's id"),
    "list": (lambda one: {"params": {"winnow_context": [one.id]}}, "is no context's id"),
    "salt of none": (lambda one: {"params": None, "salt": f"winnow:{'0' * 64}"}, "there is no context 0{32}"),
    "cut off": (lambda one: {"ids": one.placeholders[:11]}, "the prompt has 11 tokens, 20 placeholders"),
    "nothing follows": (lambda one: {"ids": one.placeholders}, "the prompt has 20 tokens, 20 placeholders and at least one"),
    "two tokens": (lambda one: {"ids": one.placeholders[:2]}, "the prompt has 2 tokens"),
    "no ids": (lambda one: {"ids": [0] * 30, "prompt_token_ids": None, "prompt_embeds": object()}, "not embeddings"),
    "other ids": (lambda one: {"ids": [7, *one.placeholders[1:], 8]}, "does not begin with its placeholders"),
    "other salt": (lambda one: {"salt": "mine"}, "cache_salt is not the context's"),
    "no salt": (lambda one: {"salt": None}, "cache_salt is not the context's"),
    "prompt_logprobs": (lambda one: {"sampling_params": sampling(prompt_logprobs=0)}, "no prompt_logprobs: leave them out"),
    "prompt_logprob_token_ids": (
        lambda one: {"sampling_params": sampling(prompt_logprob_token_ids=[[1]])}, "no prompt_logprobs: leave them out",
    ),
    "prompt_logprobs, no cache": (
        lambda one: {"sampling_params": sampling(prompt_logprobs=1, skip_reading_prefix_cache=True)},
        "no prompt_logprobs: leave them out",
    ),
    "lora": (lambda one: {"lora_request": object()}, "without LoRA"),
    "images": (lambda one: {"mm_features": [object()]}, "images or sound"),
}  # fmt: skip


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("place", ["before", "after", "warm"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_fails_alone(
    store: ContextStore, name: str, place: str, ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside good ones on the same context: scheduled before them, after them, or with the blocks there already."""
    context, run = add_context(store), engine(store, steps_ahead=ahead)
    change, why = REFUSED[name]
    bad = Request.on("bad", context.prompt(QUESTION), BLOCK, **change(context))
    good = [Request.on(str(at), context.prompt([*QUESTION, at]), BLOCK) for at in range(2)]
    if place == "warm":
        run.run(Request.on("first", context.prompt(OTHER), BLOCK))
    order = [bad, *good] if place == "before" else [*good, bad]
    ended = dict(zip([request.request_id for request in order], run.run(*order), strict=True))
    assert ended == {"bad": "error", "0": "length", "1": "length"}
    assert all(has(request, context, store) for request in good)
    assert re.search(f"request bad is refused: .*{why}", caplog.text)


def test_a_context_of_another_model_is_refused(store: ContextStore, caplog: pytest.LogCaptureFixture) -> None:
    context, run = add_context(store, model={**MODEL, "hidden_size": 64}), engine(store)
    assert run.run(Request.on("one", context.prompt(QUESTION), BLOCK)) == ["error"]
    assert f"context {context.id} is of another model: its model's hidden_size is 64, here 32" in caplog.text


def test_a_request_that_pools_is_refused(store: ContextStore, caplog: pytest.LogCaptureFixture) -> None:
    context, run = add_context(store), engine(store)
    bad = Request.on("bad", context.prompt(QUESTION), BLOCK)
    bad.sampling_params = None
    assert run.run(bad) == ["error"]
    assert "a request that pools has no use for it" in caplog.text


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("asked", [1, 3])
def test_a_refused_prompt_of_one_token_fails_in_its_second_step(store: ContextStore, asked: int, ahead: int) -> None:
    """There is nothing to claim in the first, which must not be the last."""
    context, run = add_context(store), engine(store, steps_ahead=ahead)
    bad = Request.on("bad", context.prompt(QUESTION), BLOCK, ids=context.placeholders[:1], max_tokens=asked)
    given = bad.sampling_params
    good = Request.on("good", context.prompt(QUESTION), BLOCK)
    assert run.run(bad, good) == ["error", "length"]
    assert has(good, context, store)
    assert bad.sampling_params.min_tokens == 2, "an end token would end it in its first step"
    assert given.min_tokens == 0, "the caller's parameters were changed"
    assert run.planner.late() == []


def test_requests_that_name_no_context_are_left_alone(store: ContextStore) -> None:
    """Other salts, also digests, and other connectors' parameters."""
    add_context(store)
    run = engine(store)
    plain = [
        Request("digest", OTHER * 5, BLOCK, salt="5e" * 32),
        Request("salt", OTHER * 5, BLOCK, salt="mine"),
        Request("params", OTHER * 5, BLOCK, params={"do_remote_prefill": False, "winnow_context": None}),
        Request("skips", OTHER * 5, BLOCK, sampling_params=sampling(skip_reading_prefix_cache=True)),
    ]
    hashes = [list(request.block_hashes) for request in plain]
    assert run.run(*plain) == ["length"] * 4
    assert all(computed(request) for request in plain)
    assert [request.block_hashes[: len(before)] for request, before in zip(plain, hashes, strict=True)] == hashes
    assert plain[3].skip_reading_prefix_cache
    assert run.loaded == [0] * 4


def test_the_salt_alone_names_a_context(store: ContextStore) -> None:
    context, run = add_context(store), engine(store)
    one = Request.on("one", context.prompt(QUESTION), BLOCK, params=None)
    assert run.run(one) == ["length"]
    assert has(one, context, store)


def test_requests_that_are_over_are_forgotten(store: ContextStore) -> None:
    """Also those that were aborted before they were scheduled."""
    context = add_context(store)
    planner = ContextScheduler(store, MODEL, BLOCK)
    for name, change in (("good", {}), ("bad", {"salt": None})):
        request = Request.on(name, context.prompt(QUESTION), BLOCK, **change)
        planner.add(request)
        assert isinstance(planner._requests[name], Refused) == (name == "bad")
        planner.finished(name)
    assert planner._requests == {}
    assert not planner.plan({}).loads


def test_a_plan_is_given_out_once(store: ContextStore) -> None:
    context = add_context(store)
    planner = ContextScheduler(store, MODEL, BLOCK)
    request = Request.on("one", context.prompt(QUESTION), BLOCK)
    planner.add(request)
    assert planner.matched(request, 8) == 12
    planner.allocated(request, [4, 7, 5], 12)
    (one,) = planner.plan({}).loads
    assert (one.context, one.first, one.blocks) == (context.id, 8, [5, 7])
    assert one.slots == [*range(7 * 8, 8 * 8), *range(5 * 8, 5 * 8 + 4)]
    assert planner.plan({}).loads == []


def test_no_more_headers_are_remembered_than_the_limit(store: ContextStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnowkv.integrations.vllm.scheduler_side.REMEMBERED", 2)
    contexts, planner = [add_context(store, seed=seed) for seed in range(4)], ContextScheduler(store, MODEL, BLOCK)
    for at, context in enumerate([*contexts, contexts[0]]):
        request = Request.on(str(at), context.prompt(QUESTION), BLOCK)
        planner.add(request)
        assert planner.matched(request, 0) == context.kept
        assert len(planner._contexts) == min(at + 1, 2)
