"""What an engine says of the tokens that a request's prompt kept: the same as of the prompt alone, once it is decided."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.engine import SNAP, ids
from support.tokenizers import word_tokenizer
from winnowkv.cache.kept import KeptTokens
from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Completion, Request
from winnowkv.engine.sampling import Sampling

LOOK = "snapkv:observe=8:kernel=3:lookahead=6:draft=4"


def ended(engine: Engine, *requests: Request) -> list[Completion]:
    """The completions of requests, all of them stepped to their end."""
    while any(one.completion is None for one in requests):
        engine.step()
    return [one.completion for one in requests if one.completion is not None]


def alone(model: PreTrainedModel, tokens: list[int], new: int, policy: str, budget: float) -> KeptTokens:
    """What generate() keeps of one prompt in a compress block."""
    with wk.compress(model, policy, budget) as run:
        model.generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False)
    return run.selection


def assert_equal(kept: KeptTokens | None, expected: KeptTokens) -> None:
    """Assert that both keep the same tokens of the same prompt."""
    assert kept is not None
    assert (kept.tokens, kept.heads, kept.ids) == (expected.tokens, expected.heads, expected.ids)
    for mine, theirs in zip(kept.positions, expected.positions, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.tolist() == theirs.tolist()


def test_a_request_that_asks_learns_what_was_kept(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    first = engine.submit(ids(72), Sampling(max_new_tokens=5), explain=True)
    quiet = engine.submit(ids(60, 1), Sampling(max_new_tokens=5))
    own = engine.submit(ids(50, 2), Sampling(max_new_tokens=1), policy="streaming", budget=12, explain=True)
    full = engine.submit(ids(40, 3), Sampling(max_new_tokens=2), policy="full", explain=True)
    done = ended(engine, first, quiet, own, full)
    assert_equal(done[0].kept, alone(llama, ids(72), 5, **SNAP))
    assert done[1].kept is None
    assert_equal(done[2].kept, alone(llama, ids(50, 2), 1, "streaming", 12))
    assert done[3].kept is not None
    assert done[3].kept.positions == (None,) * done[3].kept.layers


def test_what_is_kept_after_a_look_is_known_when_it_is_chosen(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), LOOK, 20)
    long = engine.submit(ids(72), Sampling(max_new_tokens=10), explain=True)
    short = engine.submit(ids(72), Sampling(max_new_tokens=3), explain=True)
    done = ended(engine, long, short)
    assert_equal(done[0].kept, alone(llama, ids(72), 10, LOOK, 20))
    assert done[0].kept is not None
    assert done[0].kept.kept_fraction < 0.5
    assert done[1].kept is None  # nothing was evicted for an answer that ends while it is looked at


def test_each_choice_that_looks_says_its_own(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), LOOK, 20)
    how = Sampling(max_new_tokens=12, n=3, temperature=1.5, seed=1)
    (done,) = ended(engine, engine.submit(ids(72), how, explain=True))
    kept = [one.kept for one in done.choices]
    assert all(one is not None and one.ids == tuple(ids(72)) for one in kept)
    told = {str([None if layer is None else layer.tolist() for layer in one.positions]) for one in kept if one is not None}
    assert len(told) > 1


def test_of_a_document_nothing_is_chosen(llama: PreTrainedModel) -> None:
    engine = Engine(llama, word_tokenizer(), **SNAP)
    document = wk.CompactCache(llama, **SNAP)
    llama(torch.tensor([ids(60)]), past_key_values=document, use_cache=True)
    with pytest.raises(wk.InputError, match=r"explain=True: what is kept of a document .* leave explain out"):
        engine.submit(ids(8, 1), after=document, explain=True)
