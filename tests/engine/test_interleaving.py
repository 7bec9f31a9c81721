"""While a prompt is read the others decode, and nothing else changes: not an answer, not what fails, not what is held."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.engine import LENGTHS, NEW, SNAP, Watch, alone, asked, ids, least
from support.models import hybrid
from support.tokenizers import ChatLetters, word_tokenizer
from winnowkv.cache.reading import prefill
from winnowkv.engine.engine import Engine
from winnowkv.engine.job import StoppedError
from winnowkv.engine.request import Event
from winnowkv.engine.sampling import Sampling
from winnowkv.engine.scheduler import Scheduler
from winnowkv.engine.slots import Slots
from winnowkv.errors import CacheError, InputError, PolicyError
from winnowkv.prompt.chat import rest_of_turn, text_ending

SIX, LONG = Sampling(max_new_tokens=6), Sampling(max_new_tokens=40)


def drained(engine: Engine) -> None:
    while engine.waiting or engine.active:
        engine.step()


@pytest.mark.parametrize("every", [1, 30, 100])
@pytest.mark.parametrize("kind", ["llama", "hybrid", "chunked", "looks"])
def test_answers_are_those_of_each_prompt_alone(llama: PreTrainedModel, every: int, kind: str) -> None:
    model = hybrid() if kind == "hybrid" else llama
    policy = "snapkv:observe=8:kernel=3" + (":lookahead=2:draft=2" if kind == "looks" else "")
    engine = Engine(model, word_tokenizer(), policy, 20, interleave=every, prefill_chunk=64 if kind == "chunked" else None)
    reference = [
        alone(model, ids(tokens, row), new, policy, 20) for row, (tokens, new) in enumerate(zip(LENGTHS, NEW, strict=True))
    ]
    assert asked(engine) == reference
    assert engine.held_bytes == 0


@pytest.mark.parametrize("policy", ["snapkv:observe=8:kernel=3", "snapkv:observe=8:kernel=3:lookahead=2:draft=2"])
def test_no_more_bytes_are_held_than_kv_memory(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    memory = least(Engine(llama, word_tokenizer(), policy, 20))
    engine = Engine(llama, word_tokenizer(), policy, 20, interleave=1, kv_memory=memory)
    watch = Watch(monkeypatch)
    asked(engine)
    assert 0 < watch.most <= memory


def test_rows_decode_while_a_prompt_is_read(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), interleave=20, **SNAP)
    first = engine.submit(ids(60), LONG)
    engine.step()
    before = len(first.tokens)
    engine.submit(ids(80, 1), SIX)
    events = engine.step()  # 80 tokens in 5 layers: a step after 2 layers, after 4, and the one that ends the step
    assert len(first.tokens) - before == 3
    assert [event.token for event in events if event.request is first] == first.tokens[before:]


def test_a_prompt_that_is_cancelled_is_not_read_to_its_end(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, word_tokenizer(), interleave=1, **SNAP)
    layers: list[int] = []
    update = wk.CompactCache.update
    monkeypatch.setattr(wk.CompactCache, "update", lambda self, *given: (update(self, *given), layers.append(given[2]))[0])
    second: list[Any] = []

    def leave(event: Event) -> None:
        if second and layers and layers[-1] == 1:
            engine.cancel(second[0])

    engine.submit(ids(60), LONG, listener=leave)
    engine.step()
    layers.clear()
    second.append(engine.submit(ids(80, 1), SIX))
    engine.step()
    assert layers == [0, 1]
    assert second[0].completion.finish_reason == "cancelled"
    drained(engine)
    assert engine.held_bytes == 0


def test_a_prompt_that_is_cancelled_just_before_it_gets_its_row_ends_alone(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    beside = engine.submit(ids(60), SIX)
    engine.step()
    second = engine.submit(ids(80, 1), SIX)
    fail_stuck = Scheduler._fail_stuck

    def leave(scheduler: Scheduler) -> list[Event]:  # as a client's thread does, between two of the engine's
        engine.cancel(second)
        return fail_stuck(scheduler)

    monkeypatch.setattr(Scheduler, "_fail_stuck", leave)
    drained(engine)
    assert second.completion is not None
    assert second.completion.finish_reason == "cancelled"
    assert beside.tokens == alone(llama, ids(60), 6, **SNAP)


def test_a_step_that_fails_meanwhile_ends_its_rows_and_not_the_prompt(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama, word_tokenizer(), interleave=20, **SNAP)
    first = engine.submit(ids(60), LONG)
    engine.step()
    second = engine.submit(ids(80, 1), SIX)
    step, calls = Slots.step, itertools.count()

    def failing(self: Slots, tokens: torch.Tensor) -> torch.Tensor:
        if next(calls) == 0:
            raise MemoryError("no more")
        return step(self, tokens)

    monkeypatch.setattr(Slots, "step", failing)
    with pytest.raises(MemoryError):
        engine.step()
    assert first.completion is not None
    assert isinstance(first.completion.error, MemoryError)
    assert second.completion is None
    drained(engine)
    assert second.tokens == alone(llama, ids(80, 1), 6, **SNAP)


def test_a_request_has_its_own_policy_budget_and_quality(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), interleave=10, **SNAP)
    own: list[dict[str, Any]] = [
        {}, {"policy": "streaming", "budget": 0.5}, {"budget": 30}, {"policy": "full"}, {"quality": "balanced", "budget": 0.9},
    ]  # fmt: skip
    requests = [engine.submit(ids(72, row), SIX, **one) for row, one in enumerate(own)]
    drained(engine)
    for row, (one, request) in enumerate(zip(own, requests, strict=True)):
        settings = {**SNAP, **one}
        quality = settings.pop("quality", None)
        with wk.compress(llama, quality=quality, tokenizer=word_tokenizer(), **settings) as run:
            expected = llama.generate(torch.tensor([ids(72, row)]), max_new_tokens=6, do_sample=False)[0, 72:].tolist()
        assert request.completion is not None
        assert request.tokens == expected
        assert request.completion.report.kept_entries == run.report.kept_entries
        assert request.completion.report.policy == run.report.policy
    with pytest.raises(PolicyError, match="'no-such'"):
        engine.submit(ids(20), SIX, policy="no-such")


@pytest.mark.parametrize("policy", ["snapkv:observe=4:kernel=3", "adakv:floor=0:of=snapkv:observe=4"])
@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_requests_go_on_from_a_document(llama: PreTrainedModel, policy: str, kind: str) -> None:
    model, tokenizer = hybrid() if kind == "hybrid" else llama, ChatLetters()
    text = "The archive of Oakham was founded in 1712. Its first keeper wrote the history of the town."
    document = wk.read(model, tokenizer, text, policy, 0.3, decode_budget=None)
    ending = text_ending(tokenizer, document.ids, chat=True)
    engine = Engine(model, tokenizer, interleave=5, **SNAP)
    questions = ["Who?", "When was it founded, and by whom?", "Why?"]
    beside = engine.submit(ids(40), SIX)
    requests = [engine.submit(rest_of_turn(tokenizer, ending, one, chat=True), SIX, after=document.cache) for one in questions]
    drained(engine)
    assert [one.tokens for one in requests] == [document.ask(one, 6).tokens for one in questions]
    assert beside.tokens == alone(model, ids(40), 6, **SNAP)
    assert requests[0].completion is not None
    assert requests[0].completion.document_tokens == len(document.ids)
    assert engine.held_bytes == 0


def test_what_no_request_can_go_on_from_is_refused(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), kv_memory=100_000, **SNAP)
    fresh = wk.CompactCache(llama, **SNAP)
    with pytest.raises(CacheError, match="nothing was read"):
        engine.submit(ids(4), SIX, after=fresh)
    prefill(llama, torch.tensor([ids(60)]), fresh)
    with pytest.raises(InputError, match=r"policy='full'.*leave policy out"):
        engine.submit(ids(4), SIX, after=fresh, policy="full")
    with pytest.raises(InputError, match="give its token ids"):
        engine.submit("a text", SIX, after=fresh)
    with pytest.raises(InputError, match="after 60 of a document"):
        engine.submit(ids(1000), SIX, after=fresh)
    with pytest.raises(InputError, match="kv_memory is 100000"):
        engine.submit(ids(900), SIX, after=fresh)
    other = wk.CompactCache(hybrid(), **SNAP)
    prefill(other.model, torch.tensor([ids(60)]), other)
    with pytest.raises(CacheError, match="another model"):
        engine.submit(ids(4), SIX, after=other)


def test_a_job_is_done_in_its_turn_while_rows_decode(llama: PreTrainedModel) -> None:
    engine = Engine(llama, ChatLetters(), interleave=20, kv_memory=10**7, **SNAP)
    first = engine.submit(ids(60), LONG)
    engine.step()
    text = "It has nine rooms; the last was built in 1850, and the key to it was lost at sea."
    tokens, held = len(first.tokens), []

    def work(between: Any) -> wk.Document:
        def watched(count: int) -> None:
            held.append(engine.held_bytes)
            between(count)

        return wk.read(llama, ChatLetters(), text, "snapkv:observe=4:kernel=3", 0.3, between=watched)

    job = engine.run_job(work, 5_000)
    assert engine.waiting == 1
    engine.step()
    document = job.future.result(0)
    assert len(first.tokens) - tokens == 3
    assert min(held) >= 5_000
    assert (
        document.ask("How many?", 4).tokens
        == wk.read(llama, ChatLetters(), text, "snapkv:observe=4:kernel=3", 0.3).ask("How many?", 4).tokens
    )
    drained(engine)
    assert engine.held_bytes == 0
    assert first.tokens == alone(llama, ids(60), 40, **SNAP)


def test_jobs_fail_alone_stop_and_are_refused(llama: PreTrainedModel) -> None:
    engine = Engine(llama, ChatLetters(), kv_memory=10**6, **SNAP)
    with pytest.raises(InputError, match=r"needs 1000001 bytes.*kv_memory is 1000000"):
        engine.run_job(lambda between: None, 10**6 + 1)
    failing = engine.run_job(lambda between: 1 / 0, 10)
    waiting = engine.run_job(lambda between: 1, 10)
    waiting.stop()

    def long(between: Any) -> None:
        between(1)
        stopping.stop()
        between(1)
        raise AssertionError("it went on")

    stopping = engine.run_job(long, 10)
    request = engine.submit(ids(40), SIX)
    drained(engine)
    assert isinstance(failing.future.exception(0), ZeroDivisionError)
    assert waiting.future.cancelled()
    assert isinstance(stopping.future.exception(0), StoppedError)
    assert request.tokens == alone(llama, ids(40), 6, **SNAP)
