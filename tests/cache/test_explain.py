"""Why a token stayed or went: what is said agrees with what the cache holds, for every policy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.auto import profile_file
from support.batch import BATCH_LENGTHS, padded
from support.cases import QUANTIZED, Case
from support.chunks import CEILING, CHUNK, TOKENS
from support.models import PROMPT, hybrid, prompt
from support.profiles import PROFILES
from support.reference import generate, positions
from winnowkv.cache.reading import greedy, prefill
from winnowkv.models.curve import Curve

SCORED = {"sink", "shared by all layers", "score", "its span", "evicted"}
Table = list[list[list[wk.Explanation]]]  # by layer, token and head


def cache_of(model: PreTrainedModel, spec: str, budget: Any = 20, tokens: int = PROMPT, **options: Any) -> wk.CompactCache:
    """The cache of a prompt of its own, its scores kept."""
    chunks = {name: options.pop(name) for name in ("chunk", "ceiling") if name in options}
    cache = wk.CompactCache(model, spec, budget, keep_scores=True, **options)
    prefill(model, prompt(tokens), cache, **chunks)
    return cache


def table(cache: wk.CompactCache, tokens: int = PROMPT, row: int = 0) -> Table:
    """All that can be explained of one prompt."""
    return [[cache.explain(layer, t, row) for t in range(tokens)] for layer in range(len(cache.compact_layers))]


def reasons(cache: wk.CompactCache, layer: int = 0, head: int = 0, tokens: int = PROMPT) -> list[str]:
    return [cache.explain(layer, token)[head].reason for token in range(tokens)]


def assert_close(mine: Table, theirs: Table) -> None:
    """Assert that two prompts are explained alike, scores to float32 precision."""
    for a, b in zip(flat(mine), flat(theirs), strict=True):
        assert [a.pop(name) for name in ("score", "threshold")] == [
            None if b[name] is None else pytest.approx(b[name], rel=1e-3, abs=1e-5) for name in ("score", "threshold")
        ]
        b = {name: value for name, value in b.items() if name in a}
        assert {**a, "rank": None} == {**b, "rank": None}
        assert (a["rank"] is None) == (b["rank"] is None)
        assert a["rank"] is None or abs(a["rank"] - b["rank"]) <= 2  # scores closer than float noise may change places


def flat(explained: Table) -> list[dict[str, Any]]:
    return [asdict(each) for layer in explained for token in layer for each in token]


def check(cache: wk.CompactCache, explained: Table, row: int = 0) -> None:
    """Assert that every explanation agrees with what is held, and with the others of its head."""
    parts, policy = cache._choices.selections[row].bound.parts, cache.compression.policy
    for layer, kept in enumerate(positions(cache, row)):
        for head in range(2):
            each = [token[head] for token in explained[layer]]
            assert [(one.layer, one.head, one.token) for one in each] == [(layer, head, t) for t in range(len(each))]
            held = range(len(each)) if kept is None else kept[head % len(kept)].tolist()
            assert [one.kept for one in each] == [one.token in held for one in each]
            check_head(each, parts.selector.sinks, shared=parts.shared is not None, spans_kept=policy.keeps_spans)


def check_head(each: list[wk.Explanation], sinks: int, *, shared: bool, spans_kept: bool) -> None:
    for one in each:
        assert one.kept == (one.reason not in ("evicted", "evicted between chunks"))
        assert (one.score is None) == (one.rank is None)
        assert one.score is None or one.reason in SCORED
        assert one.reason != "its span" or spans_kept
        assert one.reason != "shared by all layers" or shared
    if any(one.reason == "everything kept" for one in each):
        assert {one.reason for one in each} <= {"everything kept", "evicted between chunks"}
        return
    scored = sorted((one for one in each if one.rank is not None), key=lambda one: (-one.score, one.token))
    assert [one.rank for one in scored] == list(range(1, len(scored) + 1))
    assert {one.competing for one in each if one.reason != "evicted between chunks"} == {len(scored)}
    by_score = [one.score for one in each if one.reason == "score"]
    lowest = min(by_score, default=None)
    assert {one.threshold for one in each if one.reason != "evicted between chunks"} == {lowest}
    spans = [one.score for one in each if one.reason == "its span"]
    assert not spans or lowest is None or max(spans) <= lowest
    if not spans_kept and not shared:  # plain top-k
        assert all(one.score <= lowest for one in scored if one.reason == "evicted" and lowest is not None)
    left = [one for one in each if one.reason != "evicted between chunks"]
    assert {one.reason for one in left[:sinks]} <= {"sink"}
    assert "sink" not in {one.reason for one in left[sinks:]}
    recent = [one.reason == "recent window" for one in left]
    assert recent == sorted(recent), "the recent window is not at the end"


# Every policy


def test_what_is_explained_agrees_with_what_is_held(llama: PreTrainedModel, case: Case) -> None:
    cache = cache_of(llama, case.spec, case.budget, task=case.task)
    explained = table(cache)
    check(cache, explained)
    policy, prompt_info = cache.compression.policy, cache._choices.selections[0].bound.prompt
    if case.name == "full":
        assert {one["reason"] for one in flat(explained)} == {"everything kept"}
        return
    window = min(policy.observation_window(prompt_info), 1 if "expected" in case.spec or case.name == "winnow" else PROMPT)
    for layer in explained:
        assert {one.reason for token in layer[PROMPT - window :] for one in token} <= {"recent window", "everything kept"}
    assert "evicted" in {one["reason"] for one in flat(explained)}


def test_prompts_read_under_a_ceiling_are_explained_by_text_positions(llama: PreTrainedModel, case: Case) -> None:
    cache = cache_of(llama, case.spec, case.budget, TOKENS, task=case.task, chunk=CHUNK, ceiling=CEILING)
    explained = table(cache, TOKENS)
    check(cache, explained)
    for layer in explained:
        gone = [token for token, (one, other) in enumerate(layer) if one.reason == other.reason == "evicted between chunks"]
        assert len(gone) == TOKENS - CEILING - CHUNK
        assert gone == [one.token for one, _ in explained[0] if one.reason == "evicted between chunks"]
        assert min(gone) >= 4
        assert max(gone) < TOKENS - CHUNK


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_entries_are_explained_as_those_in_full_precision(llama: PreTrainedModel, case: Case) -> None:
    plain = wk.policy("full") if case.name in ("int8", "int4") else wk.policy(case.spec).stored_as(None)
    caches = [cache_of(llama, spec, case.budget, task=case.task) for spec in (case.spec, plain)]
    assert caches[0].report.quantize is not None
    assert caches[1].report.quantize is None
    assert table(caches[0]) == table(caches[1])
    check(caches[0], table(caches[0]))


# Some ways to read a prompt


SOME = [
    "snapkv:observe=4:kernel=3:sinks=2", "adakv:floor=0:of=snapkv:observe=4:sinks=2", "h2o:sinks=2",
    "chunkkv:chunk=4:of=snapkv:observe=4",
    f"winnow:observe=8:heads=6:longest=5:peak=0.6:least=6:profile={PROFILES}",
]  # fmt: skip


@pytest.mark.parametrize("spec", SOME)
def test_rows_of_a_padded_batch_are_explained_as_alone(llama: PreTrainedModel, spec: str) -> None:
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    cache = wk.CompactCache(llama, spec, 20, keep_scores=True)
    ids, mask = padded(rows)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        llama(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    for row, alone in enumerate(rows):
        single = wk.CompactCache(llama, spec, 20, keep_scores=True)
        prefill(llama, alone, single)
        explained = table(cache, BATCH_LENGTHS[row], row)
        check(cache, explained, row)
        assert_close(explained, table(single, BATCH_LENGTHS[row]))
    with pytest.raises(wk.InputError, match="token 57 is not there: give one from 0 to 56"):
        cache.explain(0, 57, 1)
    before = table(cache, 40, 1)
    cache.reorder_cache(torch.tensor([1, 1, 0]))  # beams change places in the cache, not in the batch that was read
    assert table(cache, 40, 1) == before


@pytest.mark.parametrize("spec", SOME)
def test_chunks_without_a_ceiling_are_explained_as_a_prompt_read_at_once(llama: PreTrainedModel, spec: str) -> None:
    chunked, whole = cache_of(llama, spec, 20, TOKENS, chunk=CHUNK), cache_of(llama, spec, 20, TOKENS)
    assert_close(table(chunked, TOKENS), table(whole, TOKENS))


@pytest.mark.parametrize("spec", SOME)
def test_a_replay_is_explained_as_a_live_prompt(llama: PreTrainedModel, spec: str) -> None:
    recorded = wk.CompactCache(llama, "full", 1, record=PROMPT)
    prefill(llama, prompt(PROMPT), recorded)
    assert_close(table(recorded.replay(spec, 20, keep_scores=True)), table(cache_of(llama, spec)))


@pytest.mark.parametrize("limit", [None, 64])
def test_steps_after_the_prompt_change_no_explanation(llama: PreTrainedModel, limit: int | None) -> None:
    cache = wk.CompactCache(llama, SOME[0], 20, keep_scores=True, decode_budget=limit)
    logits = prefill(llama, prompt(PROMPT), cache)
    before = table(cache)
    list(greedy(llama, cache, logits, 140))
    assert table(cache) == before
    check(cache, before)
    with pytest.raises(wk.InputError, match="token 72 is not there: give one from 0 to 71"):
        cache.explain(0, PROMPT)


@pytest.mark.parametrize(
    "spec", ["snapkv:observe=4", "expected:observe=4:samples=16", "windowkv:observe=4:window=4:top=2:group=2"]
)
def test_a_budget_that_the_prompt_asks_for_is_explained(llama: PreTrainedModel, spec: str, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    cache = cache_of(llama, spec, f"auto:0.7:{path}", task="localization")
    assert 0 < cache.report.kept_fraction < 1
    check(cache, table(cache))


def test_layers_are_counted_among_those_that_are_compressed() -> None:
    cache = cache_of(hybrid(), "snapkv:observe=4")
    check(cache, table(cache))
    with pytest.raises(wk.InputError, match="layer 2 is not there: give one from 0 to 1"):
        cache.explain(2, 0)


# Each reason where it must be given


def test_scores_ranks_and_threshold_equal_a_worked_example(llama: PreTrainedModel) -> None:
    """StreamingLLM scores a token by its position."""
    cache = cache_of(llama, "streaming:sinks=2", 12)
    explained = [cache.explain(3, token)[1] for token in range(PROMPT)]
    told = [(one.kept, one.reason, one.score, one.rank) for one in explained]
    assert told[:2] == [(True, "sink", 0.0, 72), (True, "sink", 1.0, 71)]
    assert told[2:62] == [(False, "evicted", float(at), 72 - at) for at in range(2, 62)]
    assert told[62:] == [(True, "score", float(at), 72 - at) for at in range(62, 72)]
    assert {(one.threshold, one.competing) for one in explained} == {(62.0, 72)}
    assert str(explained[62]) == "layer 3 head 1: kept, score (score 62, rank 10 of 72, lowest kept 62)"
    assert str(explained[9]) == "layer 3 head 1: went, evicted (score 9, rank 63 of 72, lowest kept 62)"
    whole = cache_of(llama, "full", 1)
    assert str(whole.explain(0, 5)[0]) == "layer 0 head 0: kept, everything kept"


@pytest.mark.parametrize(
    ("spec", "budget", "tokens"), [("full", 1, 72), ("snapkv:observe=4", 72, 72), ("snapkv:observe=8", 4, 8)]
)
def test_everything_is_kept_if_nothing_is_evicted(llama: PreTrainedModel, spec: str, budget: int, tokens: int) -> None:
    assert set(reasons(cache_of(llama, spec, budget, tokens), tokens=tokens)) == {"everything kept"}


def test_a_layer_that_keeps_all_says_so_beside_others_that_do_not(llama: PreTrainedModel) -> None:
    cache = cache_of(llama, "pyramidkv:observe=4:slope=20", 60)
    assert cache.report.kept_entries[0][0] == PROMPT > cache.report.kept_entries[0][4]
    assert set(reasons(cache, 0)) == {"everything kept"}
    assert "evicted" in reasons(cache, 4)


def test_sinks_and_recent_window_stay_whatever_they_score(llama: PreTrainedModel) -> None:
    cache = cache_of(llama, "snapkv:observe=4:sinks=3")
    told = reasons(cache)
    assert told[:3] == ["sink"] * 3
    assert told[-4:] == ["recent window"] * 4
    assert "sink" not in told[3:]
    assert told.count("recent window") == 4
    assert told.count("score") == 20 - 7
    assert cache.explain(0, PROMPT - 1)[0].score is None
    assert cache.explain(0, 0)[0].score is not None


def test_recent_tokens_that_have_a_share_of_the_budget_stay_as_recent_ones(llama: PreTrainedModel) -> None:
    """H2O scores them, too, but they do not compete."""
    cache = cache_of(llama, "h2o:recent=0.5:sinks=2", 20)
    told = reasons(cache)
    assert told[-10:] == ["recent window"] * 10
    assert [told.count(reason) for reason in ("sink", "score", "recent window")] == [2, 8, 10]
    assert cache.explain(0, 70)[0].rank is None
    assert cache.explain(0, 61)[0].competing == 62


def test_a_question_that_the_budget_cannot_hold_goes_without_a_score(llama: PreTrainedModel) -> None:
    """Expected's window shrinks to what the budget leaves; what is left of it does not compete."""
    cache = cache_of(llama, "expected:sinks=2:observe=32:samples=16", 12)
    told = reasons(cache)
    assert told[-10:] == ["recent window"] * 10
    assert set(told[2:-10]) == {"evicted"}
    assert cache.explain(0, 45)[0].score is None
    assert cache.explain(0, 30)[0].score is not None
    assert cache.explain(0, 30)[0].threshold is None


@pytest.mark.parametrize("profile", ["", f":profile={PROFILES}"], ids=["guessed heads", "profile"])
def test_sentences_are_shared_by_all_layers(llama: PreTrainedModel, profile: str) -> None:
    cache = cache_of(llama, f"winnow:observe=4:heads=3:sinks=2:samples=16:least=4{profile}", 30)
    shared = [[one.token for token in layer for one in token if one.reason == "shared by all layers"] for layer in table(cache)]
    assert len(shared[0]) == 2 * 7  # heads, and a quarter of the budget
    assert shared == shared[:1] * 5


@pytest.mark.parametrize(
    ("spec", "width"), [("windowkv:observe=4:window=4:top=2:group=2", 4), ("chunkkv:chunk=6:of=snapkv:observe=4", 6)]
)
def test_a_token_of_a_low_score_stays_with_its_span(llama: PreTrainedModel, spec: str, width: int) -> None:
    cache = cache_of(llama, spec, task="localization")
    for layer in table(cache):
        for head in range(2):
            each = [token[head] for token in layer]
            spans = [one for one in each if one.reason == "its span"]
            best = max(one.score for one in each if one.reason == "evicted")
            assert spans
            assert min(one.score for one in spans) < best  # by its own score the other would have stayed
            for one in spans:  # that fitted whole, or it stands beside tokens of the span that did not
                span = each[one.token - one.token % width :][:width]
                assert sum(other.kept for other in span) > 1 or len(spans) == 1


# What is refused


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((5, 0), "layer 5 is not there: give one from 0 to 4"),
        ((-1, 0), "layer -1 is not there"),
        ((0, PROMPT), "token 72 is not there: give one from 0 to 71"),
        ((0, -1), "token -1 is not there"),
        ((0, 0, 1), "row 1 is not there: give one from 0 to 0"),
        ((0, 0, -1), "row -1 is not there"),
    ],
)
def test_a_layer_token_or_row_that_is_not_there_is_refused(
    llama: PreTrainedModel, where: tuple[int, ...], message: str
) -> None:
    for spec in ("snapkv:observe=4", "full"):
        with pytest.raises(wk.InputError, match=message):
            cache_of(llama, spec).explain(*where)
    with pytest.raises(wk.InputError, match="token 200 is not there: give one from 0 to 199"):
        cache_of(llama, "full", 1, TOKENS, chunk=CHUNK, ceiling=CEILING).explain(0, TOKENS)


def test_without_scores_or_prompt_nothing_is_explained(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=4", 20)
    prefill(llama, prompt(PROMPT), cache)
    with pytest.raises(wk.CacheError, match="make the cache with keep_scores=True"):
        cache.explain(0, 0)
    cache = wk.CompactCache(llama, "snapkv:observe=4", 20, keep_scores=True)
    with pytest.raises(wk.CacheError, match="none was read into this cache yet"):
        cache.explain(0, 0)
    prefill(llama, prompt(PROMPT), cache)
    cache.explain(0, 0)
    cache.reset()
    with pytest.raises(wk.CacheError, match="none was read into this cache yet"):
        cache.explain(0, 0)


# compress blocks


def test_a_block_explains_its_latest_prompt(llama: PreTrainedModel) -> None:
    expected = [cache_of(llama, "snapkv:observe=4", tokens=tokens).explain(2, 10) for tokens in (PROMPT, 50)]
    with wk.compress(llama, "snapkv:observe=4", 20, keep_scores=True) as run:
        with pytest.raises(wk.CacheError, match="none was read in this compress block yet"):
            run.explain(2, 10)
        for tokens, alone in zip((PROMPT, 50), expected, strict=True):
            generate(llama, prompt(tokens), 3)
            assert run.explain(2, 10) == alone
        with pytest.raises(wk.InputError, match="token 50"):
            run.explain(0, 50)
        generate(llama, prompt(PROMPT), 8, num_beams=2)  # two rows that begin with the same prompt, which is read once
        assert_close([[run.explain(2, 10, 0)]], [[expected[0]]])
    assert run.explain(2, 10)[0].token == 10  # after the block as well
    with wk.compress(llama, "snapkv:observe=4", 20) as run:
        generate(llama, prompt(PROMPT), 3)
        with pytest.raises(wk.CacheError, match="open the block with keep_scores=True"):
            run.explain(2, 10)
