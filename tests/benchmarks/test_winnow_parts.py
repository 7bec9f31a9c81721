"""benchmarks/winnow_parts.py on tiny models."""

import importlib
import json
import runpy
import sys

import pytest
import torch

import winnowkv as wk
from support.evaluation import write_model, write_rows
from support.models import prompt
from support.paths import BENCHMARKS
from support.profiles import PROFILES
from support.terminal import too_wide
from winnowkv.cache.reading import extend, prefill
from winnowkv.errors import InputError
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.models import load as models
from winnowkv.models.info import ModelInfo
from winnowkv.policies import PromptInfo
from winnowkv.policies.winnow import Winnow
from winnowkv.prompt.structure import Structure
from winnowkv.prompt.task import TaskProfile
from winnowkv.scoring.attention import causal_attention, expected_attention

sys.path.insert(0, str(BENCHMARKS))  # as when it is run: it imports the file beside it
PARTS = vars(importlib.import_module("winnow_variants")) | runpy.run_path(str(BENCHMARKS / "winnow_parts.py"))
TOKENS, SMALL = 72, {"observe": 8, "samples": 32, "least": 4, "heads": 3, "profile": PROFILES}
FOUND = TaskProfile("localization", structure=Structure(TOKENS, 12, 3, (9, 20, 33, 47)))


def read(model):
    recorded = wk.CompactCache(model, "full", 1, record=TOKENS)
    prefill(model, prompt(TOKENS), recorded)
    return recorded


def parts(policy, model, budget=24):
    prompt_info = PromptInfo(TOKENS, model.config.num_hidden_layers, budget, FOUND)
    return policy.bind(ModelInfo.of(model), prompt_info).parts


def positions(cache):
    return [layer.positions[0].tolist() for layer in cache.compact_layers]


def test_a_part_without_a_change_is_winnow(model):
    recorded = read(model)
    mine, shipped = (recorded.replay(kind(**SMALL), 24, task=FOUND) for kind in (PARTS["Part"], Winnow))
    assert positions(mine) == positions(shipped)
    assert parts(PARTS["Part"](**SMALL), model).shared.structure == FOUND.structure


@pytest.mark.parametrize("name", ["mean", "normal", "late", "even"])
def test_another_attention_keeps_other_tokens(name, llama):
    recorded = read(llama)
    part = PARTS["Part"](**SMALL, attention=PARTS[f"{name}_attention"])
    assert positions(recorded.replay(part, 24, task=FOUND)) != positions(recorded.replay(Winnow(**SMALL), 24, task=FOUND))


def test_a_variant_without_a_part_does_not_use_that_part(llama):
    recorded = read(llama)
    still, guessing, equal = (PARTS["Part"](**SMALL, **flag) for flag in ({"moved": False}, {"guessed": True}, {"equal": True}))
    shipped = parts(Winnow(**SMALL), llama)
    assert shipped.scorer.rotation is not None
    assert parts(still, llama).scorer.rotation is None
    assert shipped.shared.profile is not None
    assert parts(guessing, llama).shared.profile is None
    for part in (still, guessing):
        kept = positions(recorded.replay(part, 24, task=FOUND))
        assert kept != positions(recorded.replay(Winnow(**SMALL), 24, task=FOUND))
    assert set(recorded.replay(equal, 40, task=FOUND).report.kept_entries[0]) == {40}
    assert len(set(recorded.replay(Winnow(**SMALL), 40, task=FOUND).report.kept_entries[0])) > 1


def test_closed_forms_are_those_of_single_heads():
    draw = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(1, 4, 40, 8, generator=draw), torch.randn(1, 2, 30, 8, generator=draw)
    means, normals = (PARTS[f"{name}_attention"](queries, keys, 0.4, 25)[0] for name in ("mean", "normal"))
    for kv in range(2):
        mean, normal = torch.zeros(25), torch.zeros(25)
        for head in (2 * kv, 2 * kv + 1):
            q, k = 0.4 * queries[0, head], keys[0, kv]
            mean += (q @ k.T).softmax(-1)[:, :25].mean(0) / 2
            spread = torch.cov(q.T, correction=0)
            normal += torch.stack([q.mean(0) @ key + key @ spread @ key / 2 for key in k]).softmax(-1)[:25] / 2
        torch.testing.assert_close(means[0, kv], mean)
        torch.testing.assert_close(normals[0, kv], normal)
    # Two normal clouds of queries are not one: the closed form and the samples must not agree.
    assert not torch.allclose(normals, expected_attention(queries, keys, 0.4, 25)[0], rtol=0.05)


def test_the_oracle_records_what_the_answer_attends_to(model):
    ids, answer = prompt(TOKENS), prompt(6, seed=1)
    answering = PARTS["AnswerAttention"](model)
    prefill(model, ids, answering)
    assert answering.recorded == []
    extend(model, answering, answer, [TOKENS])
    whole = wk.CompactCache(model, "full", 1, record=6)  # the same tokens as one prompt: its last queries are the answer's
    prefill(model, torch.cat([ids, answer], 1), whole)
    for (scores, preference), (queries, scale), layer in zip(
        answering.recorded, whole.recording.layers, whole.compact_layers, strict=True
    ):
        attention = causal_attention(queries, layer.keys, scale)[0, :, :, :TOKENS]
        wanted = attention.square().mean(1).sqrt().unflatten(0, (2, -1)).mean(1)
        torch.testing.assert_close(scores[0], wanted, rtol=1e-3, atol=1e-5)
        assert preference > 0


def test_the_oracle_keeps_what_it_recorded(llama):
    recorded, answering = read(llama), PARTS["AnswerAttention"](llama)
    prefill(llama, prompt(TOKENS), answering)
    extend(llama, answering, prompt(6, seed=1), [TOKENS])
    variant = PARTS["Variant"]("oracle", PARTS["Oracle"](observe=4, sinks=0, equal=True))
    kept = PARTS["keep"](recorded, variant, 20, FOUND, answering.recorded)
    for (scores, _), layer in zip(answering.recorded, kept.cache.compact_layers, strict=True):
        best = scores[0, :, : TOKENS - 4].topk(16).indices.sort().values
        assert torch.equal(layer.positions[0][:, :16].long(), best)


def texts(tmp_path, *more, chosen="winnow,no structure,oracle"):
    if not (tmp_path / "model").exists():
        write_model(tmp_path / "model")
        write_rows(tmp_path / "data", 4)
    words = ("texts", "--model", tmp_path / "model", "--tasks", "longeval_lines_200", "--data", tmp_path / "data", "--json")
    asked = ("--skip", 1, "--limit", 3, "--max-new-tokens", 8, "--budgets", "40,3", "--out", tmp_path / "out")
    variants = ("--variants", chosen, "--against", "snapkv,cake")
    return PARTS["main"](PARTS["parse"]([str(word) for word in (*words, *asked, *variants, *more)]))


def test_texts_that_leave_no_row_are_refused(tmp_path):
    with pytest.raises(InputError, match="--skip 4 leaves nothing of longeval_lines_200, which has 4 rows"):
        texts(tmp_path, "--skip", 4)


def test_texts_are_compared_with_the_best_published_policy_on_the_same_rows(tmp_path, capsys):
    summary = texts(tmp_path)
    assert json.loads(capsys.readouterr().out) == summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {(row["policy"], row["budget"]): row for row in summary["rows"]}
    at_40 = [row for row in summary["rows"] if row["budget"] == 40]
    assert [row["policy"] for row in at_40] == ["winnow", "no structure", "snapkv", "cake", "oracle"]
    assert {row["prompts"] for row in at_40} == {3}
    best = min(("snapkv", "cake"), key=lambda name: rows[name, 40]["kl_mean"][0])
    assert {row["against"] for row in at_40} == {best}
    assert rows[best, 40]["kl_mean_difference"] == [0, 0, 0]
    apart = rows["winnow", 40]["kl_mean"][0] - rows[best, 40]["kl_mean"][0]
    assert rows["winnow", 40]["kl_mean_difference"][0] == pytest.approx(apart)
    assert rows["winnow", 3]["prompts"] == 0  # three entries are below the sinks alone
    assert rows["winnow", 3]["kl_mean"] == [None, None, None]


def test_answers_are_heard_before_anything_is_evicted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    labels = ("lookahead", "lookahead + draft + refit", "lookahead of 1")
    summary = texts(tmp_path, "--after", 3, "--max-new-tokens", 40, chosen=",".join(labels))
    rows = {row["policy"]: row for row in summary["rows"] if row["budget"] == 40}
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["lookahead_tokens"] for line in lines if line["policy"] == labels[0] and not line.get("failed")} == {32}
    assert {line["draft_tokens"] for line in lines if line["policy"] == labels[1] and not line.get("failed")} == {64}
    mine = [line for line in lines if (line["policy"], line["budget"]) == ("lookahead", 40)]
    assert all(line["kl_tokens"][:31] == [0] * 31 for line in mine), "the lookahead's tokens are the full cache's"
    assert any(line["kl_tokens"][34] > 0 for line in mine)
    assert rows["lookahead"]["prompts_after"] == 3
    later = [sum(line["kl_tokens"][2:]) / len(line["kl_tokens"][2:]) for line in mine]
    assert rows["lookahead"]["kl_mean_after"][0] == pytest.approx(sum(later) / 3)
    assert rows["lookahead of 1"]["kl_mean"][0] > rows["lookahead"]["kl_mean"][0]
    best = rows[rows["lookahead"]["against"]]
    assert best["kl_mean_difference_after"][0] == 0
    capsys.readouterr()
    PARTS["show"](summary)
    shown = capsys.readouterr().out
    assert too_wide(shown) == []
    assert "Of the same answers the tokens after 3" in shown
    assert "lookahead + draft + refit" in shown


def test_a_stopped_run_loses_nothing_and_continues(tmp_path, monkeypatch):
    add, added = ResultStore.add, []

    def stop_soon(store, line):
        add(store, line)
        added.append(line)
        if len(added) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultStore, "add", stop_soon)
    with pytest.raises(KeyboardInterrupt):
        texts(tmp_path)
    file = tmp_path / "out" / "results.jsonl"
    assert len(file.read_text().splitlines()) == 7
    assert (tmp_path / "out" / "summary.json").exists()
    texts(tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(line["row"], line["policy"], line["budget"]) for line in lines}) == len(lines) == len(added) == 30
    texts(tmp_path)
    assert len(added) == 30
    with pytest.raises(InputError, match="max_new_tokens"):
        texts(tmp_path, "--max-new-tokens", 9)


@pytest.mark.slow
def test_needles_count_where_the_full_cache_answers(tmp_path):
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    easy = {"needle": "The best thing to do in Corven is to eat a fig.", "question": "What is the best thing to do in Corven?"}
    rows = [{**easy, "answer": "eat a fig"}, {**easy, "answer": "no model says this"}]
    (tmp_path / "needles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("needles", "--needles", tmp_path / "needles.jsonl", "--lengths", 300, "--budgets", 290, "--out", tmp_path / "out")
    summary = PARTS["main"](PARTS["parse"]([str(word) for word in (*words, "--variants", "winnow,streaming")]))
    assert [(row["policy"], row["found"], row["prompts"]) for row in summary["rows"]] == [("winnow", 1, 1), ("streaming", 1, 1)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["depth"] for line in lines] == [0.1, 0.1, 0.3, 0.3]
    assert [line.get("skipped") for line in lines] == [None, None, *["not answered by the full cache"] * 2]


def test_unknown_variants_are_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="variant 'oracle' is unknown in the table 'needles'"):
        PARTS["parse"](["needles", "--variants", "oracle"])


def test_every_variant_has_a_label_of_its_own_and_can_be_made():
    labels = [variant.label for variant in PARTS["VARIANTS"]]
    assert len(set(labels)) == len(labels)
    assert not any("," in label for label in labels)
    for variant in PARTS["VARIANTS"]:
        assert wk.policy(variant.policy).evicts
