"""After a failure of the model or of the memory nothing is held, and the engine goes on, at once or as soon as it can."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.engine import SNAP, alone, ids
from support.tokenizers import word_tokenizer
from winnowkv.engine import engine as module
from winnowkv.engine.engine import Engine
from winnowkv.engine.sampling import Sampling
from winnowkv.engine.slots import Slots

NEW = Sampling(max_new_tokens=6)


def failing_at(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, *numbers: int, error: type[Exception] = MemoryError
) -> None:
    """Calls of a method with these numbers, from 0, fail after what they do."""
    before, count = getattr(target, name), itertools.count()

    def failing(*args: Any, **more: Any) -> Any:
        done = before(*args, **more)
        if next(count) in numbers:
            raise error("no more")
        return done

    monkeypatch.setattr(target, name, failing)


def drained(engine: Engine) -> None:
    while engine.waiting or engine.active:
        engine.step()


def storages(kind: tuple[int, ...]) -> int:
    """Tensors of this size that are alive."""
    gc.collect()
    return sum(1 for one in gc.get_objects() if isinstance(one, torch.Tensor) and tuple(one.shape) == kind)


def test_an_engine_whose_recovery_fails_too_holds_nothing_and_tries_again(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama, word_tokenizer(), max_rows=2, **SNAP)
    failing_at(monkeypatch, Slots, "step", 1)
    requests = [engine.submit(ids(60, seed), NEW) for seed in range(4)]
    engine.step()
    assert engine.held_bytes > 0
    tries = itertools.count()

    def no_slots(*args: Any, **more: Any) -> Slots:
        if next(tries) < 2:
            raise MemoryError("not for slots either")
        return Slots(*args, **more)

    monkeypatch.setattr(module, "Slots", no_slots)
    with pytest.raises(MemoryError, match=r"^no more$") as found:
        engine.step()
    assert str(found.value.__context__) == "not for slots either"
    assert engine.held_bytes == 0
    assert (engine.active, engine.waiting) == (0, 2)
    with pytest.raises(MemoryError, match="not for slots either"):  # the next step tries again, and loses nobody
        engine.step()
    assert (engine.held_bytes, engine.active, engine.waiting) == (0, 0, 2)
    late = engine.submit(ids(50), NEW)
    drained(engine)
    assert [one.completion.finish_reason for one in requests] == ["error", "error", "length", "length"]
    assert [one.tokens for one in requests[2:]] == [alone(llama, ids(60, seed), 6, **SNAP) for seed in (2, 3)]
    assert late.tokens == alone(llama, ids(50), 6, **SNAP)
    assert engine.held_bytes == 0


@pytest.mark.parametrize("layer", [0, 3])
def test_memory_that_ends_while_slots_grow_frees_everything(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """Some layers are larger then, and some are not."""
    engine = Engine(llama, word_tokenizer(), **SNAP)
    requests = [engine.submit(ids(60, seed), NEW) for seed in range(3)]
    engine.step()
    failing_at(monkeypatch, engine._slots._each[layer], "resize", 0)
    with pytest.raises(MemoryError):
        engine.step()
    assert (engine.held_bytes, engine.active, engine.waiting) == (0, 0, 1)
    drained(engine)
    assert [one.completion.finish_reason for one in requests] == ["error", "error", "length"]
    assert requests[2].tokens == alone(llama, ids(60, 2), 6, **SNAP)


@pytest.mark.parametrize("error", [wk.InputError, RuntimeError])
def test_the_cache_of_a_prompt_that_failed_is_free(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Though its completion holds the error, and the error knows the frames that it came through."""
    engine = Engine(llama, word_tokenizer(), **SNAP)
    made: list[weakref.ref[wk.CompactCache]] = []
    begin = engine._scheduler.begin

    def watched(request: wk.Request, cache: wk.CompactCache) -> None:
        made.append(weakref.ref(cache))
        begin(request, cache)

    monkeypatch.setattr(engine._scheduler, "begin", watched)
    failing_at(monkeypatch, llama.lm_head, "forward", 0, error=error)
    request = engine.submit(ids(61), NEW)
    if error is RuntimeError:
        with pytest.raises(RuntimeError):
            engine.step()
    else:
        engine.step()
    assert request.completion.finish_reason == "error"
    gc.collect()
    assert made[0]() is None
    assert engine.held_bytes == 0
    assert engine.generate([ids(60)], NEW)[0].tokens == alone(llama, ids(60), 6, **SNAP)


def test_the_rows_of_a_step_that_failed_are_free(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    requests = [engine.submit(ids(60, seed), Sampling(max_new_tokens=40)) for seed in range(3)]
    for _ in range(4):
        engine.step()
    shape = tuple(engine._slots._each[0].keys.shape)
    assert storages(shape) >= 10
    failing_at(monkeypatch, llama.lm_head, "forward", 0, error=RuntimeError)
    with pytest.raises(RuntimeError):
        engine.step()
    assert [one.completion.finish_reason for one in requests] == ["error"] * 3
    assert storages(shape) == 0
    assert engine.held_bytes == 0


def test_a_failure_under_compiled_steps(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    engine._compile = engine._slots._static = engine._slots._flexible = True  # shapes of compiled steps, run eagerly
    failing_at(monkeypatch, Slots, "step", 1)
    monkeypatch.setattr(module, "Slots", lambda model, compile: (_ for _ in ()).throw(MemoryError("nor these")))
    request = engine.submit(ids(60), NEW)
    engine.step()
    with pytest.raises(MemoryError, match=r"^no more$"):
        engine.step()
    assert engine.held_bytes == 0
    assert request.completion.finish_reason == "error"
