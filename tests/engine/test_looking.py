"""Requests whose policy looks: each gets the tokens it would get alone, in the memory that was given, and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.auto import profile_file
from support.engine import LENGTHS, Watch, alone, asked, ids, least
from support.models import WINDOW, hybrid
from support.tokenizers import word_tokenizer
from winnowkv.engine.engine import Engine
from winnowkv.engine.looking import Looker
from winnowkv.engine.sampling import Sampling
from winnowkv.models.curve import Curve

NEW = (29, 14, 1, 17, 32, 6, 19)  # some end while they look
LOOK = "snapkv:observe=8:kernel=3:lookahead=6"
BEST = LOOK + ":draft=5:refit=true"
SPECS = (
    LOOK, BEST, "snapkv:observe=8:kernel=3:refit=true", "snapkv:observe=8:kernel=3:draft=5",
    "snapkv:observe=8:kernel=3:lookahead=4:draft=5:rounds=2", "winnow:observe=4:lookahead=6:draft=4:refit=true",
    "adakv:of=snapkv:observe=8:kernel=3:lookahead=6:draft=5", "cake:observe=4:lookahead=5:draft=3",
)  # fmt: skip
SETTINGS: dict[str, Any] = {"policy": BEST, "budget": 20}


def each_alone(model: PreTrainedModel, spec: str, lengths: tuple[int, ...] = LENGTHS, new: tuple[int, ...] = NEW) -> Any:
    return [
        alone(model, ids(tokens, row), count, spec, 20) for row, (tokens, count) in enumerate(zip(lengths, new, strict=True))
    ]


def drain(engine: Engine) -> None:
    while engine.waiting or engine.active:
        engine.step()


@pytest.mark.parametrize("spec", SPECS)
def test_every_prompt_gets_the_tokens_it_gets_alone(model: PreTrainedModel, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = each_alone(model, spec)
    for rows in (1, 3, 32):
        engine = Engine(model, word_tokenizer(), spec, 20, max_rows=rows)
        assert asked(engine, LENGTHS, NEW) == truth
        assert (engine.waiting, engine.active, engine.held_bytes) == (0, 0, 0)
    watch = Watch(monkeypatch)
    for share in (1.0, 1.7, 3.0):
        memory = int(share * least(engine, LENGTHS, NEW))
        tight = Engine(model, word_tokenizer(), spec, 20, kv_memory=memory)
        watch.most = 0
        assert asked(tight, LENGTHS, NEW) == truth
        assert 0 < watch.most <= memory
        assert tight.held_bytes == 0
    assert watch.queued > 2
    assert all(peak <= claimed for peak, claimed in watch.peaks)
    assert watch.looked > 1 or "lookahead" not in spec


def test_what_is_looked_for_changes_what_stays(llama: PreTrainedModel) -> None:
    """Else the other tests could not fail."""
    lean = each_alone(llama, "snapkv:observe=8:kernel=3")
    found = [each_alone(llama, spec) for spec in SPECS[:4]]
    assert all(one != lean for one in found)
    assert found[0] != found[1]


def test_models_with_sliding_windows() -> None:
    model, lengths, new = hybrid(), (72, 9, 33, 16, 15, 50), (24, 30, 3, 9, 20, 18)
    assert max(new) > WINDOW
    for spec in (LOOK, BEST):
        truth = each_alone(model, spec, lengths, new)
        assert asked(Engine(model, word_tokenizer(), spec, 20), lengths, new) == truth


@pytest.mark.parametrize("ceiling", [None, 50])
def test_prompts_in_chunks(llama: PreTrainedModel, ceiling: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, new = (200, 70, 150, 40), (26, 18, 24, 19)
    how: dict[str, Any] = {"prefill_chunk": 64, "prefill_ceiling": ceiling}
    free = Engine(llama, word_tokenizer(), BEST, 20, **how)
    truth = asked(free, lengths, new)
    if ceiling is None:
        assert truth == each_alone(llama, BEST, lengths, new)
    watch, memory = Watch(monkeypatch), least(free, lengths, new)
    assert asked(Engine(llama, word_tokenizer(), BEST, 20, kv_memory=memory, **how), lengths, new) == truth
    assert 0 < watch.most <= memory
    assert all(peak <= claimed for peak, claimed in watch.peaks)


@pytest.mark.parametrize("spec", [LOOK, BEST, "snapkv:observe=8:kernel=3:draft=4"])
def test_each_choice_looks_at_its_own_tokens(llama: PreTrainedModel, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Sampling(n=3, temperature=2.0, seed=5, max_new_tokens=24, logprobs=1)
    free = Engine(llama, word_tokenizer(), spec, 20)
    truth = [Engine(llama, word_tokenizer(), spec, 20).generate([ids(60)], how.choice(index))[0] for index in range(3)]
    (lone,) = free.generate([ids(45, 1)], Sampling(max_new_tokens=20))
    several, beside = free.generate([ids(60), ids(45, 1)], [how, Sampling(max_new_tokens=20)])
    watch = Watch(monkeypatch)
    claim = free.submit(ids(60), how)
    memory = free._admission._alone(claim.claim, 3, free._slots)
    free.cancel(claim)
    (tight,) = Engine(llama, word_tokenizer(), spec, 20, kv_memory=memory).generate([ids(60)], how)
    assert watch.most <= memory
    assert watch.looked == 3
    assert len({tuple(one.tokens) for one in truth}) == 3
    for done in (several, tight):
        assert [one.tokens for one in done.choices] == [one.tokens for one in truth]
        for one, expected in zip(done.choices, truth, strict=True):
            for name in ("kept_entries", "lookahead_tokens", "draft_tokens", "refitted", "notes", "decode_tokens"):
                assert getattr(one.report, name) == getattr(expected.report, name), name
    assert beside.tokens == lone.tokens
    assert free.held_bytes == 0


def test_the_report_equals_that_of_a_single_run(llama: PreTrainedModel) -> None:
    spec = "snapkv:observe=8:kernel=3:lookahead=4:draft=5:rounds=2:refit=true"
    (done,) = Engine(llama, word_tokenizer(), spec, 20).generate([ids(60)], Sampling(max_new_tokens=12))
    with wk.compress(llama, spec, 20) as run:
        llama.generate(torch.tensor([ids(60)]), max_new_tokens=12, do_sample=False)
    for name in ("kept_entries", "kept_bytes", "peak_bytes", "lookahead_tokens", "draft_tokens", "refitted", "notes"):
        assert getattr(done.report, name) == getattr(run.report, name), name
    assert (done.report.lookahead_tokens, done.report.draft_tokens) == (4, 10)
    assert done.report.draft_seconds > 0


def test_budgets_that_the_prompt_decides(llama: PreTrainedModel, tmp_path: Path) -> None:
    budget = f"auto:0.7:{profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))}"
    truth = [alone(llama, ids(tokens, tokens), 20, LOOK + ":draft=5", budget) for tokens in (72, 60)]
    engine = Engine(llama, word_tokenizer(), LOOK + ":draft=5", budget)
    done = engine.generate([ids(tokens, tokens) for tokens in (72, 60)], Sampling(max_new_tokens=20))
    assert [one.tokens for one in done] == truth
    assert all(one.report.draft_tokens == 5 for one in done)


def test_prompts_of_which_nothing_goes_are_placed_at_once(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SETTINGS)
    request = engine.submit(ids(15), Sampling(max_new_tokens=20))
    engine.step()
    assert (engine._slots.rows, len(engine._scheduler._lookers)) == (1, 0)
    drain(engine)
    assert request.tokens == alone(llama, ids(15), 20, "full", 1)


def test_running_requests_do_not_wait_for_drafts(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), LOOK + ":draft=30", 20)
    first = engine.submit(ids(15), Sampling(max_new_tokens=60))  # too short to evict: it runs at once
    engine.step()
    others = [engine.submit(ids(60, seed), Sampling(max_new_tokens=20)) for seed in range(3)]
    drafting = 0
    for step in range(40):
        events = engine.step()
        assert [event.request for event in events].count(first) == 1
        drafting = max(drafting, len(engine._scheduler.drafts.running))
        if step < 6:
            assert others[0] in {event.request for event in events}  # its first tokens come at once
    assert drafting == 3
    drain(engine)
    assert [one.tokens for one in others] == [alone(llama, ids(60, seed), 20, LOOK + ":draft=30", 20) for seed in range(3)]


@pytest.mark.parametrize("steps", [3, 9])
def test_a_request_that_is_cancelled_while_it_looks_or_drafts_is_free_at_once(llama: PreTrainedModel, steps: int) -> None:
    engine = Engine(llama, word_tokenizer(), **SETTINGS)
    requests = [engine.submit(ids(60, seed), Sampling(max_new_tokens=20)) for seed in range(3)]
    for _ in range(steps):
        engine.step()
    lookers = engine._scheduler._lookers
    assert len(lookers) == 3
    assert len(engine._scheduler.drafts.running) == (0 if steps == 3 else 3)
    held = engine.held_bytes
    engine.cancel(requests[0])
    assert (engine.active, len(engine._scheduler._lookers)) == (2, 2)
    assert engine.held_bytes < 0.7 * held
    drain(engine)
    for seed in (1, 2):
        assert requests[seed].tokens == alone(llama, ids(60, seed), 20, **SETTINGS)
    assert requests[0].completion.finish_reason == "cancelled"
    assert engine.held_bytes == 0
    request = engine.submit(ids(60), Sampling(n=2, max_new_tokens=20))
    for _ in range(steps):
        engine.step()
    engine.cancel(request)
    assert (engine.active, engine.held_bytes) == (0, 0)


@pytest.mark.parametrize("where", ["_choose", "_drafted", "_settle"])
@pytest.mark.parametrize("error", [wk.InputError, MemoryError])
def test_a_looker_that_fails_ends_alone(
    llama: PreTrainedModel, where: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama, word_tokenizer(), **SETTINGS)
    before = getattr(engine._looking, where)

    def failing(looker: Looker, *more: Any) -> Any:
        if len(looker.row.request.prompt) == 61:
            raise error("this one")
        return before(looker, *more)

    monkeypatch.setattr(engine._looking, where, failing)
    requests = [engine.submit(ids(tokens), Sampling(max_new_tokens=20)) for tokens in (60, 61, 62)]
    raised = 0
    while engine.waiting or engine.active:
        try:
            engine.step()
        except MemoryError:
            raised += 1
    assert raised == (error is MemoryError)
    assert [one.completion.finish_reason for one in requests] == ["length", "error", "length"]
    assert str(requests[1].completion.error) == "this one"
    for one in (requests[0], requests[2]):
        assert one.tokens == alone(llama, one.prompt, 20, **SETTINGS)
    assert engine.held_bytes == 0


def test_an_error_of_the_drafts_pass_leaves_the_running_ones_alone(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama, word_tokenizer(), **SETTINGS)
    running = engine.submit(ids(15), Sampling(max_new_tokens=40))
    failed = [engine.submit(ids(60, seed), Sampling(max_new_tokens=20)) for seed in range(2)]
    while len(engine._scheduler.drafts.running) < 2:
        engine.step()
    later = engine.submit(ids(70), Sampling(max_new_tokens=20))
    engine.step()

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no more")

    monkeypatch.setattr(engine._scheduler.drafts._slots, "step", broken)
    with pytest.raises(MemoryError, match="no more"):
        engine.step()
    drain(engine)
    assert [one.completion.finish_reason for one in failed] == ["error", "error"]
    assert running.tokens == alone(llama, ids(15), 40, "full", 1)
    assert later.tokens == alone(llama, ids(70), 20, **SETTINGS)
    assert engine.held_bytes == 0


def test_those_that_look_share_a_forward_pass_and_an_error_of_it(llama: PreTrainedModel) -> None:
    engine, shapes = Engine(llama, word_tokenizer(), **SETTINGS), list[tuple[int, ...]]()
    running = engine.submit(ids(15), Sampling(max_new_tokens=40))
    failed = [engine.submit(ids(60, seed), Sampling(max_new_tokens=20)) for seed in range(3)]
    for _ in range(4):
        engine.step()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))
        if len(shapes) == 3:
            raise MemoryError("no more")

    hook = llama.register_forward_pre_hook(note, with_kwargs=True)
    engine.step()
    assert shapes == [(3, 1), (1, 1)]
    with pytest.raises(MemoryError, match="no more"):
        engine.step()
    hook.remove()
    assert [one.completion.finish_reason for one in failed] == ["error"] * 3
    assert engine._scheduler._lookers == []
    drain(engine)
    assert running.tokens == alone(llama, ids(15), 40, "full", 1)
    assert engine.held_bytes == 0


def test_an_error_of_the_decode_step_leaves_those_that_look_alone(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llama, word_tokenizer(), **SETTINGS)
    running = engine.submit(ids(15), Sampling(max_new_tokens=40))
    engine.step()
    looking = engine.submit(ids(60), Sampling(max_new_tokens=20))
    engine.step()

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no more")

    monkeypatch.setattr(engine._slots, "step", broken)
    with pytest.raises(MemoryError, match="no more"):
        engine.step()
    drain(engine)
    assert running.completion.finish_reason == "error"
    assert looking.tokens == alone(llama, ids(60), 20, **SETTINGS)


def test_a_request_that_can_never_look_is_served_lean_and_says_so(llama: PreTrainedModel) -> None:
    how = Sampling(max_new_tokens=20)
    free = Engine(llama, word_tokenizer(), **SETTINGS)
    needed = least(free, (60,), (20,))
    request = Engine(llama, word_tokenizer(), kv_memory=needed, **SETTINGS).submit(ids(60), how)
    assert request.claim.note is None
    tight = Engine(llama, word_tokenizer(), kv_memory=needed - 1, **SETTINGS)
    (done,) = tight.generate([ids(60)], how)
    assert done.tokens == alone(llama, ids(60), 20, "snapkv:observe=8:kernel=3", 20) != alone(llama, ids(60), 20, **SETTINGS)
    assert done.report.lookahead_tokens == done.report.draft_tokens == 0
    (note,) = done.report.notes
    assert f"{BEST}: while it looks, a prompt of 60 tokens needs {needed} bytes, kv_memory is {needed - 1}" in note
    assert note.endswith(f"without lookahead, draft and refit; give kv_memory={needed} or more")
    # A shorter one looks in the same engine, and choices count.
    assert tight.generate([ids(40)], how)[0].report.lookahead_tokens == 6
    (both,) = tight.generate([ids(40)], Sampling(max_new_tokens=20, n=2))
    assert "a prompt of 40 tokens for each of n=2 choices needs" in both.choices[1].report.notes[0]
    with pytest.raises(wk.InputError, match="a prompt of 1000 tokens with 20 new ones needs"):
        tight.submit(ids(1000), how)


def test_requests_wait_if_they_do_not_fit_now_and_answers_stay_the_same(llama: PreTrainedModel) -> None:
    lengths, new = (60,) * 5, (20,) * 5
    memory = int(2.5 * least(Engine(llama, word_tokenizer(), **SETTINGS), lengths, new))
    engine = Engine(llama, word_tokenizer(), kv_memory=memory, **SETTINGS)
    done = engine.generate([ids(60, seed) for seed in range(5)], Sampling(max_new_tokens=20))
    assert [one.report.notes for one in done] == [[]] * 5
    assert [one.tokens for one in done] == [alone(llama, ids(60, seed), 20, **SETTINGS) for seed in range(5)]


def test_sampled_tokens_do_not_depend_on_other_requests(llama: PreTrainedModel) -> None:
    def how(seed: int) -> Sampling:
        return Sampling(max_new_tokens=20, temperature=1.2, top_p=0.95, seed=seed)

    engine = Engine(llama, word_tokenizer(), **SETTINGS)
    (single,) = engine.generate([ids(60)], how(4))
    beside = engine.generate([ids(50, 1), ids(60), ids(60), ids(70, 2)], [how(1), how(4), how(5), how(4)])
    assert beside[1].tokens == single.tokens != beside[2].tokens
    cache = wk.CompactCache(llama, **SETTINGS)
    torch.manual_seed(4)
    whole = llama.generate(
        torch.tensor([ids(60)]), past_key_values=cache, max_new_tokens=20, do_sample=True, temperature=1.2, top_p=0.95, top_k=0
    )
    assert single.tokens == whole[0, 60:].tolist()
