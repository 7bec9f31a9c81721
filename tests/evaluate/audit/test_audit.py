"""The audit against a slow reference, prompts that fail, and prompt files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import EVICTING, Case
from support.models import tiny_model
from support.texts import TEXTS
from support.tokenizers import Letters
from winnowkv.cache.reading import greedy, prefill
from winnowkv.evaluate import settings as settings_module
from winnowkv.evaluate.audit import audit as auditor
from winnowkv.evaluate.audit.audit import Audit, AuditPrompt
from winnowkv.evaluate.audit.recommend import summarize
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.prompt.classifier import task_profile
from winnowkv.prompt.structure import read_structure

BROKEN = ord("~")  # a token that no text but a broken one holds


def asked(*policies: str, budgets: tuple[int | float, ...] = (24,), texts: list[str] = TEXTS, **more: Any) -> Audit:
    prompts = [AuditPrompt(f"p{number}", text) for number, text in enumerate(texts)]
    return Audit(prompts, policies, budgets, chat=False, **{"max_new_tokens": 12, **more})


def go(
    test: Audit, model: PreTrainedModel, folder: Any, told: Callable[[str], None] = lambda what: None
) -> list[dict[str, Any]]:
    store = ResultStore(folder, test.config(model, "tiny", model.dtype), auditor.identity)
    try:
        auditor.run(test, model, Letters(), store, told)
        return store.lines
    finally:
        store.close()


def continuation(model: PreTrainedModel, ids: Tensor, limit: int) -> list[int]:
    cache = wk.CompactCache(model, "full", 1)
    return list(greedy(model, cache, prefill(model, ids, cache), limit))


@torch.no_grad()
def naive(model: PreTrainedModel, spec: str, budget: int | float, text: str, limit: int) -> dict[str, Any]:
    """One setting, one token at a time, by the plain cache, in float64."""
    ids = torch.tensor([[ord(letter) for letter in text]])
    tokens = continuation(model, ids, limit)
    task = replace(task_profile(text), structure=read_structure(Letters(), ids[0].tolist()))
    full, small = wk.CompactCache(model, "full", 1), wk.CompactCache(model, spec, budget, task=task)
    prefill(model, ids, full)
    logits = prefill(model, ids, small)
    same, kl = [], []
    for token, wanted in pairwise(tokens):
        p, q = (
            model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1].double().softmax(-1)
            for cache in (full, small)
        )
        same.append(int(q.argmax()) == wanted)
        kl.append(float((p * (p / q).log()).sum()))
    free = wk.CompactCache(model, spec, budget, task=task)
    logits = prefill(model, ids, free)
    later = same[3:], kl[3:]  # of the tokens after the fourth
    kl.sort()
    place = 0.99 * (len(kl) - 1)
    below = math.floor(place)
    return {
        "agreement": sum(same) / len(same),
        "kl_mean": sum(kl) / len(kl),
        "kl_p99": kl[below] + (place - below) * (kl[min(below + 1, len(kl) - 1)] - kl[below]),
        "agreement_after_4": sum(later[0]) / len(later[0]),
        "kl_after_4": sum(later[1]) / len(later[1]),
        "first_divergence": same.index(False) + 1 if False in same else None,
        "exact_match": list(greedy(model, free, logits, limit)) == tokens,
        "kept_bytes": free.report.kept_bytes,
        "lookahead_tokens": small.report.lookahead_tokens,
        "draft_tokens": small.report.draft_tokens,
    }


def test_every_policy_equals_the_slow_reference(llama: PreTrainedModel, case: Case, tmp_path: Any) -> None:
    lines = go(asked(case.spec, budgets=(case.budget, 0.7), texts=TEXTS[:1]), llama, tmp_path)
    for line in lines:
        expected = naive(llama, line["policy"], line["budget"], TEXTS[0], 12)
        assert line["failed"] is None
        assert line["compared_tokens"] == 11
        assert compared(line) == pytest.approx(expected, abs=1e-5)


LOOKING = (
    "snapkv:observe=8:lookahead=4",
    "snapkv:observe=8:lookahead=6:draft=5:refit=true",
    "adakv:of=snapkv:observe=8:draft=5:rounds=2",
    "snapkv:observe=8:lookahead=11",  # all 12 tokens but the last, which no cache reads
    "snapkv:observe=8:lookahead=10",
    "snapkv:observe=8",
)


def test_policies_that_look_at_the_answer_equal_the_slow_reference(llama: PreTrainedModel, tmp_path: Any) -> None:
    test = asked(*LOOKING, texts=TEXTS[:2])
    lines = go(test, llama, tmp_path)
    for line in lines:
        assert compared(line) == pytest.approx(naive(llama, line["policy"], 24, TEXTS[int(line["id"][1])], 12), abs=1e-5)
        assert line["whole"] is (line["policy"] == LOOKING[3])
    assert {line["draft_tokens"] for line in lines} == {0, 5, 10}
    assert any(line["agreement"] < 1 for line in lines if line["policy"] in LOOKING[:2])
    summary = summarize(lines, test.expected(), 0.5, {"dtype": "float32"})
    assert summary["after"] == 11
    assert {(g["prompts_after"], g["whole_answers"]) for g in summary["groups"]} == {(2, 0), (2, 2)}
    note = f"{LOOKING[3]} at 24 entries: 2 of 2 answers ended before anything was evicted, and count with the whole cache"
    assert [one for one in summary["notes"] if "ended before" in one] == [note]


def compared(line: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line that the slow reference knows."""
    agreement, kl = auditor.after(line, 4) or (None, None)
    names = (
        "agreement",
        "kl_mean",
        "kl_p99",
        "first_divergence",
        "exact_match",
        "kept_bytes",
        "lookahead_tokens",
        "draft_tokens",
    )
    return {**{name: line[name] for name in names}, "agreement_after_4": agreement, "kl_after_4": kl}


def test_settings_of_several_lengths_equal_the_slow_reference(llama: PreTrainedModel, tmp_path: Any, monkeypatch: Any) -> None:
    """Small blocks: the continuation is read in several passes."""
    monkeypatch.setattr(auditor, "LOGITS_AT_ONCE", 128 * 9)
    specs, budgets = ("snapkv:observe=8", "streaming:observe=8", "adakv:of=snapkv:observe=8", "full"), (12, 16, 40, 0.9)
    lines = go(asked(*specs, budgets=budgets, texts=TEXTS[:2]), llama, tmp_path)
    assert len(lines) == 2 * (3 * 4 + 1)
    agreements = set()
    for line in lines:
        text = TEXTS[int(line["id"][1])]
        expected = naive(llama, line["policy"], line["budget"], text, 12)
        assert compared(line) == pytest.approx(expected, abs=1e-5)
        agreements.add(line["agreement"])
    assert len(agreements) > 3  # else this test compares nothing


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_budget_above_the_prompt_changes_nothing(family: str, tmp_path: Any) -> None:
    specs = [case.spec for case in EVICTING]
    for line in go(asked(*specs, budgets=(200, 1.0), texts=TEXTS[:1]), tiny_model(family), tmp_path):
        assert line["agreement"] == 1 == line["full_agreement"]
        assert line["exact_match"] is True
        assert line["first_divergence"] is None
        assert 0 <= line["kl_mean"] <= line["kl_p99"] < 1e-6
        assert line["kept_bytes"] == line["full_bytes"]


def test_the_stop_token_ends_the_continuation_and_counts(llama: PreTrainedModel, tmp_path: Any) -> None:
    ids = torch.tensor([[ord(letter) for letter in TEXTS[0]]])
    tokens = continuation(llama, ids, 12)
    stop = next(token for at, token in enumerate(tokens) if at > 1 and token not in tokens[:at])
    place = tokens.index(stop)
    llama.generation_config.eos_token_id = stop
    (line,) = go(asked("full", texts=TEXTS[:1]), llama, tmp_path / "a")
    assert line["compared_tokens"] == place
    assert line["continuation"] == Letters().decode(tokens[:place])
    assert line["agreement"] == 1
    llama.generation_config.eos_token_id = tokens[0]
    test = asked("snapkv:observe=8", texts=TEXTS[:1])
    (line,) = go(test, llama, tmp_path / "b")
    assert line["compared_tokens"] == 0
    assert line["kept_bytes"] < line["full_bytes"]
    summary = summarize([line], test.expected(), 0.9, {"dtype": "float32"})
    (group,) = summary["groups"]
    assert (group["trivial"], group["prompts"], group["failed"]) == (1, 0, 0)
    assert "answered in one token" in " ".join(summary["notes"])
    assert "Nothing could be compared" in summary["recommendation"]["sentence"]


def test_finished_lines_are_never_computed_twice(llama: PreTrainedModel, tmp_path: Any, monkeypatch: Any) -> None:
    told: list[str] = []

    def stop_at_three(what: str) -> None:
        told.append(what)
        if len(told) == 3:
            raise KeyboardInterrupt

    test = asked("snapkv:observe=8", "streaming:observe=8", budgets=(24, 40), max_context=200)
    with pytest.raises(KeyboardInterrupt):
        go(test, llama, tmp_path, stop_at_three)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    calls = []
    real = settings_module.prefill
    monkeypatch.setattr(settings_module, "prefill", lambda *args: calls.append(1) or real(*args))
    told = [""] * 9
    lines = go(test, llama, tmp_path, told.append)
    assert len(calls) == 3  # the interrupted prompt lacked one setting
    assert told[9:] == ["done before"] * 3 + ["p0"] + ["p1"] * 4 + ["p2"] * 4
    assert len({auditor.identity(line) for line in lines}) == len(lines) == 12
    assert go(test, llama, tmp_path) == lines
    assert len(calls) == 3
    whole = go(test, llama, tmp_path / "whole")
    timed = ("prefill_s", "compress_s", "compare_s", "draft_s", "versions", "git", "kl_tokens")  # these are in kl_mean
    bare = [[{name: line[name] for name in line if name not in timed} for line in run] for run in (lines, whole)]
    for line, other in zip(*bare, strict=True):
        assert line == pytest.approx(other, abs=1e-6)
    with pytest.raises(wk.InputError, match="max_new_tokens: 12, now 8"):
        go(asked("full", max_new_tokens=8, max_context=200), llama, tmp_path)


def test_a_logit_that_is_no_number_fails_its_prompt_only(llama: PreTrainedModel, tmp_path: Any) -> None:
    llama.model.embed_tokens.weight.data[BROKEN] = float("nan")
    texts = [TEXTS[0], "~" + TEXTS[1], TEXTS[2]]
    test = asked("snapkv:observe=8", "full", texts=texts)
    lines = go(test, llama, tmp_path)
    assert [line["failed"] for line in lines] == [None] * 2 + [auditor.NOT_A_NUMBER] * 2 + [None] * 2
    summary = summarize(lines, test.expected(), 0.5, {"dtype": "float32"})
    assert [(g["prompts"], g["failed"]) for g in summary["groups"]] == [(2, 1), (2, 1)]
    assert f"full failed on 1 of 3 prompts (1: {auditor.NOT_A_NUMBER})" in summary["notes"]


def test_a_logit_of_one_setting_that_is_no_number(llama: PreTrainedModel, tmp_path: Any, monkeypatch: Any) -> None:
    real = auditor.stack

    def poisoned(caches: list[wk.CompactCache]) -> wk.CompactCache:
        together = real(caches)
        for layer in together.compact_layers:
            layer.values[0] = float("nan")
        return together

    monkeypatch.setattr(auditor, "stack", poisoned)
    lines = go(asked("snapkv:observe=8", "streaming:observe=8", texts=TEXTS[:1]), llama, tmp_path)
    assert [line["failed"] for line in lines] == [auditor.NOT_A_NUMBER, None]
    assert "agreement" not in lines[0]
    assert "agreement" in lines[1]


def test_a_setting_that_cannot_work_fails_with_its_reason(llama: PreTrainedModel, tmp_path: Any) -> None:
    test = asked("snapkv:observe=8", budgets=(4, 24))
    lines = go(test, llama, tmp_path)
    assert [line["failed"] is None for line in lines] == [False, True] * 3
    assert "below sinks + window" in lines[0]["failed"]
    summary = summarize(lines, test.expected(), 0.0, {"dtype": "float32"})
    assert summary["recommendation"]["setting"]["budget"] == 24
    assert "snapkv:observe=8 at 4 entries failed on 3 of 3 prompts" in " ".join(summary["notes"])


def test_long_prompts_lose_their_middle_and_are_counted(llama: PreTrainedModel, tmp_path: Any) -> None:
    test = asked("snapkv:observe=8", texts=["x" * 300 + TEXTS[0], TEXTS[1]], max_context=len(TEXTS[1]))
    lines = go(test, llama, tmp_path)
    assert [(line["prompt_tokens"], line["truncated_tokens"]) for line in lines] == [(len(TEXTS[1]), 300), (len(TEXTS[1]), 0)]
    summary = summarize(lines, test.expected(), 0.5, {"dtype": "float32"})
    assert "1 of 2 prompts were too long and lost 300 tokens of their middle" in summary["notes"]
    assert asked("full", max_new_tokens=24).limit(llama) == 1000
    with pytest.raises(wk.InputError, match="1024 new tokens leave no room"):
        asked("full", max_new_tokens=1024).limit(llama)


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv:observe=8",
        "adakv:of=snapkv:observe=8",
        "snapkv:observe=8:quantize=int8",
        "adakv:of=snapkv:observe=8:quantize=int4",
    ],
)
def test_bytes_are_those_of_the_dtype_that_is_served(spec: str) -> None:
    """An audit in float32 of a model that is used in bfloat16 reports the bytes of a cache in bfloat16."""
    ids = torch.tensor([[ord(letter) for letter in TEXTS[0]]])
    half, wide = tiny_model("llama").bfloat16(), tiny_model("llama")
    served, cache = (wk.CompactCache(model, spec, 24, keep_scores=True) for model in (half, wide))
    prefill(half, ids, served)
    prefill(wide, ids, cache)
    found = auditor.costs(settings_module.Kept(settings_module.Setting(spec, 24), cache), 0.0, torch.bfloat16)
    # Heads of adakv may split their budget otherwise in bfloat16, which moves the padding that is held, not what is kept.
    names = ("kept_bytes", "full_bytes") if "adakv" in spec else ("kept_bytes", "full_bytes", "held_bytes")
    assert {name: found[name] for name in names} == {name: getattr(served.report, name) for name in names}
    assert found["held_bytes"] >= found["kept_bytes"]


def test_prompt_files_are_read(tmp_path: Any) -> None:
    rows, text = tmp_path / "mine.jsonl", tmp_path / "one.txt"
    rows.write_text('{"prompt": "a b", "id": 7, "label": 3}\n\n{"prompt": "c"}\n{"prompt": "a b"}\n{"prompt": "d"}\n')
    text.write_text("Several\nlines are one prompt.\n")
    found = auditor.gather_prompts([rows, text], [], None)
    assert [(p.id, p.text) for p in found] == [
        ("7", "a b"), ("mine.jsonl:2", "c"), ("mine.jsonl:4", "d"), ("one.txt", text.read_text())
    ]  # fmt: skip
    assert [p.text for p in auditor.gather_prompts([rows], [], None, 1, 2)] == ["c", "a b"]
    with pytest.raises(wk.InputError, match="--skip 4 passes over every prompt: the longest source has 4"):
        auditor.gather_prompts([rows], [], None, 4)
    with pytest.raises(wk.InputError, match="no prompts to audit"):
        auditor.gather_prompts([], [], None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "fine"}\n{"text": "no"}\n', "a.jsonl, line 2: field 'prompt' is missing or not a text"),
        ("a.jsonl", '{"prompt": "fine"}\n\nnot json\n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"prompt": 3}\n', "a.jsonl, line 1: field 'prompt' is missing or not a text"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.txt", " \n", "a.txt is empty"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Any, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(wk.InputError) as raised:
        auditor.file_prompts(tmp_path / name)
    assert message in str(raised.value)
    with pytest.raises(wk.InputError, match="cannot be read"):
        auditor.file_prompts(tmp_path / f"absent-{name}")


def test_prompts_of_tasks_are_gathered(data_dir: Any) -> None:
    pytest.importorskip("lm_eval")
    names = ["longbench_multi_news", "longbench_trec"]
    first, second = (auditor.gather_prompts([], names, data_dir, skip, 2) for skip in (0, 2))
    assert [p.template for p in first] == [True, True, False, False]  # few-shot tasks stand outside the chat template
    assert [p.id.split("/")[0] for p in second] == [names[0]] * 2 + [names[1]] * 2
    assert not {p.digest for p in first} & {p.digest for p in second}
    assert all(len(p.text) > 100 for p in [*first, *second])
