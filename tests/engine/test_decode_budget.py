"""Requests with a decode budget: the tokens that each gets alone, flat memory within what was given, and true reports."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.engine import Watch, ids
from support.models import hybrid
from support.tokenizers import ChatLetters, word_tokenizer
from winnowkv.cache.forks import fork
from winnowkv.cache.generated import DECODE_BLOCK
from winnowkv.cache.reading import greedy
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Request
from winnowkv.engine.sampling import Sampling
from winnowkv.errors import BudgetError, InputError

SNAP, RAGGED = "snapkv:observe=8:kernel=3", "adakv:floor=0:of=snapkv:observe=8:kernel=3"
LOOK = SNAP + ":lookahead=6:draft=5:refit=true"
# prompt, new tokens, decode budget; 64 is the engine's
ASKED = ((60, 200, None), (40, 12, None), (72, 140, 70), (50, 20, 300))


def alone(model: PreTrainedModel, policy: str, tokens: list[int], new: int, limit: int | None) -> tuple[list[int], wk.Report]:
    read = torch.tensor([tokens])
    with wk.compress(model, policy, 20, decode_budget=limit, tokenizer=word_tokenizer()) as run:
        answer = model.generate(read, max_new_tokens=new, do_sample=False)[0, len(tokens) :].tolist()
    return answer, run.report


def submitted(engine: Engine) -> list[Request]:
    made = [
        engine.submit(ids(tokens, row), Sampling(max_new_tokens=new), decode_budget=limit)
        for row, (tokens, new, limit) in enumerate(ASKED)
    ]
    while engine.waiting or engine.active:
        engine.step()
    return made


@pytest.mark.parametrize("policy", [SNAP, RAGGED, LOOK])
def test_requests_get_the_tokens_of_their_own_caches(
    llama: PreTrainedModel, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = [alone(llama, policy, ids(tokens, row), new, limit or 64) for row, (tokens, new, limit) in enumerate(ASKED)]
    engine = Engine(llama, word_tokenizer(), policy, 20, decode_budget=64, max_rows=3)
    requests = submitted(engine)
    assert [one.tokens for one in requests] == [tokens for tokens, _ in truth]
    for request, (_, report) in zip(requests, truth, strict=True):
        assert request.completion is not None
        mine = request.completion.report
        assert (mine.decode_tokens, mine.decode_entries) == (report.decode_tokens, report.decode_entries)
    least = max(engine._admission._alone(one.claim, 1, engine._slots) for one in requests)
    watch = Watch(monkeypatch)
    # The longest of heads that differ in length is known when it is placed: it may need more than was claimed, and then waits.
    memory = int(2.5 * least) if policy == RAGGED else least
    tight = Engine(llama, word_tokenizer(), policy, 20, decode_budget=64, kv_memory=memory)
    assert [one.tokens for one in submitted(tight)] == [tokens for tokens, _ in truth]
    assert 0 < watch.most <= memory
    assert tight.held_bytes == 0
    assert watch.queued > 0
    assert all(peak <= claimed for peak, claimed in watch.peaks)


@pytest.mark.parametrize("policy", [SNAP, LOOK])
def test_choices_hold_the_decode_budget_each(llama: PreTrainedModel, policy: str) -> None:
    """What each takes of its own tokens is what a request alone takes of the same tokens."""
    sampling = Sampling(max_new_tokens=140, n=3, temperature=1.0, seed=5)
    engine = Engine(llama, word_tokenizer(), policy, 20, decode_budget=64)
    (done,) = engine.generate([ids(60)], sampling)
    single = Engine(llama, word_tokenizer(), policy, 20, decode_budget=64, max_rows=1)
    for index, choice in enumerate(done.choices):
        (expected,) = single.generate([ids(60)], sampling.choice(index))
        assert choice.tokens == expected.tokens
        assert choice.report.decode_entries == 64 + (139 - 64 - DECODE_BLOCK) % DECODE_BLOCK
    assert len({tuple(choice.tokens) for choice in done.choices}) == 3


def test_memory_is_flat_and_less_is_claimed(llama: PreTrainedModel) -> None:
    long = Sampling(max_new_tokens=400)
    limited = Engine(llama, word_tokenizer(), SNAP, 20, decode_budget=64)
    plain = Engine(llama, word_tokenizer(), SNAP, 20)
    held: dict[Engine, set[int]] = {limited: set(), plain: set()}
    for engine, seen in held.items():
        request = engine.submit(ids(60), long)
        while request.completion is None:
            engine.step()
            seen.add(engine.held_bytes)
    assert len(held[limited] - {0}) == 1
    assert max(held[limited]) < max(held[plain]) / 1.8
    claims = [engine.submit(ids(60), long).claim for engine in (limited, plain)]
    assert [claim.room for claim in claims] == [64 + DECODE_BLOCK, 399]


@pytest.mark.parametrize(("kind", "own"), [("llama", 70), ("hybrid", None)])
def test_requests_go_on_from_a_document_within_its_budget(llama: PreTrainedModel, kind: str, own: int | None) -> None:
    """Its questions count as generated; the request's own budget comes first, then the document's."""
    model, tokenizer, new = hybrid() if kind == "hybrid" else llama, ChatLetters(), 100
    text = "The archive of Oakham was founded in 1712. Its first keeper wrote the history of the town."
    document = wk.read(model, tokenizer, text, SNAP, 0.3, decode_budget=90)
    engine = Engine(model, tokenizer, SNAP, 20, decode_budget=64)
    requests, expected = [], []
    for row, tokens in enumerate((20, 110, 300)):
        requests.append(engine.submit(ids(tokens, row), Sampling(max_new_tokens=new), after=document.cache, decode_budget=own))
        alone = fork(document.cache, own)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids(tokens, row)]), past_key_values=alone, use_cache=True).logits[:, -1]
        expected.append((list(greedy(model, alone, logits, new)), alone.compact_layers[0].generated))
    beside = engine.submit(ids(40), Sampling(max_new_tokens=20))
    while engine.waiting or engine.active:
        engine.step()
    for request, (tokens, held) in zip(requests, expected, strict=True):
        assert request.tokens == tokens
        assert request.completion is not None
        assert request.completion.report.decode_entries == held
    assert beside.completion is not None
    assert document.cache.decode_budget == 90


def test_what_cannot_be_served_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(BudgetError, match="decode budget 63 is below 64"):
        Engine(llama, word_tokenizer(), SNAP, 20, decode_budget=63)
    engine = Engine(llama, word_tokenizer(), SNAP, 20)
    with pytest.raises(BudgetError, match=r"decode budget 0\.5 is not a whole number"):
        engine.submit(ids(20), decode_budget=0.5)
    wide = SNAP + ":lookahead=60:draft=40"
    message = r"decode_budget=64 .* 100 tokens .*lookahead=60, draft=40.* give decode_budget=68 or more"
    with pytest.raises(InputError, match=message):
        engine.submit(ids(20), decode_budget=64, policy=wide)
    with pytest.raises(InputError, match=message):
        Engine(llama, word_tokenizer(), wide, 20, decode_budget=64)
    engine.submit(ids(20), decode_budget=68, policy=wide)
    assert engine.waiting == 1


def test_a_compiled_engine_warms_up_the_steps_that_its_rows_take(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that keep queries."""
    engine = Engine(llama, word_tokenizer(), SNAP, 20, decode_budget=64, compile=True, max_rows=2)
    slots = engine._slots
    slots._compiled, shapes = None, list[tuple[bool, bool]]()
    step = slots.step

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        logits = step(tokens)
        shapes.append((slots._listening, slots.layers[0].queries is not None))
        return logits

    monkeypatch.setattr(slots, "step", watched)
    engine.warm_up(60, 4000)
    assert set(shapes) == {(True, True)}
    assert slots.held_bytes == 0
    engine.generate([ids(60)], Sampling(max_new_tokens=20))
    assert set(shapes) == {(True, True)}
