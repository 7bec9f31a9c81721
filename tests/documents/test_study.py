"""``wk.read(study=)``: a text is studied before its cache is compressed, once, whatever policy chooses."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import hybrid
from support.tokenizers import ChatLetters, Letters

TEXT = (
    "The archive of Oakham was founded in 1712.\nIts first keeper, Mary Lund, wrote the town's history. It has nine rooms; the "
    "last was built in 1850, and the key to it was lost at sea."
)
QUESTION = "Who wrote the history?"
SNAPKV = "snapkv:observe=4:kernel=3"
POLICIES = [
    SNAPKV, f"{SNAPKV}:quantize=int8", f"{SNAPKV}:refit=true", "adakv:floor=0:of=snapkv:observe=4", "tova", "h2o", "kvzip",
    "expected:observe=4:samples=16", "winnow:observe=context:samples=16", "chunkkv:chunk=4:of=snapkv:observe=4:kernel=3",
    "kvzip:plus=true", "kvzip:equal=true", "winnow:observe=context:samples=16:equal=true", "keydiff",
    "dynamickv:observe=4:every=2", "criticalkv:of=snapkv:observe=4",
]  # fmt: skip
BLIND = "winnow:observe=context:samples=16"
EQUAL = f"{BLIND}:equal=true"
SHORT = wk.Study(("again", "summary", "facts", "questions"), tokens=4)


def studied(model: PreTrainedModel, policy: str | None = SNAPKV, budget: Any = 0.3, **options: Any) -> wk.Document:
    options.setdefault("study", "lean")
    return wk.read(model, ChatLetters(), TEXT, policy, budget, **options)


def kept(doc: wk.Document) -> list[list[list[int]]]:
    """By layer and head, the positions that a document holds of its text."""
    layers = [layer.positions[0] for layer in doc.cache.compact_layers]
    return [[row[row >= 0].tolist() for row in layer] for layer in layers]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_its_budget_and_answers(model: PreTrainedModel, policy: str) -> None:
    doc = studied(model, policy, 40)
    assert sum(doc.report.kept_entries[0]) == 40 * len(doc.cache.compact_layers)
    assert doc.report.policy == wk.policy(policy).spec
    assert doc.cache.compression.policy == wk.policy(policy)
    answer = doc.ask(QUESTION, 6)
    assert doc.ask(QUESTION, 6).tokens == answer.tokens
    assert doc.turn_entries == 0


@pytest.mark.parametrize("policy", ["kvzip", "winnow:observe=context:samples=16", f"{SNAPKV}:refit=true"])
@pytest.mark.parametrize("study", ["lean", SHORT])
def test_chunks_of_the_first_reading_change_nothing(model: PreTrainedModel, policy: str, study: Any) -> None:
    if policy == "kvzip" and study is SHORT:
        return
    whole, chunked = (studied(model, policy, study=study, chunk=chunk) for chunk in (None, 64))
    assert kept(whole) == kept(chunked)
    assert whole.ask(QUESTION, 6).tokens == chunked.ask(QUESTION, 6).tokens


@pytest.mark.parametrize("policy", ["kvzip", "winnow:observe=context:samples=16"])
@pytest.mark.parametrize("family", ["llama", "hybrid"])
def test_with_the_whole_budget_it_answers_as_the_model_does(llama: PreTrainedModel, policy: str, family: str) -> None:
    model = llama if family == "llama" else hybrid()
    plain = wk.read(model, ChatLetters(), TEXT, "full", 1.0)
    assert (
        studied(model, policy, 1.0, study=None if policy == "kvzip" else SHORT).ask(QUESTION, 8).tokens
        == plain.ask(QUESTION, 8).tokens
    )


def test_it_changes_what_stays_and_more_sources_change_it_again(llama: PreTrainedModel) -> None:
    found = [kept(studied(llama, study=study)) for study in (None, "lean", SHORT, wk.Study(maximum=True))]
    assert all(one != other for at, one in enumerate(found) for other in found[:at])


def test_kvzip_studies_without_being_asked(llama: PreTrainedModel) -> None:
    assert kept(studied(llama, "kvzip", study=None)) == kept(studied(llama, "kvzip", study="lean"))
    assert studied(llama, SNAPKV, study=None).report.study_tokens == 0


def test_the_report_says_what_it_took_and_progress_how_far_it_is(llama: PreTrainedModel) -> None:
    told: list[tuple[int, int]] = []
    doc = studied(llama, study=SHORT, progress=lambda done, total: told.append((done, total)))
    text = len(doc.ids) - 3  # the template's <u> before it
    assert {total for _, total in told} == {text + 3 * 4}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == text + 3 * 4
    assert doc.report.study_tokens > told[-1][0]  # instructions, too
    assert doc.report.study_seconds > 0
    assert f"a study of {doc.report.study_tokens} tokens took" in str(doc.report)
    assert doc.report.to_dict()["study_tokens"] == doc.report.study_tokens


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("policy", [SNAPKV, "kvzip:plus=true"])
def test_an_interrupted_study_leaves_nothing_half_done(llama: PreTrainedModel, policy: str, at: int) -> None:
    """The model is as before, and reads the next text as if nothing had been."""
    before = {name: len(module._forward_pre_hooks) for name, module in llama.named_modules()}
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    study = wk.Study(chunk=40) if policy != SNAPKV else SHORT
    with pytest.raises(KeyboardInterrupt):
        studied(llama, policy, study=study, progress=interrupt)
    gc.collect()  # the traceback holds the cache
    assert {name: len(module._forward_pre_hooks) for name, module in llama.named_modules()} == before
    assert llama.config._attn_implementation == "sdpa"
    assert kept(studied(llama, policy)) == kept(studied(llama, policy))


def test_spans_that_are_protected_stay(llama: PreTrainedModel) -> None:
    for policy in (SNAPKV, "kvzip", BLIND, EQUAL):
        doc = studied(llama, policy, 60, keep=[(20, 40)], study=None if policy == "kvzip" else wk.Study(sentences=0.5))
        assert all(set(range(20, 40)) <= set(row) for layer in kept(doc) for row in layer)
        assert sum(doc.report.kept_entries[0]) == 60 * 5


def test_with_equal_numbers_all_heads_keep_the_same_sentences(llama: PreTrainedModel) -> None:
    """Half of the budget; the rest each head chooses by itself. Without the share, or where numbers may differ, nothing."""
    assert kept(studied(llama, BLIND, 80)) == kept(studied(llama, BLIND, 80, study=wk.Study(sentences=0.5)))
    for policy, share in ((EQUAL, 0.5), (EQUAL, 0.0), (BLIND, 0.5)):
        doc = studied(llama, policy, 80, study=wk.Study(sentences=share))
        rows = [set(row) for layer in kept(doc) for row in layer]
        common = set.intersection(*rows) - {0, 1, 2, 3}
        assert (len(common) >= 40) == (policy == EQUAL and share > 0)
        assert all(row - common for row in rows)


def test_forks_files_and_turns_are_as_those_of_any_document(llama: PreTrainedModel, tmp_path: Path) -> None:
    for policy in ("kvzip", f"{SNAPKV}:refit=true"):
        doc = studied(llama, policy)
        answer = doc.ask(QUESTION, 6).tokens
        assert doc.fork().ask(QUESTION, 6).tokens == answer
        doc.save(tmp_path / "doc", overwrite=True)
        opened = wk.open_document(tmp_path / "doc", llama, ChatLetters())
        assert opened.ask(QUESTION, 6).tokens == answer
        assert opened.report.study_tokens == doc.report.study_tokens
        doc.chat(QUESTION, 6)
        assert doc.turn_entries > 0


def test_a_small_decode_budget_evicts_nothing_of_a_study(llama: PreTrainedModel) -> None:
    assert kept(studied(llama, decode_budget=64)) == kept(studied(llama, decode_budget=None))
    assert all(layer.decode_budget == 64 for layer in studied(llama, decode_budget=64).cache.compact_layers)


def test_without_a_chat_template_the_text_is_read_again_as_it_is(llama: PreTrainedModel) -> None:
    doc = wk.read(llama, Letters(), TEXT, SNAPKV, 0.3, study="lean", chat=False)
    assert doc.report.study_tokens > len(doc.ids) == len(TEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hint": "Who?"}, "study: a hint tells what will be asked"),
        ({"chunk": 64, "ceiling": 96}, "study: a study needs the whole text, and a ceiling evicts before it"),
        ({"budget": "auto:0.9"}, "study: no curve tells what a study gives"),
        ({"policy": f"{SNAPKV}:lookahead=4"}, "study: snapkv:observe=4:lookahead=4:kernel=3: nothing is answered"),
        ({"policy": "full"}, "full keeps everything, so there is nothing to study"),
        ({"policy": "kvzip", "study": "full"}, "kvzip scores by the text read again, nothing else"),
        ({"study": "deep"}, "study='deep' must be one of lean, full"),
    ],
)
def test_what_cannot_go_with_a_study_is_refused_before_anything_is_read(
    llama: PreTrainedModel, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any, **given: Any) -> Any:
        raise AssertionError("something was read")

    monkeypatch.setattr(llama.model, "forward", read)
    with pytest.raises(wk.InputError, match=message):
        studied(llama, **options)


def test_a_text_too_long_for_its_study_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.InputError, match=r"study: 973 tokens of text leave 51 of the model's 1024 positions"):
        wk.read(llama, ChatLetters(), "a" * 970, SNAPKV, 0.3, study="lean")
    assert torch.is_inference_mode_enabled() is False


def test_a_text_is_not_chosen_from_by_one_answer(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.InputError, match="lookahead and draft choose by one answer: leave both out"):
        studied(llama, f"{SNAPKV}:lookahead=4", study=None)
