"""What an engine is given and what it answers: prompts, tasks, end tokens, stop strings, text in pieces."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import winnowkv as wk
from support.engine import SNAP, alone, ids
from support.models import TINY, prompt
from support.tokenizers import byte_tokenizer, word_tokenizer
from winnowkv.engine.engine import Engine
from winnowkv.engine.sampling import Sampling


@functools.cache
def speaker() -> PreTrainedModel:
    """A tiny model of bytes, so that there are characters of several tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {**TINY, "vocab_size": 257, "num_hidden_layers": 3, "eos_token_id": 200}
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.fixture
def talk() -> Engine:
    budget_text = byte_tokenizer(bos=False)
    budget_text.eos_token = "<s>"
    return Engine(copy.deepcopy(speaker()), budget_text, "full", 1)


def test_a_request_that_can_never_fit_is_refused_with_a_size_that_works(llama: PreTrainedModel) -> None:
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


@pytest.mark.parametrize(
    ("asked", "size"), [(4096, 4096), ("4096", 4096), ("4KiB", 4096), ("4 kb", 4000), ("1.5MiB", 3 * 2**19), ("2GB", 2 * 10**9)]
)
def test_memory_is_a_number_or_a_size(llama: PreTrainedModel, asked: int | str, size: int) -> None:
    assert Engine(llama, word_tokenizer(), kv_memory=asked, **SNAP).kv_memory == size


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kv_memory": 0}, wk.InputError, "kv_memory 0 is not a size: write it as"),
        ({"kv_memory": "12XB"}, wk.InputError, "kv_memory '12XB' is not a size"),
        ({"kv_memory": True}, wk.InputError, "kv_memory True is not a size"),
        ({"kv_memory": -5}, wk.InputError, "kv_memory -5 is not a size"),
        ({"max_rows": 0}, wk.InputError, "max_rows=0 must be a whole number of at least 1"),
        ({"prefill_ceiling": 100}, wk.InputError, "prefill_ceiling=100 limits .* give prefill_chunk, too"),
        ({"budget": 0}, wk.BudgetError, "keeps nothing"),
        ({"policy": "nothing"}, wk.PolicyError, "unknown"),
        ({"task": "chess"}, wk.PolicyError, "task 'chess' is unknown"),
    ],
)
def test_settings_that_serve_no_prompt_are_refused_at_once(
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
        Engine(llama, word_tokenizer(), "snapkv:observe=8", 5).submit(ids(20))
    assert engine.waiting == 0
    with pytest.raises(wk.InputError, match=r"give \[prompt\]"):
        engine.generate("w1 w2")
    with pytest.raises(wk.InputError, match="2 samplings for 1 prompts"):
        engine.generate([[1]], [Sampling(), Sampling()])
    assert engine.waiting == 0


def test_a_refused_prompt_is_answered_with_its_error_and_the_others_as_alone(llama: PreTrainedModel) -> None:
    engine, how = Engine(llama, word_tokenizer(), **SNAP), Sampling(max_new_tokens=5)
    given = [ids(30), [], ids(1020), [1, 200], ids(40, 1)]
    done = engine.generate(given, how)
    assert [one.finish_reason for one in done] == ["length", "error", "error", "error", "length"]
    for one, prompt_ids, says in zip(
        done[1:4], given[1:4], ("is empty", "1024 positions", "token 200 is unknown"), strict=True
    ):
        assert isinstance(one.error, wk.InputError)
        with pytest.raises(wk.InputError, match=says) as refused:
            engine.submit(prompt_ids, how)
        assert str(refused.value) == str(one.error)
        assert (one.tokens, one.text, one.prompt_tokens, one.queue_seconds) == ([], "", 0, None)
    assert [done[0].tokens, done[4].tokens] == [alone(llama, ids(30), 5, **SNAP), alone(llama, ids(40, 1), 5, **SNAP)]
    # A budget in entries that some prompts cannot have, more bytes than there are, more choices than rows.
    small = Engine(llama, word_tokenizer(), "snapkv:observe=8", 5, kv_memory="32KiB", max_rows=2)
    budget, memory, rows, fine = small.generate(
        [ids(20), ids(5), ids(5), ids(5)],
        [how, Sampling(max_new_tokens=900), Sampling(max_new_tokens=2, n=3, seed=1), Sampling(max_new_tokens=2)],
    )
    assert isinstance(budget.error, wk.BudgetError)
    assert "kv_memory is 32768" in str(memory.error)
    assert "n=3 choices decode together, and max_rows is 2: give Engine(max_rows=3), or a lower n" in str(rows.error)
    assert [(one.index, one.finish_reason) for one in rows.choices] == [(n, "error") for n in range(3)]
    assert (fine.finish_reason, small.held_bytes, small.waiting) == ("length", 0, 0)


def test_prompts_as_text_messages_and_tokens(llama: PreTrainedModel) -> None:
    budget_text = word_tokenizer()
    budget_text.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    engine, text = Engine(llama, budget_text, **SNAP), " ".join(f"w{n}" for n in ids(40))
    messages = [{"role": "user", "content": text}, {"role": "user", "content": "w3"}]
    tensor, raw, chat = engine.generate([prompt(40)[0], text, messages], Sampling(max_new_tokens=6))
    assert tensor.tokens == raw.tokens == alone(llama, ids(40), 6, **SNAP)
    assert chat.tokens == alone(llama, [*ids(40), 3, 9], 6, **SNAP)
    assert raw.text == budget_text.decode(raw.tokens)
    budget_text.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(wk.InputError, match="does not take these messages: only users speak"):
        engine.submit(messages)


def test_the_prompt_is_classified_if_no_task_is_given(llama: PreTrainedModel) -> None:
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


def test_end_tokens_stop_unless_ignored_or_too_early(talk: Engine) -> None:
    assert talk.end_tokens == {200, 0}  # the model's, and the tokenizer's
    prompts = [torch.randint(1, 257, (40,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(8)]
    hot = {"temperature": 3.0, "max_new_tokens": 300}
    done = talk.generate(prompts, [Sampling(seed=seed, **hot) for seed in range(8)])
    stopped = [one for one in done if one.finish_reason == "stop"]
    assert stopped
    for one in stopped:
        assert one.tokens[-1] in talk.end_tokens
        assert not set(one.tokens[:-1]) & talk.end_tokens
        assert one.text == talk.tokenizer.decode(one.tokens[:-1])
    ignored = talk.generate(prompts, [Sampling(seed=seed, ignore_eos=True, **hot) for seed in range(8)])
    assert [(len(one.tokens), one.finish_reason) for one in ignored] == [(300, "length")] * 8
    for one, other in zip(done, ignored, strict=True):
        assert one.tokens == other.tokens[: len(one.tokens)]
    late = talk.generate(prompts, [Sampling(seed=seed, min_new_tokens=150, **hot) for seed in range(8)])
    assert all(len(one.tokens) > 150 for one in late)


def test_streamed_pieces_add_up_to_the_text(talk: Engine) -> None:
    for seed in range(6):
        how = Sampling(temperature=1.5, seed=seed, max_new_tokens=80, logprobs=2)
        (whole,) = talk.generate(["Once upon"], how)
        events = list(talk.stream("Once upon", how))
        assert [event.token for event in events] == whole.tokens
        assert "".join(event.text for event in events) == whole.text == events[-1].finished.text
        assert [event.logprob for event in events] == whole.logprobs
        assert [event.finished for event in events[:-1]] == [None] * (len(events) - 1)
        assert whole.text == talk.tokenizer.decode([token for token in whole.tokens if token not in talk.end_tokens])


def test_a_stop_string_ends_a_request_and_is_not_in_its_text(talk: Engine) -> None:
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
