"""Laws 1 to 4 over drawn shapes: lengths of 1 to 300 tokens, any budget, four dtypes, batches, turns and chunks.

``WINNOW_EXAMPLES`` draws more than the usual few; ``make soak`` does.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

import winnowkv as wk
from support.batch import batch_logits, padded
from support.cases import CASES, EVICTING, Case
from support.looking import looking
from support.models import built, prompt
from support.reference import compact_logits, generate, positions, reference_logits, same_positions

EXAMPLES = int(os.environ.get("WINNOW_EXAMPLES", "15"))
LONGEST = 300
# The suite draws the same examples each time; a long run draws others with another seed.
FEW = {"derandomize": True} if "WINNOW_EXAMPLES" not in os.environ else {"print_blob": True}
DRAWN = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), **FEW)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

lengths = st.integers(1, LONGEST)
cases = st.sampled_from(CASES)
families = st.sampled_from(["llama", "qwen2"])
seeds = st.integers(0, 10**6)


@st.composite
def budgets(draw: st.DrawFn) -> int | float:
    """Budgets in both units, from tiny to everything."""
    return draw(st.one_of(st.integers(1, 320), st.floats(0.001, 1.0).map(lambda share: round(share, 4))))


def new_cache(model: object, case: Case, budget: int | float, tokens: Sequence[int]) -> wk.CompactCache | None:
    """A cache for prompts of these lengths; None if the budget is below what the policy must keep, which is refused."""
    policy, layers = wk.policy(case.spec), model.config.num_hidden_layers
    task = wk.TaskProfile.of(case.task)
    if isinstance(budget, int):
        least = (policy.minimum_budget(wk.PromptInfo(each, layers, each, task)) for each in tokens)
        if policy.evicts and any(min(budget, each) < low for low, each in zip(least, tokens, strict=True)):
            return None
    return wk.CompactCache(model, case.spec, budget, task=case.task)


@DRAWN
@given(families, cases, lengths, budgets(), st.lists(st.integers(1, 9), min_size=1, max_size=3), seeds)
def test_what_stays_is_valid_and_decoding_equals_masked_attention(
    family: str, case: Case, tokens: int, budget: int | float, turns: list[int], seed: int
) -> None:
    model = built(family)
    if (cache := new_cache(model, case, budget, [tokens])) is None:
        return
    ids, more = prompt(tokens, seed=seed), prompt(sum(turns), seed=seed + 1)
    logits = compact_logits(model, cache, ids, more.split(turns, 1))
    kept = positions(cache)
    check_positions(cache, kept, tokens)
    torch.testing.assert_close(logits, reference_logits(model, ids, more, kept), **CLOSE)


def check_positions(cache: wk.CompactCache, kept: Sequence[Tensor | None], tokens: int) -> None:
    """Unique, ascending, in range, and as many as the report says."""
    for layer, reported, stays in zip(cache.compact_layers, cache.report.kept_entries[0], kept, strict=True):
        if stays is None:
            assert reported == tokens
            continue
        rows = [[place for place in row if place >= 0] for row in stays.tolist()]
        assert all(a < b for row in rows for a, b in pairwise(row))
        assert all(0 <= place < tokens for row in rows for place in row)
        assert abs(sum(map(len, rows)) / len(rows) - reported) < 1e-9
        assert layer.length >= max(map(len, rows))


@DRAWN
@given(cases, st.lists(lengths, min_size=2, max_size=4), budgets(), seeds)
def test_rows_of_a_padded_batch_equal_single_runs(case: Case, tokens: list[int], budget: int | float, seed: int) -> None:
    model = copy.deepcopy(built("llama")).double()  # or the order of sums would decide between scores that are all but equal
    if (cache := new_cache(model, case, budget, tokens)) is None:
        return
    rows = [prompt(each, seed=seed + row) for row, each in enumerate(tokens)]
    more = prompt(3 * len(rows), seed=seed + 9).view(len(rows), 3)
    logits = batch_logits(model, cache, *padded(rows), more)
    for row, ids in enumerate(rows):
        alone = wk.CompactCache(model, case.spec, budget, task=case.task)
        expected = compact_logits(model, alone, ids, more[row : row + 1].split([2, 1], 1))
        assert same_positions(positions(cache, row), positions(alone))
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@DRAWN
@given(cases, lengths, st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), budgets(), seeds)
def test_every_dtype_is_served(case: Case, tokens: int, dtype: torch.dtype, budget: int | float, seed: int) -> None:
    model = copy.deepcopy(built("llama")).to(dtype)
    if (cache := new_cache(model, case, budget, [tokens])) is None:
        return
    ids, more = prompt(tokens, seed=seed), prompt(4, seed=seed + 1)
    logits = compact_logits(model, cache, ids, more.split(1, 1))
    assert torch.isfinite(logits).all()
    check_positions(cache, positions(cache), tokens)
    assert all(layer.keys.dtype == dtype for layer in cache.compact_layers)
    whole = wk.CompactCache(model, case.spec, 1.0, task=case.task)
    with torch.no_grad():
        expected = model(torch.cat([ids, more], 1), use_cache=False).logits[0, tokens - 1 :]
    loose = {torch.bfloat16: 0.2, torch.float16: 0.03, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(compact_logits(model, whole, ids, more.split(1, 1)), expected, rtol=loose, atol=loose)


@DRAWN
@given(cases, st.integers(65, LONGEST), st.integers(64, 200), budgets(), seeds)
def test_chunks_change_nothing(case: Case, tokens: int, chunk: int, budget: int | float, seed: int) -> None:
    model, ids = built("llama"), prompt(tokens, seed=seed)
    if (cache := new_cache(model, case, budget, [tokens])) is None:
        return
    try:
        wk.prefill(model, ids, cache, chunk=chunk)
    except wk.InputError as error:
        assert "chunk" in str(error)  # noqa: PT017 - a window larger than the chunk is refused, with its name
        return
    once = wk.CompactCache(model, case.spec, budget, task=case.task)
    wk.prefill(model, ids, once)
    assert cache.report.kept_entries == once.report.kept_entries
    overlap = [
        len(set(a[0].tolist()) & set(b[0].tolist())) / len(set(b[0].tolist()))
        for a, b in zip(positions(cache), positions(once), strict=True)
        if a is not None and b is not None
    ]
    assert not overlap or min(overlap) > 0.9  # the order of sums decides between scores that are all but equal


@DRAWN
@given(
    st.sampled_from(EVICTING), st.lists(lengths, min_size=1, max_size=3), budgets(), st.integers(0, 5), st.integers(0, 4),
    st.integers(1, 2), st.booleans(), seeds,
)  # fmt: skip
def test_rows_that_look_say_first_what_the_full_cache_says_and_equal_single_runs(
    case: Case, tokens: list[int], budget: int | float, lookahead: int, draft: int, rounds: int, refit: bool, seed: int
) -> None:
    model = copy.deepcopy(built("llama")).double()
    options = f"lookahead={lookahead}:draft={draft}:rounds={rounds}:refit={refit}"
    seeing = looking(case, options)
    if (cache := new_cache(model, seeing, budget, tokens)) is None:
        return
    rows = [prompt(each, seed=seed + row) for row, each in enumerate(tokens)]
    ids, mask = padded(rows)
    answers = generate(model, ids, 9, attention_mask=mask, past_key_values=cache)
    assert cache.looking is None
    full = generate(model, ids, lookahead + 1, attention_mask=mask)
    assert [answer[: lookahead + 1] for answer in answers] == full
    for row, one in enumerate(rows):
        alone = wk.CompactCache(model, seeing.spec, budget, task=case.task)
        assert generate(model, one, 9, past_key_values=alone) == [answers[row]]
        assert same_positions(positions(cache, row), positions(alone))
        check_positions(alone, positions(alone), tokens[row])
