"""The engine: a request gets the tokens it would get alone, and what is held never exceeds the given memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import CASES, Case
from support.engine import LENGTHS, NEW, SNAP, Watch, alone, asked, ids, least
from support.models import hybrid, prompt
from support.profiles import PROFILES
from support.tokenizers import word_tokenizer
from winnowkv.cache.reading import prefill
from winnowkv.engine.admission import Admission
from winnowkv.engine.engine import Engine
from winnowkv.engine.sampling import Sampling

BEGINS = ("full", "snapkv:observe=8", "dynamickv:observe=4", "cake:observe=4", "adakv:floor=0:of=s", "headkv:observe=4:k",
          "windowkv:observe=4", "winnow:observe=4:h")  # fmt: skip
CHOSEN = [case for case in CASES if str(case).startswith(BEGINS)]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_every_prompt_gets_the_tokens_it_gets_alone(
    model: PreTrainedModel, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("spec", ["full", "snapkv:observe=4", "adakv:of=snapkv:observe=4:kernel=3", "cake:observe=4"])
def test_prompts_of_sliding_window_models_get_the_tokens_they_get_alone(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_greedy_tokens_equal_those_of_generate(model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = [5, 6]
    engine = Engine(model, word_tokenizer(), **SNAP)
    for seed in range(6):
        cache = wk.CompactCache(model, SNAP["policy"], SNAP["budget"])
        whole = model.generate(prompt(60, seed), past_key_values=cache, max_new_tokens=40, min_new_tokens=3, do_sample=False)
        (done,) = engine.generate([ids(60, seed)], Sampling(max_new_tokens=40, min_new_tokens=3))
        assert done.tokens == whole[0, 60:].tolist()
        assert done.finish_reason == ("stop" if len(done.tokens) < 40 else "length")


def test_sampled_tokens_equal_those_of_generate(llama: PreTrainedModel) -> None:
    how = {"temperature": 1.5, "top_p": 0.9, "top_k": 40}
    engine = Engine(llama, word_tokenizer(), **SNAP)
    for seed in range(3):
        cache = wk.CompactCache(llama, SNAP["policy"], SNAP["budget"])
        torch.manual_seed(seed)
        whole = llama.generate(prompt(60, seed), past_key_values=cache, max_new_tokens=20, do_sample=True, **how)
        (done,) = engine.generate([ids(60, seed)], Sampling(max_new_tokens=20, seed=seed, **how))
        assert done.tokens == whole[0, 60:].tolist()


def test_sampled_tokens_do_not_depend_on_other_requests(llama: PreTrainedModel) -> None:
    def how(seed: int | None) -> Sampling:
        return Sampling(max_new_tokens=10, temperature=1.2, top_p=0.95, seed=seed)

    engine = Engine(llama, word_tokenizer(), **SNAP)
    (single,) = engine.generate([ids(60)], how(4))
    beside = engine.generate([ids(50, 1), ids(60), ids(60), ids(60), ids(70, 2)], [how(1), how(4), how(4), how(5), how(None)])
    assert beside[1].tokens == beside[2].tokens == single.tokens != beside[3].tokens
    assert engine.generate([ids(60)], how(None))[0].tokens != engine.generate([ids(60)], how(None))[0].tokens


def test_a_prompt_whose_layers_need_more_than_claimed_waits(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_prompts_are_served_in_the_order_of_submission(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    # The second is large: the small ones after it would fit, and wait.
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


def test_finished_rows_are_freed_if_a_prompt_needs_the_memory(llama: PreTrainedModel) -> None:
    """Buffers are not cut when a row leaves, but when a prompt needs the memory."""
    many = [Sampling(max_new_tokens=4)] * 7
    free = Engine(llama, word_tokenizer(), **SNAP)
    engine = Engine(llama, word_tokenizer(), kv_memory=free._slots.bytes_alone([20] * 5, 39) * 8, **SNAP)
    long = engine.submit(ids(60), Sampling(max_new_tokens=40))
    engine.generate([ids(60, seed) for seed in range(7)], many)
    held = engine.held_bytes
    assert long.completion is None
    engine._admission.kv_memory = held + long.claim.peak - 1  # only without the rows of finished requests
    engine.generate([ids(60)], many[0])
    assert long.completion is None
    assert engine.held_bytes < held


def test_a_prompt_that_needs_more_than_claimed_and_does_not_fit_fails_alone(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims that are too low, as those of a policy that is not ours may be."""
    claim = Admission.claim
    monkeypatch.setattr(Admission, "claim", lambda *asked: replace(claim(*asked), peak=9, entries=[4] * 5))
    free = Engine(llama, word_tokenizer(), **SNAP)
    memory = free._slots.bytes_alone([20] * 5, 4)
    engine = Engine(llama, word_tokenizer(), kv_memory=memory, **SNAP)
    done = engine.generate([ids(60), ids(60, 1)], [Sampling(max_new_tokens=n) for n in (6, 5)])
    assert (done[0].finish_reason, len(done[0].tokens)) == ("error", 1)
    assert f"kv_memory is {memory}: give kv_memory={free._slots.bytes_alone([20] * 5, 5)}" in str(done[0].error)
    assert done[1].tokens == alone(llama, ids(60, 1), 5, **SNAP)


@pytest.mark.parametrize("spec", ["snapkv:observe=8:kernel=3", "expected:observe=4:samples=16", "full"])
def test_prompts_in_chunks_stay_within_the_memory(llama: PreTrainedModel, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    engine._admission.kv_memory = 5 * sizes[0][1]
    sizes.clear()
    engine.warm_up(60, 10)
    assert [rows for rows, _ in sizes] == [1, 2, 4]
    assert max(held for _, held in sizes) <= engine.kv_memory
    engine._slots._flexible = True  # as compiled on the CPU: one row, and several
    sizes.clear()
    engine.warm_up(60, 10)
    assert sizes[0][0] == 1
    assert engine.kv_memory - sizes[0][1] < max(held for _, held in sizes) <= engine.kv_memory
    engine._slots._flexible, engine._admission.kv_memory = False, None
    request = engine.submit(ids(60))
    engine.step()
    with pytest.raises(wk.CacheError, match="1 requests are placed"):
        engine.warm_up(60)
    engine.cancel(request)


def test_the_report_equals_that_of_a_single_run(llama: PreTrainedModel) -> None:
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


def test_quantized_caches_decode_as_alone(llama: PreTrainedModel) -> None:
    pytest.importorskip("optimum.quanto")
    spec = "snapkv:observe=8:kernel=3:quantize=int8"
    truth = [alone(llama, ids(tokens, row), 6, spec, 20) for row, tokens in enumerate((60, 72))]
    assert asked(Engine(llama, word_tokenizer(), spec, 20), (60, 72), (6, 6)) == truth


def test_the_chosen_cases_include_policies_with_profiles() -> None:
    assert any(PROFILES in case.spec for case in CHOSEN)
    assert len({case.name for case in CHOSEN}) == 8
