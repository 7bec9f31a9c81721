"""What was kept of a prompt, as data: it agrees with what the cache holds and explains, for every policy; its files."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.batch import BATCH_LENGTHS, padded
from support.cases import Case
from support.chunks import CEILING, CHUNK, TOKENS
from support.models import PROMPT, hybrid, prompt
from support.reference import positions
from winnowkv.cache.kept import REASONS, KeptTokens
from winnowkv.cache.kept_file import LETTERS
from winnowkv.cache.reading import prefill

RAGGED = "adakv:floor=0:of=snapkv:observe=4:sinks=2"
SHARED = "windowkv:observe=4:window=4:top=2:group=2:sinks=2"


def cache_of(model: PreTrainedModel, spec: str, budget: Any = 20, tokens: int = PROMPT, **options: Any) -> wk.CompactCache:
    """The cache of a prompt of its own; its scores are kept unless told otherwise."""
    reading = {name: options.pop(name) for name in ("chunk", "ceiling", "hint") if name in options}
    cache = wk.CompactCache(model, spec, budget, **{"keep_scores": True, **options})
    prefill(model, prompt(tokens), cache, **reading)
    return cache


def assert_explains(kept: KeptTokens, cache: wk.CompactCache, row: int = 0) -> None:
    """Assert that what is said of all tokens at once is what ``explain`` says of each."""
    assert kept.reasons is not None
    assert kept.scores is not None
    assert kept.thresholds is not None
    for layer in range(kept.layers):
        stays = kept.kept_in(layer)
        for token in range(kept.tokens):
            for one in cache.explain(layer, token, row):
                reasons, scores, least = kept.reasons[layer], kept.scores[layer], kept.thresholds[layer]
                score = float(scores[one.head % len(scores), token])
                assert REASONS[int(reasons[one.head % len(reasons), token])] == one.reason
                assert bool(stays[one.head % len(stays), token]) == one.kept
                assert (None if math.isnan(score) else score) == one.score
                threshold = float(least[one.head % len(least)])
                if one.reason != "evicted between chunks":
                    assert (None if math.isnan(threshold) else threshold) == one.threshold


def assert_holds(kept: KeptTokens, cache: wk.CompactCache, row: int = 0) -> None:
    """Assert that the positions are those of the cache, and the counts those of the positions."""
    held = positions(cache, row)
    for mine, theirs, counts in zip(kept.positions, held, kept.entries, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None:
            assert counts == [kept.tokens] * kept.heads
            continue
        rows = [[at for at in each if at >= 0] for each in theirs.tolist()]
        assert [[at for at in each if at >= 0] for each in mine.tolist()] == rows
        assert counts == [len(each) for each in rows] * (kept.heads // len(rows))
    every = [torch.arange(kept.tokens)[None] if one is None else one for one in held]
    layers = [sum(bool((one == t).any()) for one in every) for t in range(kept.tokens)]
    heads = [sum(int((one == t).any(-1).sum()) * (kept.heads // len(one)) for one in every) for t in range(kept.tokens)]
    assert kept.layer_counts().tolist() == layers
    assert kept.head_counts().tolist() == heads


def same(a: KeptTokens, b: KeptTokens, digits: int | None = None) -> bool:
    """Whether both say the same, scores to so many digits."""
    plain = [(one.policy, one.budget, one.tokens, one.heads, one.ids) for one in (a, b)]
    if plain[0] != plain[1] or len(a.positions) != len(b.positions):
        return False
    near = {} if digits is None else {"rtol": 10.0**-digits, "atol": 0.0}
    for name in ("positions", "reasons", "scores", "thresholds"):
        mine, theirs = getattr(a, name), getattr(b, name)
        if (mine is None) != (theirs is None):
            return False
        for one, other in zip(mine or (), theirs or (), strict=True):
            if (one is None) != (other is None):
                return False
            if one is not None:
                exact = {} if near and one.is_floating_point() else {"rtol": 0.0, "atol": 0.0}
                torch.testing.assert_close(one, other, equal_nan=True, **{**near, **exact})
    return True


# Every policy


def test_what_is_said_of_all_tokens_is_what_the_cache_holds_and_explains(llama: PreTrainedModel, case: Case) -> None:
    cache = cache_of(llama, case.spec, case.budget, task=case.task)
    kept = KeptTokens.of(cache, prompt(PROMPT))
    assert (kept.tokens, kept.layers, kept.heads, kept.ids) == (PROMPT, 5, 2, tuple(prompt(PROMPT)[0].tolist()))
    assert_holds(kept, cache)
    assert_explains(kept, cache)
    assert sum(kept.reason_counts().values()) == PROMPT * 5 * 2
    assert kept.kept_fraction == pytest.approx(cache.report.kept_fraction) or cache.report.quantize is not None


@pytest.mark.parametrize("spec", ["full", RAGGED, SHARED, "h2o:sinks=2", "winnow:observe=4:heads=3:sinks=2:samples=16:least=4"])
def test_prompts_read_under_a_ceiling_are_described_by_text_positions(llama: PreTrainedModel, spec: str) -> None:
    cache = cache_of(llama, spec, 20, TOKENS, task="localization", chunk=CHUNK, ceiling=CEILING)
    kept = KeptTokens.of(cache)
    assert_holds(kept, cache)
    assert_explains(kept, cache)
    assert kept.reason_counts()["evicted between chunks"] == 5 * 2 * (TOKENS - CEILING - CHUNK)


@pytest.mark.parametrize("spec", [RAGGED, SHARED, "full"])
def test_without_scores_there_are_the_same_positions_alone(llama: PreTrainedModel, spec: str) -> None:
    with_scores, alone = (KeptTokens.of(cache_of(llama, spec, task="localization", keep_scores=k)) for k in (True, False))
    assert alone.reasons is alone.scores is alone.thresholds is None
    assert alone.reason_counts() == {}
    assert alone.entries == with_scores.entries
    assert alone.layer_counts().tolist() == with_scores.layer_counts().tolist()
    assert alone.head_counts().tolist() == with_scores.head_counts().tolist()


# Ways to read a prompt


@pytest.mark.parametrize("spec", ["snapkv:observe=4:sinks=2", RAGGED])
@pytest.mark.parametrize("keep_scores", [True, False])
def test_rows_of_a_batch_are_described_each_by_itself(llama: PreTrainedModel, spec: str, keep_scores: bool) -> None:
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    ids, mask = padded(rows)
    cache = wk.CompactCache(llama, spec, 20, keep_scores=keep_scores)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        llama(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    for row, tokens in enumerate(BATCH_LENGTHS):
        kept = KeptTokens.of(cache, rows[row], row)
        assert kept.tokens == tokens
        assert_holds(kept, cache, row)
        if keep_scores:
            assert_explains(kept, cache, row)
    with pytest.raises(wk.InputError, match="row 3 is not there: give one from 0 to 2"):
        KeptTokens.of(cache, row=3)
    with pytest.raises(wk.InputError, match=f"72 token ids were given, the prompt of row 1 has {BATCH_LENGTHS[1]}"):
        KeptTokens.of(cache, prompt(PROMPT), 1)


def test_beams_do_not_change_what_scores_belong_to(llama: PreTrainedModel) -> None:
    ids, mask = padded([prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)])
    cache = wk.CompactCache(llama, RAGGED, 20, keep_scores=True)
    with torch.no_grad():
        llama(input_ids=ids, attention_mask=mask, past_key_values=cache)
    before = KeptTokens.of(cache, row=1)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert same(KeptTokens.of(cache, row=1), before)


def test_layers_that_slide_are_not_counted() -> None:
    cache = cache_of(hybrid(), "snapkv:observe=4")
    kept = KeptTokens.of(cache)
    assert kept.layers == 2
    assert_holds(kept, cache)
    assert_explains(kept, cache)


def test_protected_spans_say_so(llama: PreTrainedModel) -> None:
    cache = cache_of(llama, "snapkv:observe=4:sinks=1", keep=[(10, 14)])
    kept = KeptTokens.of(cache)
    assert_explains(kept, cache)
    assert kept.reason_counts()["protected"] == 5 * 2 * 4


@pytest.mark.parametrize("spec", ["snapkv:observe=4", RAGGED, "full"])
def test_a_hint_that_was_taken_back_is_not_part_of_the_text(llama: PreTrainedModel, spec: str) -> None:
    cache = cache_of(llama, spec, 20, TOKENS, chunk=None, hint=8)
    kept = KeptTokens.of(cache, prompt(TOKENS)[:, :-8])
    assert kept.tokens == TOKENS - 8
    assert_holds(kept, cache)
    assert_explains(kept, cache)


def test_nothing_is_said_before_it_is_decided(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.CacheError, match="none was read into this cache"):
        KeptTokens.of(wk.CompactCache(llama, "snapkv", 20))
    cache = cache_of(llama, "snapkv:observe=4:lookahead=3")
    with pytest.raises(wk.CacheError, match="cannot be described before"):
        KeptTokens.of(cache)


# A compress block


def answer(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 6, **options: Any) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options)


@pytest.mark.parametrize("keep_scores", [True, False])
def test_a_run_describes_its_latest_prompt_when_the_cache_is_gone(llama: PreTrainedModel, keep_scores: bool) -> None:
    with wk.compress(llama, RAGGED, 20, keep_scores=keep_scores) as run:
        with pytest.raises(wk.CacheError, match="none was read in this compress block yet"):
            _ = run.selection
        answer(llama, prompt(30, seed=4))
        answer(llama, prompt(PROMPT))
        gc.collect()
        assert keep_scores or all(made() is None for made in run._caches)
        found = run.selection
    assert same(found, KeptTokens.of(cache_of(llama, RAGGED, keep_scores=keep_scores), prompt(PROMPT)))
    assert same(run.selection, found)  # and after the block


def test_what_is_noted_does_not_hold_the_cache(llama: PreTrainedModel) -> None:
    cache = cache_of(llama, RAGGED)
    kept, gone = KeptTokens.of(cache), weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert sum(map(sum, kept.entries)) == 20 * 5 * 2


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}])
def test_a_run_describes_each_row_of_a_batch(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    rows = [prompt(PROMPT), prompt(50, seed=1)]
    ids, mask = padded(rows)
    with wk.compress(llama, "snapkv:observe=4", 20) as run:
        llama.generate(ids, attention_mask=mask, max_new_tokens=3, **options)
    with pytest.raises(wk.InputError, match=r"a batch of 2 rows: take one of run\.selections"):
        _ = run.selection
    assert [kept.ids for kept in run.selections] == [tuple(row[0].tolist()) for row in rows]
    alone = [KeptTokens.of(cache_of(llama, "snapkv:observe=4", tokens=PROMPT, keep_scores=False), rows[0])]
    assert same(run.selections[0], alone[0])


def test_a_run_describes_what_a_lookahead_chose(llama: PreTrainedModel) -> None:
    spec = "snapkv:observe=4:lookahead=3:draft=2"
    with wk.compress(llama, spec, 20) as run:
        answer(llama, prompt(PROMPT), tokens=2)
        with pytest.raises(wk.CacheError, match="chooses once 4 tokens of its answer are there"):
            _ = run.selection
        answer(llama, prompt(PROMPT), tokens=8)
    assert run.selection.entries == [[20, 20]] * 5


def test_a_prompt_of_embeddings_has_no_ids(llama: PreTrainedModel) -> None:
    with wk.compress(llama, "snapkv:observe=4", 20) as run, torch.no_grad():
        llama(inputs_embeds=llama.get_input_embeddings()(prompt(PROMPT)))
    assert run.selection.ids is None
    assert run.selection.tokens == PROMPT


# Files


@pytest.mark.parametrize("spec", ["snapkv:observe=4:sinks=2", RAGGED, SHARED, "pyramidkv:observe=4:slope=20", "full"])
@pytest.mark.parametrize("keep_scores", [True, False])
def test_files_give_back_what_was_kept(llama: PreTrainedModel, spec: str, keep_scores: bool, tmp_path: Path) -> None:
    budget = 60 if "pyramid" in spec else 20
    kept = KeptTokens.of(cache_of(llama, spec, budget, task="localization", keep_scores=keep_scores), prompt(PROMPT))
    for name, digits in (("kept.json", 3), ("kept.safetensors", None)):
        kept.save(tmp_path / name)
        kept.save(tmp_path / name)  # a file that is there is replaced
        assert same(KeptTokens.load(tmp_path / name), kept, digits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "kept.safetensors"]


def test_the_json_file_is_plain_data(llama: PreTrainedModel, tmp_path: Path) -> None:
    """StreamingLLM keeps the first and the last, and scores a token by its position."""
    KeptTokens.of(cache_of(llama, "streaming:sinks=2", 12), prompt(PROMPT)).save(tmp_path / "kept.json")
    found = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    assert (found["policy"], found["budget"]) == ("streaming:sinks=2", 12)
    assert (found["tokens"], found["layers"], found["heads"]) == (PROMPT, 5, 2)
    assert found["positions"] == [[[0, 1, *range(62, 72)]]] * 5
    assert found["entries"] == [[12, 12]] * 5
    assert found["reasons"] == [["ss" + "." * 60 + "i" * 10]] * 5
    assert found["scores"] == [[[float(at) for at in range(PROMPT)]]] * 5
    assert found["thresholds"] == [[62.0]] * 5
    assert found["kept_fraction"] == pytest.approx(12 / PROMPT)
    assert found["letters"] == {letter: name for name, letter in LETTERS.items()}
    assert sorted(LETTERS) == sorted(REASONS)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("format", 2, "field format: input should be 1, not 2"),
        ("tokens", 71, "reasons of another number than 71 tokens"),
        ("layers", 6, "positions of 5 layers, there are 6"),
        ("heads", 0, "field heads: input should be greater than or equal to 1, not 0"),
        ("positions", [[[0, 1, 72]]] * 5, "layer 0: a position is none of 0 to 71"),
        ("positions", [[[0, 2**40]]] * 5, "layer 0: a position is none of 0 to 71"),
        ("positions", [None, [[1, 1]], None, None, None], "layer 1: positions are not ascending"),
        ("positions", [[[1], [1], [1]]] * 5, "layer 0: positions are of another kind, or of another number of heads"),
        ("reasons", [["?" * 72]] * 5, r"the letter '\?' stands for no reason"),
        ("scores", None, "scores, thresholds and reasons go together, and one of them is missing"),
        ("ids", [1, 2], "2 token ids of 72 tokens"),
        ("more", 1, "field more: extra inputs are not permitted"),
    ],
)
def test_a_json_file_that_does_not_fit_together_is_refused(
    llama: PreTrainedModel, tmp_path: Path, field: str, value: Any, fault: str
) -> None:
    file = tmp_path / "kept.json"
    found = {**KeptTokens.of(cache_of(llama, "streaming:sinks=2", 12), prompt(PROMPT)).to_dict(), field: value}
    file.write_text(json.dumps(found))
    with pytest.raises(wk.InputError, match=f"does not say what was kept of a prompt: {fault}"):
        KeptTokens.load(file)


def test_files_that_are_something_else_are_refused_in_one_sentence(llama: PreTrainedModel, tmp_path: Path) -> None:
    kept = KeptTokens.of(cache_of(llama, RAGGED), prompt(PROMPT))
    whole = tmp_path / "kept.safetensors"
    kept.save(whole)
    data = whole.read_bytes()
    for cut in (0, 4, 100, len(data) // 2, len(data) - 1):
        whole.write_bytes(data[:cut])
        with pytest.raises(wk.InputError, match="does not say what was kept"):
            KeptTokens.load(whole)
    for text in ("", "[]", "{}", "nan", '{"format": 1}'):
        (tmp_path / "kept.json").write_text(text)
        with pytest.raises(wk.InputError, match="does not say what was kept"):
            KeptTokens.load(tmp_path / "kept.json")
    with pytest.raises(wk.InputError, match=r"must end in \.json or \.safetensors"):
        kept.save(tmp_path / "kept.txt")
    with pytest.raises(wk.InputError, match="cannot be written"):
        kept.save(tmp_path / "none" / "kept.json")
    with pytest.raises(wk.InputError, match="cannot be read"):
        KeptTokens.load(tmp_path / "none.json")
