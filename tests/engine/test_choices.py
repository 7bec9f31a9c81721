"""Several choices of a prompt that is read once: each is what it is alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.engine import SNAP, Watch, alone, ids
from support.models import WINDOW, hybrid
from support.tokenizers import word_tokenizer
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Event
from winnowkv.engine.sampling import SEED_LIMIT, Sampling

HOT = {"temperature": 2.0, "seed": 5, "max_new_tokens": 12}


class Forwards:
    """The number of tokens of each forward pass of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens: list[tuple[int, ...]] = []
        hook = lambda _, args, kwargs: self.tokens.append(tuple((kwargs.get("input_ids", args and args[0])).shape))  # noqa: E731
        model.register_forward_pre_hook(hook, with_kwargs=True)


def each_alone(model: PreTrainedModel, prompt: list[int], how: Sampling, **settings: Any) -> list[wk.Completion]:
    """Every choice in an engine of its own."""
    return [Engine(model, word_tokenizer(), **settings).generate([prompt], how.choice(index))[0] for index in range(how.n)]


def same(one: wk.Completion, other: wk.Completion) -> bool:
    return (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)


@pytest.mark.parametrize("spec", ["snapkv:observe=4", "winnow:observe=4:samples=16", "adakv:of=snapkv:observe=4", "full"])
def test_each_choice_is_what_it_is_alone(model: PreTrainedModel, spec: str) -> None:
    how, settings = Sampling(n=4, logprobs=2, **HOT), {"policy": spec, "budget": 20}
    truth = each_alone(model, ids(60), how, **settings)
    other = Sampling(**{**HOT, "seed": 9})
    (lone,) = each_alone(model, ids(45, 1), other, **settings)
    several, beside = Engine(model, word_tokenizer(), **settings).generate([ids(60), ids(45, 1)], [how, other])
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert several.choices[0] is several
    assert len({tuple(one.tokens) for one in several.choices}) == 4
    for one, expected in zip(several.choices, truth, strict=True):
        assert same(one, expected)
        assert [entry.token for entry in one.logprobs] == one.tokens
        for mine, theirs in zip(one.logprobs, expected.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert one.report.kept_entries == expected.report.kept_entries
        assert one.report.decode_tokens == expected.report.decode_tokens
    assert same(beside, lone)
    assert beside.choices == (beside,)


def test_choices_of_sliding_window_models() -> None:
    sliding = hybrid()
    how, settings = Sampling(n=3, **HOT), {"policy": "snapkv:observe=4", "budget": 20}
    assert WINDOW < 60
    (done,) = Engine(sliding, word_tokenizer(), **settings).generate([ids(60)], how)
    assert all(map(same, done.choices, each_alone(sliding, ids(60), how, **settings)))


def test_the_prompt_is_read_once(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    seen = Forwards(llama)
    (done,) = engine.generate([ids(60)], Sampling(n=4, **HOT))
    assert [shape for shape in seen.tokens if shape[1] > 1] == [(1, 60)]
    assert seen.tokens[1:] == [(4, 1)] * 11
    assert len(done.choices) == 4


def test_greedy_choices_are_all_the_same(llama: PreTrainedModel) -> None:
    (done,) = Engine(llama, word_tokenizer(), **SNAP).generate([ids(60)], Sampling(n=3, max_new_tokens=6))
    assert [one.tokens for one in done.choices] == [alone(llama, ids(60), 6, **SNAP)] * 3


def test_each_choice_is_streamed_with_its_own_events(llama: PreTrainedModel) -> None:
    engine, how = Engine(llama, word_tokenizer(), **SNAP), Sampling(n=3, stop=("w7",), **HOT)
    events: dict[int, list[Event]] = defaultdict(list)
    for event in engine.stream(ids(60), how):
        events[event.index].append(event)
    assert sorted(events) == [0, 1, 2]
    for index, expected in enumerate(each_alone(llama, ids(60), how, **SNAP)):
        mine = events[index]
        assert [event.token for event in mine] == expected.tokens
        assert "".join(event.text for event in mine) == expected.text
        assert [event.finished for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert same(mine[-1].finished, expected)
        assert mine[-1].finished.index == index
    (request,) = {id(event.request): event.request for row in events.values() for event in row}.values()
    assert request.completion.choices[1:] == tuple(events[index][-1].finished for index in (1, 2))
    assert engine.held_bytes == 0


def test_choices_that_end_with_their_first_token_need_no_row(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    seen = Forwards(llama)
    (done,) = engine.generate([ids(60)], Sampling(n=3, **{**HOT, "max_new_tokens": 1}))
    assert [len(one.tokens) for one in done.choices] == [1, 1, 1]
    assert seen.tokens == [(1, 60)]
    stop = tuple(f"w{token}" for token in (done.tokens[0], done.choices[2].tokens[0]))
    how = Sampling(n=3, stop=stop, **HOT)
    (done,) = engine.generate([ids(60)], how)
    assert all(map(same, done.choices, each_alone(llama, ids(60), how, **SNAP)))
    assert engine.held_bytes == 0


@pytest.mark.parametrize("gone", [0, 2])
def test_one_choice_or_all_can_be_cancelled(llama: PreTrainedModel, gone: int) -> None:
    engine, how = Engine(llama, word_tokenizer(), **SNAP), Sampling(n=3, **HOT)
    truth = each_alone(llama, ids(60), how, **SNAP)
    request = engine.submit(ids(60), how)
    for _ in range(4):
        engine.step()
    assert (engine.active, engine._slots.rows) == (1, 3)
    engine.cancel(request, gone)
    assert (engine.active, engine._slots.rows, request.completion) == (1, 2, None)
    while engine.active:
        engine.step()
    for index, one in enumerate(request.completion.choices):
        if index == gone:
            assert one.finish_reason == "cancelled"
            assert one.tokens == truth[index].tokens[: len(one.tokens)] != []
        else:
            assert same(one, truth[index])
    with pytest.raises(wk.InputError, match="choice 3 is not there: the request has choices 0 to 2"):
        engine.cancel(request, 3)
    # All of them, in the queue, in their rows, and one in the queue.
    for steps in (0, 3):
        request = engine.submit(ids(60), how)
        for _ in range(steps):
            engine.step()
        engine.cancel(request)
        assert [one.finish_reason for one in request.completion.choices] == ["cancelled"] * 3
        assert (engine.active, engine.waiting, engine.held_bytes) == (0, 0, 0)
    request = engine.submit(ids(60), how)
    engine.cancel(request, gone)
    while engine.waiting or engine.active:
        engine.step()
    ended = request.completion.choices
    assert (ended[gone].finish_reason, ended[gone].tokens) == ("cancelled", [])
    assert all(same(ended[index], truth[index]) for index in range(3) if index != gone)


def test_admission_counts_a_row_for_each_choice(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Sampling(n=3, **HOT)
    free = Engine(llama, word_tokenizer(), **SNAP)
    truth = each_alone(llama, ids(60), how, **SNAP)
    needed = free._slots.bytes_alone([20] * 5, 11, 3)
    assert needed == 3 * free._slots.bytes_alone([20] * 5, 11)
    with pytest.raises(wk.InputError, match=rf"new ones for each of n=3 choices needs {needed} bytes .* or a lower n$"):
        Engine(llama, word_tokenizer(), kv_memory=needed - 1, **SNAP).submit(ids(60), how)
    engine, watch = Engine(llama, word_tokenizer(), kv_memory=needed, **SNAP), Watch(monkeypatch)
    one, other = engine.generate([ids(60), ids(60)], how)
    assert all(map(same, one.choices, truth))
    assert all(map(same, other.choices, truth))
    assert needed // 2 < watch.most <= needed
    assert engine.held_bytes == 0
    # Three rows of four are taken: the next prompt waits for two of them.
    rows = Engine(llama, word_tokenizer(), max_rows=4, **SNAP)
    first, second = rows.submit(ids(60), how), rows.submit(ids(60), Sampling(n=2, **HOT))
    for _ in range(3):
        rows.step()
    assert (rows.active, rows.waiting) == (1, 1)
    rows.cancel(first, 1)
    rows.step()
    assert (rows.active, rows.waiting, rows._slots.rows) == (2, 0, 4)
    while rows.active:
        rows.step()
    assert all(map(same, second.completion.choices, truth[:2]))


def test_seeds_of_choices_follow_each_other() -> None:
    how = Sampling(n=3, seed=7, temperature=1.0, max_new_tokens=4)
    assert [how.choice(index) for index in range(3)] == [
        Sampling(seed=seed, temperature=1.0, max_new_tokens=4) for seed in (7, 8, 9)
    ]
    assert Sampling(n=2).choice(1) == Sampling()
    assert Sampling(seed=3).choice(0) == Sampling(seed=3)
    assert Sampling(seed=SEED_LIMIT - 3, n=3).n == 3
    with pytest.raises(wk.InputError, match=r"below 2\*\*63, less 2 for the seeds of n=3 choices"):
        Sampling(seed=SEED_LIMIT - 2, n=3)
    for bad in (0, -1, 1.5, True):
        with pytest.raises(wk.InputError, match=f"n={bad} must be a whole number of at least 1"):
            Sampling(n=bad)  # type: ignore[arg-type]


def test_a_prompt_that_fails_ends_all_its_choices(llama: PreTrainedModel) -> None:
    llama.get_input_embeddings().weight.data[127] = float("nan")
    engine = Engine(llama, word_tokenizer(), **SNAP)
    good = [token % 126 + 1 for token in ids(60)]
    done, bad = engine.generate([good, [*good[:30], 127, *good[30:]]], Sampling(n=2, max_new_tokens=3))
    assert [one.finish_reason for one in done.choices] == ["length"] * 2
    assert [one.finish_reason for one in bad.choices] == ["error"] * 2
    assert "are not finite numbers" in str(bad.error)
    assert engine.held_bytes == 0


def test_draws_without_a_seed_differ(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    (done,) = Engine(llama, word_tokenizer(), **SNAP).generate([ids(60)], Sampling(n=4, temperature=2.0, max_new_tokens=12))
    assert len({tuple(one.tokens) for one in done.choices}) == 4
