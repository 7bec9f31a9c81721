"""The engine: what a request gets is what it would get alone, and what is held never passes the memory that was given."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import random
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import winnowkv as wk
from support.cases import CASES, Case
from support.models import TINY, hybrid, prompt
from support.profiles import PROFILES
from support.tokenizers import byte_tokenizer, word_tokenizer
from winnowkv.cache.reading import prefill
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Claim, Completion, Event, Request
from winnowkv.engine.sampling import Sampling

LENGTHS = (72, 45, 60, 91, 50, 72, 47)
NEW = (9, 4, 1, 7, 12, 2, 9)
BEGINS = ("full", "snapkv:observe=8", "dynamickv:observe=4", "cake:observe=4", "adakv:observe=4:f", "headkv:observe=4:k",
          "windowkv:observe=4", "winnow:observe=4:h")  # fmt: skip
CHOSEN = [case for case in CASES if str(case).startswith(BEGINS)]
SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 20}


def ids(tokens: int, seed: int = 0) -> list[int]:
    return prompt(tokens, seed)[0].tolist()


def alone(model: PreTrainedModel, tokens: Sequence[int], new: int, policy: str, budget: float, task: Any = None) -> list[int]:
    """The slow truth: one prompt in a compress block, and what the framework makes of it."""
    read = torch.tensor([list(tokens)])
    with wk.compress(model, policy, budget, task=task, tokenizer=word_tokenizer()):
        return model.generate(read, max_new_tokens=new, do_sample=False)[0, len(tokens) :].tolist()


def asked(engine: Engine, lengths: Sequence[int] = LENGTHS, new: Sequence[int] = NEW) -> list[list[int]]:
    """The tokens of all prompts at once."""
    samplings = [Sampling(max_new_tokens=count) for count in new]
    done = engine.generate([ids(tokens, row) for row, tokens in enumerate(lengths)], samplings)
    assert [one.prompt_tokens for one in done] == list(lengths)
    assert [one.error for one in done] == [None] * len(done)
    return [one.tokens for one in done]


@functools.cache
def speaker() -> PreTrainedModel:
    """A tiny model of bytes, so that there are characters of several tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {**TINY, "vocab_size": 257, "num_hidden_layers": 3, "eos_token_id": 200}
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.fixture
def talk() -> Engine:
    spoken = byte_tokenizer(bos=False)
    spoken.eos_token = "<s>"
    return Engine(copy.deepcopy(speaker()), spoken, "full", 1)


class Watch:
    """What is held at every moment that the engine tells of: between steps, and at each prompt's worst."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.waited, self.queued, self.peaks = 0, 0, 0, []
        step, read = Engine.step, Engine._prefilled

        def watched_step(engine: Engine) -> list[Event]:
            events = step(engine)
            self.most = max(self.most, engine.held_bytes)
            self.waited += engine._current is not None
            self.queued = max(self.queued, engine.waiting)
            return events

        def watched_read(engine: Engine, request: Request, cache: wk.CompactCache) -> torch.Tensor:
            before = engine._slots.held_bytes
            logits = read(engine, request, cache)
            self.most = max(self.most, before + cache.report.peak_bytes)
            self.peaks.append((cache.report.peak_bytes, request.claim.peak))
            return logits

        monkeypatch.setattr(Engine, "step", watched_step)
        monkeypatch.setattr(Engine, "_prefilled", watched_read)


def least(engine: Engine, lengths: Sequence[int] = LENGTHS, new: Sequence[int] = NEW) -> int:
    """The memory in which each of these requests just fits."""
    needed = 0
    for row, (tokens, count) in enumerate(zip(lengths, new, strict=True)):
        request = engine.submit(ids(tokens, row), Sampling(max_new_tokens=count))
        claim = request.claim
        needed = max(needed, claim.peak, engine._slots.bytes_alone(claim.entries, claim.room))
        engine.cancel(request)
    return needed


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_many_prompts_get_what_each_gets_alone(model: PreTrainedModel, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = [
        alone(model, ids(tokens, row), count, **case.settings)
        for row, (tokens, count) in enumerate(zip(LENGTHS, NEW, strict=True))
    ]
    for rows in (1, 3, 32):
        engine = Engine(model, word_tokenizer(), max_rows=rows, **case.settings)
        assert asked(engine) == truth
        assert (engine.waiting, engine.active, engine.held_bytes) == (0, 0, 0)
    watch = Watch(monkeypatch)
    for share in (1.0, 1.7):
        memory = int(share * least(engine))
        tight = Engine(model, word_tokenizer(), kv_memory=memory, **case.settings)
        assert asked(tight) == truth
        assert 0 < watch.most <= memory
        assert watch.queued > 2
        watch.most = watch.queued = 0
    assert all(peak <= claimed for peak, claimed in watch.peaks)


@pytest.mark.parametrize("spec", ["full", "snapkv:observe=4", "adakv:observe=4:kernel=3", "cake:observe=4"])
def test_models_with_sliding_windows(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = hybrid(), (72, 9, 33, 16, 15, 50)
    new = (24, 30, 3, 9, 20, 18)
    truth = [
        alone(model, ids(tokens, row), count, spec, 8) for row, (tokens, count) in enumerate(zip(lengths, new, strict=True))
    ]
    watch = Watch(monkeypatch)
    for rows in (3, 32):
        engine = Engine(model, word_tokenizer(), spec, 8, max_rows=rows)
        assert asked(engine, lengths, new) == truth
    watch.most, memory = 0, least(engine, lengths, new)
    assert asked(Engine(model, word_tokenizer(), spec, 8, kv_memory=memory), lengths, new) == truth
    assert 0 < watch.most <= memory


def test_greedy_is_what_generate_gives(model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = [5, 6]
    engine = Engine(model, word_tokenizer(), **SNAP)
    for seed in range(6):
        cache = wk.CompactCache(model, SNAP["policy"], SNAP["budget"])
        whole = model.generate(prompt(60, seed), past_key_values=cache, max_new_tokens=40, min_new_tokens=3, do_sample=False)
        (done,) = engine.generate([ids(60, seed)], Sampling(max_new_tokens=40, min_new_tokens=3))
        assert done.tokens == whole[0, 60:].tolist()
        assert done.finish_reason == ("stop" if len(done.tokens) < 40 else "length")


def test_draws_are_those_of_generate(llama: PreTrainedModel) -> None:
    how = {"temperature": 1.5, "top_p": 0.9, "top_k": 40}
    engine = Engine(llama, word_tokenizer(), **SNAP)
    for seed in range(3):
        cache = wk.CompactCache(llama, SNAP["policy"], SNAP["budget"])
        torch.manual_seed(seed)
        whole = llama.generate(prompt(60, seed), past_key_values=cache, max_new_tokens=20, do_sample=True, **how)
        (done,) = engine.generate([ids(60, seed)], Sampling(max_new_tokens=20, seed=seed, **how))
        assert done.tokens == whole[0, 60:].tolist()


def test_draws_are_the_same_whatever_decodes_beside_them(llama: PreTrainedModel) -> None:
    def how(seed: int | None) -> Sampling:
        return Sampling(max_new_tokens=10, temperature=1.2, top_p=0.95, seed=seed)

    engine = Engine(llama, word_tokenizer(), **SNAP)
    (single,) = engine.generate([ids(60)], how(4))
    beside = engine.generate([ids(50, 1), ids(60), ids(60), ids(60), ids(70, 2)], [how(1), how(4), how(4), how(5), how(None)])
    assert beside[1].tokens == beside[2].tokens == single.tokens != beside[3].tokens
    assert engine.generate([ids(60)], how(None))[0].tokens != engine.generate([ids(60)], how(None))[0].tokens


def test_layers_that_share_the_budget_wait_for_what_they_turn_out_to_need(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are as wide as the widest request of each layer: the third keeps more of one than was claimed."""
    watch = Watch(monkeypatch)
    spec, lengths, new = "dynamickv:observe=4:kernel=3:every=2:ceiling=2", (90, 80, 91, 85, 92, 70), (40,) * 6
    free = Engine(llama, word_tokenizer(), spec, 20)
    for row in range(2):
        free.submit(ids(lengths[row], row), Sampling(max_new_tokens=40))
        free.step()
    memory = free._slots.bytes_with([20] * 5, 39)  # room for the third as claimed, to the byte
    assert watch.waited == 0
    watch.most = 0
    found = asked(Engine(llama, word_tokenizer(), spec, 20, kv_memory=memory), lengths, new)
    assert watch.waited > 0
    assert watch.most <= memory
    assert found == asked(Engine(llama, word_tokenizer(), spec, 20), lengths, new)


def test_prompts_are_served_in_their_order(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    # The second is large: the small ones behind it would fit, and wait.
    lengths = (90, 400, 30, 30, 30)
    memory = engine.submit(ids(400), Sampling(max_new_tokens=8)).claim.peak
    engine = Engine(llama, word_tokenizer(), kv_memory=memory, **SNAP)
    requests = [engine.submit(ids(tokens, row), Sampling(max_new_tokens=8)) for row, tokens in enumerate(lengths)]
    firsts, held = [], []
    while engine.waiting or engine.active:
        firsts += [event.request for event in engine.step()]
        held.append(engine.active)
    assert list(dict.fromkeys(firsts)) == requests
    assert max(held[:7]) == 1  # the first alone, until it has ended
    assert max(held) == 3
    seconds = [request.completion.queue_seconds for request in requests]
    assert seconds == sorted(seconds)
    assert all(one.completion.queue_seconds < one.completion.first_token_seconds for one in requests)


def test_rows_of_requests_that_have_ended_make_room(llama: PreTrainedModel) -> None:
    """Buffers are not cut when a row leaves, but when a prompt needs the memory."""
    many = [Sampling(max_new_tokens=4)] * 7
    free = Engine(llama, word_tokenizer(), **SNAP)
    engine = Engine(llama, word_tokenizer(), kv_memory=free._slots.bytes_alone([20] * 5, 39) * 8, **SNAP)
    long = engine.submit(ids(60), Sampling(max_new_tokens=40))
    engine.generate([ids(60, seed) for seed in range(7)], many)
    held = engine.held_bytes
    assert long.completion is None
    engine.kv_memory = held + long.claim.peak - 1  # only without the rows that nobody needs
    engine.generate([ids(60)], many[0])
    assert long.completion is None
    assert engine.held_bytes < held


def test_a_request_that_can_never_fit_is_told_what_would_do(llama: PreTrainedModel) -> None:
    how = Sampling(max_new_tokens=40)
    with pytest.raises(
        wk.InputError, match=r"80 tokens with 40 new ones needs (\d+) bytes .* kv_memory is 1024: give"
    ) as found:
        Engine(llama, word_tokenizer(), kv_memory="1KiB", **SNAP).submit(ids(80), how)
    needed = int(str(found.value).split("kv_memory=")[1].split(" ")[0])
    with pytest.raises(wk.InputError, match=f"kv_memory={needed} or more, a smaller budget, or lower max_new_tokens"):
        Engine(llama, word_tokenizer(), kv_memory=needed - 1, **SNAP).submit(ids(80), how)
    engine = Engine(llama, word_tokenizer(), kv_memory=needed, **SNAP)
    assert engine.generate([ids(80)], how)[0].tokens == alone(llama, ids(80), 40, **SNAP)


def test_a_prompt_that_turns_out_too_large_ends_alone(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims that are too low, as those of a policy that is not ours may be."""
    claim = Engine._claim
    monkeypatch.setattr(Engine, "_claim", lambda self, tokens, *more: Claim(9, [4] * 5, claim(self, tokens, *more).room))
    free = Engine(llama, word_tokenizer(), **SNAP)
    memory = free._slots.bytes_alone([20] * 5, 4)
    engine = Engine(llama, word_tokenizer(), kv_memory=memory, **SNAP)
    done = engine.generate([ids(60), ids(60, 1)], [Sampling(max_new_tokens=n) for n in (6, 5)])
    assert (done[0].finish_reason, len(done[0].tokens)) == ("error", 1)
    assert f"kv_memory is {memory}: give kv_memory={free._slots.bytes_alone([20] * 5, 5)}" in str(done[0].error)
    assert done[1].tokens == alone(llama, ids(60, 1), 5, **SNAP)


@pytest.mark.parametrize(
    ("asked", "size"), [(4096, 4096), ("4096", 4096), ("4KiB", 4096), ("4 kb", 4000), ("1.5MiB", 3 * 2**19), ("2GB", 2 * 10**9)]
)
def test_memory_is_a_number_or_a_size(llama: PreTrainedModel, asked: int | str, size: int) -> None:
    assert Engine(llama, word_tokenizer(), kv_memory=asked, **SNAP).kv_memory == size


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kv_memory": 0}, wk.InputError, "kv_memory 0 is no size: write it as"),
        ({"kv_memory": "12XB"}, wk.InputError, "kv_memory '12XB' is no size"),
        ({"kv_memory": True}, wk.InputError, "kv_memory True is no size"),
        ({"kv_memory": -5}, wk.InputError, "kv_memory -5 is no size"),
        ({"max_rows": 0}, wk.InputError, "max_rows=0 must be a whole number of at least 1"),
        ({"prefill_ceiling": 100}, wk.InputError, "prefill_ceiling=100 is for .* give prefill_chunk, too"),
        ({"budget": 0}, wk.BudgetError, "keeps nothing"),
        ({"policy": "nothing"}, wk.PolicyError, "unknown"),
        ({"task": "chess"}, wk.PolicyError, "task 'chess' is unknown"),
    ],
)
def test_what_can_serve_no_prompt_is_refused_at_once(
    llama: PreTrainedModel, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Engine(llama, word_tokenizer(), **{**SNAP, **settings})


def test_prompts_that_cannot_be_read_are_refused(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    for given, message in (
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([1, 2, 128], "token 128 is unknown: the model has tokens 0 to 127"),
        ([-1], "token -1 is unknown"),
        (ids(1000), "1000 tokens, with 128 new ones it passes the model's 1024 positions: shorten it or lower max_new_tokens"),
        ([1.5], "not floats"),
        (7.5, "text, chat messages or token ids, not floats"),
        ([{"role": "user", "content": "w1"}], "no chat template: give the prompt as text"),
    ):
        with pytest.raises(wk.InputError, match=message):
            engine.submit(given)  # type: ignore[arg-type]
    with pytest.raises(wk.BudgetError, match="below sinks"):
        Engine(llama, word_tokenizer(), "snapkv:observe=8", 0.1).submit(ids(20))
    assert engine.waiting == 0
    with pytest.raises(wk.InputError, match=r"give \[prompt\]"):
        engine.generate("w1 w2")
    with pytest.raises(wk.InputError, match="2 samplings for 1 prompts"):
        engine.generate([[1]], [Sampling(), Sampling()])
    with pytest.raises(wk.InputError, match="is empty"):
        engine.generate([ids(30), []])
    assert engine.waiting == 0  # the first was not read


def test_prompts_as_text_messages_and_tokens(llama: PreTrainedModel) -> None:
    spoken = word_tokenizer()
    spoken.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    engine, text = Engine(llama, spoken, **SNAP), " ".join(f"w{n}" for n in ids(40))
    messages = [{"role": "user", "content": text}, {"role": "user", "content": "w3"}]
    tensor, raw, chat = engine.generate([prompt(40)[0], text, messages], Sampling(max_new_tokens=6))
    assert tensor.tokens == raw.tokens == alone(llama, ids(40), 6, **SNAP)
    assert chat.tokens == alone(llama, [*ids(40), 3, 9], 6, **SNAP)
    assert raw.text == spoken.decode(raw.tokens)
    spoken.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(wk.InputError, match="does not take these messages: only users speak"):
        engine.submit(messages)


def test_the_task_is_read_from_the_prompt_where_nobody_says(llama: PreTrainedModel) -> None:
    spec, budget = "windowkv:observe=4:window=4:top=2:group=2:sinks=2", 20
    engine = Engine(llama, word_tokenizer(), spec, budget)
    read = engine.submit(ids(60))
    assert read.task.probability is not None
    given = engine.submit(ids(60), task="aggregation")
    assert (given.task.task, given.task.probability) == ("aggregation", None)
    for request in (read, given):
        engine.cancel(request)
    (done,) = engine.generate([ids(60)], Sampling(max_new_tokens=8), task="aggregation")
    assert done.tokens == alone(llama, ids(60), 8, spec, budget, "aggregation")


def test_end_tokens_and_those_that_end_nothing(talk: Engine) -> None:
    assert talk.ends == {200, 0}  # the model's, and the tokenizer's
    prompts = [torch.randint(1, 257, (40,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(8)]
    hot = {"temperature": 3.0, "max_new_tokens": 300}
    done = talk.generate(prompts, [Sampling(seed=seed, **hot) for seed in range(8)])
    stopped = [one for one in done if one.finish_reason == "stop"]
    assert stopped
    for one in stopped:
        assert one.tokens[-1] in talk.ends
        assert not set(one.tokens[:-1]) & talk.ends
        assert one.text == talk.tokenizer.decode(one.tokens[:-1])
    ignored = talk.generate(prompts, [Sampling(seed=seed, ignore_eos=True, **hot) for seed in range(8)])
    assert [(len(one.tokens), one.finish_reason) for one in ignored] == [(300, "length")] * 8
    for one, other in zip(done, ignored, strict=True):
        assert one.tokens == other.tokens[: len(one.tokens)]
    late = talk.generate(prompts, [Sampling(seed=seed, min_new_tokens=150, **hot) for seed in range(8)])
    assert all(len(one.tokens) > 150 for one in late)


def test_pieces_make_the_text(talk: Engine) -> None:
    for seed in range(6):
        how = Sampling(temperature=1.5, seed=seed, max_new_tokens=80, logprobs=2)
        (whole,) = talk.generate(["Once upon"], how)
        events = list(talk.stream("Once upon", how))
        assert [event.token for event in events] == whole.tokens
        assert "".join(event.text for event in events) == whole.text == events[-1].finished.text
        assert [event.logprob for event in events] == whole.logprobs
        assert [event.finished for event in events[:-1]] == [None] * (len(events) - 1)
        assert whole.text == talk.tokenizer.decode([token for token in whole.tokens if token not in talk.ends])


def test_a_stop_string_ends_a_request_and_is_no_part_of_its_text(talk: Engine) -> None:
    how = {"temperature": 1.5, "seed": 0, "max_new_tokens": 60, "ignore_eos": True}
    (whole,) = talk.generate(["Once"], Sampling(**how))
    at = next(n for n in range(20, 50) if "\ufffd" not in whole.text[n : n + 3] and whole.text.find(whole.text[n : n + 3]) == n)
    stop = whole.text[at : at + 3]
    (done,) = talk.generate(["Once"], Sampling(stop=(stop, "never"), **how))
    assert (done.finish_reason, done.text) == ("stop", whole.text[:at])
    assert done.tokens == whole.tokens[: len(done.tokens)]
    assert talk.tokenizer.decode(done.tokens) == whole.text[: at + 3]
    assert "".join(event.text for event in talk.stream("Once", Sampling(stop=(stop,), **how))) == done.text
    (late,) = talk.generate(["Once"], Sampling(stop=(stop,), min_new_tokens=len(done.tokens), **how))
    assert len(late.tokens) > len(done.tokens)


def test_a_row_without_numbers_ends_alone(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_prompt_that_fails_ends_alone(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    read = Engine._prefilled

    def failing(self: Engine, request: Request, cache: wk.CompactCache) -> torch.Tensor:
        if len(request.prompt) == 61:
            raise wk.InputError("this one")
        return read(self, request, cache)

    monkeypatch.setattr(Engine, "_prefilled", failing)
    done = engine.generate([ids(60), ids(61), ids(60)], Sampling(max_new_tokens=5))
    assert [one.finish_reason for one in done] == ["length", "error", "length"]
    assert (str(done[1].error), done[1].tokens, done[1].text) == ("this one", [], "")
    assert done[0].error is done[2].error is None
    assert done[0].report is not done[2].report
    assert [one.report.prompt_tokens for one in done] == [[60], [], [60]]
    (event,) = list(engine.stream(ids(61)))
    assert (event.token, event.finished.finish_reason) == (None, "error")


@pytest.mark.parametrize("where", ["_prefilled", "step"])
def test_what_nobody_is_to_blame_for_is_raised_and_the_engine_goes_on(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine, count = Engine(llama, word_tokenizer(), **SNAP), itertools.count()
    target = engine if where == "_prefilled" else engine._slots
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
    failed = [1] if where == "_prefilled" else [0, 1]
    for row, request in enumerate(requests):
        assert request.completion.finish_reason == ("error" if row in failed else "length")
        assert request.tokens == (truth[row][: len(request.tokens)] if row in failed else truth[row])
    assert isinstance(requests[1].completion.error, MemoryError)
    assert engine.held_bytes == 0


def test_ctrl_c_cancels_what_is_left(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cancelled_requests_leave_at_once_and_nobody_notices(llama: PreTrainedModel) -> None:
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


def test_what_was_held_back_of_a_cancelled_request_never_comes(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    first, second = alone(llama, ids(60), 2, **SNAP)
    stream = engine.stream(ids(60), Sampling(stop=(f"w{second} and more",)))
    pieces = [next(stream) for _ in range(2)]
    stream.close()
    assert pieces[-1].request.completion.text == "".join(event.text for event in pieces) == f"w{first} "


@pytest.mark.parametrize("where", ["_prefilled", "step"])
def test_cancelled_while_the_model_works(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """From another thread, in the middle of a forward pass: neither call waits for the other, the row is free behind it."""
    engine = Engine(llama, word_tokenizer(), **SNAP)
    kept, gone = engine.submit(ids(60), Sampling(max_new_tokens=6)), engine.submit(ids(70), Sampling(max_new_tokens=6))
    target = engine if where == "_prefilled" else engine._slots
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


def test_threads_share_an_engine(llama: PreTrainedModel) -> None:
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


@pytest.mark.parametrize("spec", ["snapkv:observe=8:kernel=3", "expected:observe=4:samples=16", "full"])
def test_prompts_in_chunks(llama: PreTrainedModel, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, new = (200, 70, 150, 40), (6, 8, 4, 9)
    whole = asked(Engine(llama, word_tokenizer(), spec, 30), lengths, new)
    watch = Watch(monkeypatch)
    chunked = Engine(llama, word_tokenizer(), spec, 30, prefill_chunk=64)
    assert asked(chunked, lengths, new) == whole
    bounded = Engine(llama, word_tokenizer(), spec, 30, prefill_chunk=64, prefill_ceiling=50)
    memory, watch.most = least(bounded, lengths, new), 0
    found = asked(
        Engine(llama, word_tokenizer(), spec, 30, prefill_chunk=64, prefill_ceiling=50, kv_memory=memory), lengths, new
    )
    assert 0 < watch.most <= memory < least(chunked, lengths, new)
    assert all(peak <= claimed for peak, claimed in watch.peaks)
    assert [found[3], list(map(len, found))] == [whole[3], list(new)]  # the last is a chunk by itself
    with pytest.raises(wk.InputError, match="chunk=8 is too small"):
        Engine(llama, word_tokenizer(), spec, 30, prefill_chunk=8).submit(ids(70))


def test_warming_up_leaves_the_engine_empty(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps have tests of their own: here their shapes are counted."""
    engine = Engine(llama, word_tokenizer(), max_rows=9, **SNAP)
    sizes, step = [], engine._slots.step
    monkeypatch.setattr(engine._slots, "step", lambda tokens: sizes.append((len(tokens), engine.held_bytes)) or step(tokens))
    assert engine.warm_up(60, 10) > 0
    assert [rows for rows, _ in sizes] == [1, 2, 4, 8, 12]
    assert (engine.active, engine.held_bytes) == (0, 0)
    engine.kv_memory = 5 * sizes[0][1]
    sizes.clear()
    engine.warm_up(60, 10)
    assert [rows for rows, _ in sizes] == [1, 2, 4]
    assert max(held for _, held in sizes) <= engine.kv_memory
    engine._slots._flexible = True  # as compiled on the CPU: one row, and several
    sizes.clear()
    engine.warm_up(60, 10)
    assert sizes[0][0] == 1
    assert engine.kv_memory - sizes[0][1] < max(held for _, held in sizes) <= engine.kv_memory
    engine._slots._flexible, engine.kv_memory = False, None
    request = engine.submit(ids(60))
    engine.step()
    with pytest.raises(wk.CacheError, match="1 requests are placed"):
        engine.warm_up(60)
    engine.cancel(request)


def test_the_report_is_that_of_a_single_run(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    done = engine.generate([ids(60), ids(72, 1)], [Sampling(max_new_tokens=n) for n in (5, 1)])
    for one, (tokens, seed, steps) in zip(done, ((60, 0, 4), (72, 1, 0)), strict=True):
        cache = wk.CompactCache(llama, SNAP["policy"], SNAP["budget"])
        prefill(llama, prompt(tokens, seed), cache)
        for name in (
            "policy",
            "budget",
            "prompt_tokens",
            "kept_entries",
            "kept_bytes",
            "full_bytes",
            "held_bytes",
            "peak_bytes",
        ):
            assert getattr(one.report, name) == getattr(cache.report, name), name
        assert (one.report.decode_tokens, one.report.decode_entries) == (steps, steps)
        assert (one.report.decode_seconds > 0) == (steps > 0)


def test_quantized_caches_go_on_as_alone(llama: PreTrainedModel) -> None:
    pytest.importorskip("optimum.quanto")
    spec = "snapkv:observe=8:kernel=3:quantize=int8"
    truth = [alone(llama, ids(tokens, row), 6, spec, 20) for row, tokens in enumerate((60, 72))]
    assert asked(Engine(llama, word_tokenizer(), spec, 20), (60, 72), (6, 6)) == truth


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


def test_the_model_is_as_it_was_once_the_engine_is_gone(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    engine = Engine(llama, word_tokenizer(), **SNAP)
    engine.generate([ids(60)], Sampling(max_new_tokens=3))
    assert llama.config._attn_implementation != before
    plain = llama.generate(prompt(40), max_new_tokens=5, do_sample=False)
    del engine
    gc.collect()
    assert llama.config._attn_implementation == before
    assert torch.equal(llama.generate(prompt(40), max_new_tokens=5, do_sample=False), plain)


def test_profiles_lie_where_the_cases_look() -> None:
    assert any(PROFILES in case.spec for case in CHOSEN)
    assert len({case.name for case in CHOSEN}) == 8
