"""Requests that fail, are cancelled, or run in other threads: the others continue, and nothing is kept of finished ones."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.engine import SNAP, alone, ids
from support.models import prompt
from support.tokenizers import word_tokenizer
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Completion, Request
from winnowkv.engine.sampling import Sampling


def test_a_row_with_logits_that_are_not_finite_fails_alone(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    step, count = engine._slots.step, itertools.count()

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        logits = step(tokens)
        if next(count) == 3:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(engine._slots, "step", broken)
    done = engine.generate([ids(60, seed) for seed in range(3)], Sampling(max_new_tokens=8))
    truth = [alone(llama, ids(60, seed), 8, **SNAP) for seed in range(3)]
    assert [one.finish_reason for one in done] == ["length", "error", "length"]
    assert [done[0].tokens, done[2].tokens] == [truth[0], truth[2]]
    assert done[1].tokens == truth[1][: len(done[1].tokens)]
    assert isinstance(done[1].error, wk.InputError)
    assert "not a finite number" in str(done[1].error)


def test_a_prompt_that_fails_does_not_stop_the_others(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    read = Engine._prompt_logits

    def failing(self: Engine, request: Request, cache: wk.CompactCache) -> torch.Tensor:
        if len(request.prompt) == 61:
            raise wk.InputError("this one")
        return read(self, request, cache)

    monkeypatch.setattr(Engine, "_prompt_logits", failing)
    done = engine.generate([ids(60), ids(61), ids(60)], Sampling(max_new_tokens=5))
    assert [one.finish_reason for one in done] == ["length", "error", "length"]
    assert (str(done[1].error), done[1].tokens, done[1].text) == ("this one", [], "")
    assert done[0].error is done[2].error is None
    assert done[0].report is not done[2].report
    assert [one.report.prompt_tokens for one in done] == [[60], [], [60]]
    (event,) = list(engine.stream(ids(61)))
    assert (event.token, event.finished.finish_reason) == (None, "error")


@pytest.mark.parametrize("where", ["_prompt_logits", "step"])
def test_an_error_of_the_forward_pass_is_raised_and_the_engine_continues(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine, count = Engine(llama, word_tokenizer(), **SNAP), itertools.count()
    target = engine if where == "_prompt_logits" else engine._slots
    before = getattr(target, where)

    def failing(*arguments: Any) -> torch.Tensor:
        if next(count) == 1:
            raise MemoryError("no more")
        return before(*arguments)

    monkeypatch.setattr(target, where, failing)
    requests = [engine.submit(ids(60, seed), Sampling(max_new_tokens=6)) for seed in range(4)]
    engine.step()
    with pytest.raises(MemoryError, match="no more"):
        engine.step()
    while engine.waiting or engine.active:
        engine.step()
    truth = [alone(llama, ids(60, seed), 6, **SNAP) for seed in range(4)]
    failed = [1] if where == "_prompt_logits" else [0, 1]
    for row, request in enumerate(requests):
        assert request.completion.finish_reason == ("error" if row in failed else "length")
        assert request.tokens == (truth[row][: len(request.tokens)] if row in failed else truth[row])
    assert isinstance(requests[1].completion.error, MemoryError)
    assert engine.held_bytes == 0


def test_ctrl_c_cancels_unfinished_requests(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, word_tokenizer(), max_rows=2, **SNAP)
    step, count, submit, seen = engine._slots.step, itertools.count(), engine.submit, []

    def interrupted(tokens: torch.Tensor) -> torch.Tensor:
        if next(count) == 4:
            raise KeyboardInterrupt
        return step(tokens)

    def watched(*arguments: Any, **more: Any) -> Request:
        seen.append(submit(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(engine._slots, "step", interrupted)
    monkeypatch.setattr(engine, "submit", watched)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([ids(60, seed) for seed in range(4)], [Sampling(max_new_tokens=n) for n in (2, 20, 20, 20)])
    assert [one.completion.finish_reason for one in seen] == ["length", "cancelled", "cancelled", "cancelled"]
    assert (engine.waiting, engine.active, engine.held_bytes) == (0, 0, 0)
    assert engine.generate([ids(60)], Sampling(max_new_tokens=5))[0].tokens == alone(llama, ids(60), 5, **SNAP)


def test_cancelled_requests_leave_at_once_and_change_no_other_tokens(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), max_rows=3, **SNAP)
    requests = [engine.submit(ids(60, seed), Sampling(max_new_tokens=12)) for seed in range(6)]
    truth = [alone(llama, ids(60, seed), 12, **SNAP) for seed in range(6)]
    for _ in range(4):
        engine.step()
    assert (engine.active, engine.waiting) == (3, 3)
    engine.cancel(requests[0])  # in a row; another one moves into it
    engine.cancel(requests[4])  # in the queue
    assert (engine.active, engine.waiting, engine._slots.rows) == (2, 2, 2)
    for row in (0, 4):
        assert requests[row].completion.finish_reason == "cancelled"
    assert requests[0].tokens == truth[0][: len(requests[0].tokens)]
    assert requests[4].completion.queue_seconds is requests[4].completion.first_token_seconds is None
    after = []
    while engine.waiting or engine.active:
        after += engine.step()
    assert not {event.request for event in after} & {requests[0], requests[4]}
    for row in (1, 2, 3, 5):
        assert requests[row].tokens == truth[row]
        engine.cancel(requests[row])  # too late to change anything
        assert requests[row].completion.finish_reason == "length"
    assert engine.held_bytes == 0


def test_withheld_text_of_a_cancelled_request_is_dropped(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    first, second = alone(llama, ids(60), 2, **SNAP)
    stream = engine.stream(ids(60), Sampling(stop=(f"w{second} and more",)))
    pieces = [next(stream) for _ in range(2)]
    stream.close()
    assert pieces[-1].request.completion.text == "".join(event.text for event in pieces) == f"w{first} "


@pytest.mark.parametrize("where", ["_prompt_logits", "step"])
def test_a_request_may_be_cancelled_during_a_forward_pass(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """From another thread, during a forward pass: neither call waits for the other, and the row is free afterwards."""
    engine = Engine(llama, word_tokenizer(), **SNAP)
    kept, gone = engine.submit(ids(60), Sampling(max_new_tokens=6)), engine.submit(ids(70), Sampling(max_new_tokens=6))
    target = engine if where == "_prompt_logits" else engine._slots
    before, count, done = getattr(target, where), itertools.count(), []

    def working(*arguments: Any) -> torch.Tensor:
        if next(count) == 1:
            helper = threading.Thread(target=lambda: (engine.cancel(gone), done.append(engine.submit(ids(50)))))
            helper.start()
            helper.join(30)
            assert not helper.is_alive()
        return before(*arguments)

    monkeypatch.setattr(target, where, working)
    engine.step()
    events = engine.step()
    assert gone.completion.finish_reason == "cancelled"
    # Its first token was there before, if it was.
    assert [event.finished for event in events if event.request is gone] == ([None] if where == "step" else [])
    assert engine._slots.rows == engine.active == 1
    engine.cancel(done[0])
    while engine.waiting or engine.active:
        assert not [event for event in engine.step() if event.request is gone]
    assert kept.tokens == alone(llama, ids(60), 6, **SNAP)


def test_a_stream_that_is_closed_is_cancelled(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    stream = engine.stream(ids(60), Sampling(max_new_tokens=50))
    request = [next(stream) for _ in range(4)][-1].request
    assert (engine.active, request.completion) == (1, None)
    stream.close()
    assert request.completion.finish_reason == "cancelled"
    assert (engine.active, engine.held_bytes, len(request.tokens)) == (0, 0, 4)
    assert request.completion.text == word_tokenizer().decode(request.tokens)
    other = engine.stream(ids(60), Sampling(max_new_tokens=50))
    engine.cancel(next(other).request)
    assert [event.finished and event.finished.finish_reason for event in other][-1] == "cancelled"


def test_threads_that_share_an_engine_get_their_own_tokens(llama: PreTrainedModel) -> None:
    """Streams, lists and cancellations at once: everyone gets its own."""
    engine = Engine(llama, word_tokenizer(), max_rows=4, kv_memory="256KiB", **SNAP)
    truth = {seed: alone(llama, ids(40 + seed, seed), 10, **SNAP) for seed in range(12)}
    found: dict[int, list[int]] = {}
    failed: list[BaseException] = []

    def work(mine: Sequence[int]) -> None:
        how, draw = Sampling(max_new_tokens=10), random.Random(mine[0])
        try:
            for seed in mine:
                if draw.random() < 0.4:
                    engine.cancel(engine.submit(ids(66), how))
                if draw.random() < 0.5:
                    found[seed] = [event.token for event in engine.stream(ids(40 + seed, seed), how)]
                else:
                    (done,) = engine.generate([ids(40 + seed, seed)], how)
                    found[seed] = done.tokens
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(range(begin, 12, 4),)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert found == truth
    assert (engine.waiting, engine.active, engine.held_bytes) == (0, 0, 0)


@pytest.mark.slow
def test_nothing_is_kept_of_requests_that_have_ended(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), max_rows=8, kv_memory="1MiB", **SNAP)
    alive: list[weakref.ref[Any]] = []

    def some(count: int) -> None:
        for _ in range(count // 10):
            requests = [engine.submit(ids(24 + n, n), Sampling(max_new_tokens=3)) for n in range(10)]
            engine.cancel(requests[3])
            while engine.waiting or engine.active:
                engine.step()
            alive.extend(weakref.ref(request) for request in requests)
            alive.extend(weakref.ref(request.report) for request in requests if request.report)

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects()) - len(alive)

    some(50)
    before = objects()
    some(500)
    assert objects() - before < 50
    assert not [one for one in alive if one() is not None]
    assert engine.held_bytes == 0
    assert not gc.collect() or not [one for one in gc.get_objects() if isinstance(one, wk.CompactCache | Completion)]


def test_the_model_is_restored_when_the_engine_is_deleted(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    engine = Engine(llama, word_tokenizer(), **SNAP)
    engine.generate([ids(60)], Sampling(max_new_tokens=3))
    assert llama.config._attn_implementation != before
    plain = llama.generate(prompt(40), max_new_tokens=5, do_sample=False)
    del engine
    gc.collect()
    assert llama.config._attn_implementation == before
    assert torch.equal(llama.generate(prompt(40), max_new_tokens=5, do_sample=False), plain)
