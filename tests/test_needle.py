"""The needle runner on the embedded model, with prompts short enough for a test."""

import json

import pytest
import torch

import winnowkv as wk
from winnowkv import models
from winnowkv.evaluate import needle as runner
from winnowkv.evaluate.prompts import PromptBuilder, read_haystack, read_needles

FIELDS = {
    "policy", "budget", "length", "depth", "needle", "answer", "correct", "kept_entries_per_layer", "kept_bytes",
    "full_bytes", "held_bytes", "prefill_s", "decode_ms_per_token", "prompt_tokens", "versions", "rouge1_recall",
    "rouge1_f1", "output",
}  # fmt: skip


@pytest.fixture(scope="module")
def embedded():
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    return wk.load("embedded")


def make(policies=("full", "snapkv:observe=16"), budgets=(0.25, 100), depths=(0.5,), needles=1, **more):
    return runner.NeedleTest(
        policies=list(policies), budgets=list(budgets), lengths=[300], depths=list(depths), needles=read_needles()[:needles],
        max_new_tokens=12, **more,
    )  # fmt: skip


def go(test, embedded, folder, advance=lambda what: None):
    model, tokenizer = embedded
    haystack = read_haystack()
    builder = PromptBuilder(tokenizer, haystack, chat=True)
    test.check(model, builder)
    store = runner.open_store(folder, model, "embedded", builder, haystack, test)
    try:
        runner.run(test, model, tokenizer, builder, store, advance)
        return runner.write_summary(test, store), store.lines
    finally:
        store.close()


def test_lines_hold_what_was_asked_and_measured(embedded, tmp_path):
    summary, lines = go(make(), embedded, tmp_path)
    assert [(line["policy"], line["budget"]) for line in lines] == [
        ("full", 0.25), ("full", 100), ("snapkv:observe=16", 0.25), ("snapkv:observe=16", 100)
    ]  # fmt: skip
    for line in lines:
        assert set(line) >= FIELDS
        assert line["correct"] == (line["answer"].casefold() in line["output"].casefold())
        entries = {0.25: line["prompt_tokens"] // 4, 100: 100}[line["budget"]]
        if line["policy"] == "full":
            entries = line["prompt_tokens"]
        # 30 layers, 3 KV heads, keys and values of 64 numbers in the model's dtype.
        size = 3 * 2 * 64 * embedded[0].dtype.itemsize
        assert sum(line["kept_entries_per_layer"]) == 30 * entries
        assert line["kept_bytes"] == 30 * entries * size
        assert line["full_bytes"] == 30 * line["prompt_tokens"] * size
    assert lines[0]["correct"]  # the full cache finds a needle in 300 tokens
    assert summary["lines"] == summary["expected_lines"] == 4
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text())["groups"] == summary["groups"]


def test_finished_lines_are_never_computed_twice(embedded, tmp_path, monkeypatch):
    go(make(), embedded, tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    calls = []
    real = runner.prefill
    monkeypatch.setattr(runner, "prefill", lambda *args: calls.append(1) or real(*args))
    go(make(), embedded, tmp_path)
    assert not calls
    assert (tmp_path / "results.jsonl").read_bytes() == before
    # One more policy: only its lines are added, and one prefill serves them.
    _, lines = go(make(policies=("full", "snapkv:observe=16", "streaming")), embedded, tmp_path)
    assert calls == [1]
    assert [line["policy"] for line in lines[4:]] == ["streaming", "streaming"]


def test_an_interrupt_loses_at_most_the_running_measurement(embedded, tmp_path):
    told = []

    def stop_at_three(what):
        told.append(what)
        if len(told) == 3:
            raise KeyboardInterrupt

    test = make(depths=(0.2, 0.8))
    with pytest.raises(KeyboardInterrupt):
        go(test, embedded, tmp_path, stop_at_three)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    _, lines = go(test, embedded, tmp_path)
    assert len(lines) == test.steps() == len({runner.identity(line) for line in lines}) == 8


def test_replayed_answers_equal_live_ones(embedded, tmp_path):
    """What one shared prefill gives for a policy is what a prefill with that policy gives."""
    model, tokenizer = embedded
    specs = ("snapkv:observe=16", "windowkv", "dynamickv", "pyramidkv", "streaming", "random")
    _, lines = go(make(policies=specs, budgets=(0.25,)), embedded, tmp_path)
    builder = PromptBuilder(tokenizer, read_haystack(), chat=True)
    ids = torch.tensor([builder.build(read_needles()[0], 300, 0.5)], device=model.device)
    for line in lines:
        with wk.compress(model, line["policy"], 0.25, task="localization") as run:
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert run.report.kept_entries == [line["kept_entries_per_layer"]]
        assert tokenizer.decode(output[0][ids.shape[1] :], skip_special_tokens=True) == line["output"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (4,)}, "a budget of 4 entries .* is below sinks . window = 0 . 16"),
        ({"depths": (1.5,)}, "depth 1.5 is outside"),
        ({"policies": ("snapvk",)}, "Did you mean 'snapkv'"),
        ({"needles": 0}, "at least one policy"),
    ],
)
def test_what_cannot_work_is_told_before_any_work(embedded, tmp_path, change, message):
    with pytest.raises(wk.WinnowError, match=message):
        go(make(**change), embedded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_the_model_or_the_haystack(embedded, tmp_path):
    model, tokenizer = embedded
    long = runner.NeedleTest(["full"], [0.5], [9000], [0.5], read_needles()[:1])
    with pytest.raises(wk.InputError, match="8192 positions: ask for at most 8168"):
        long.check(model, PromptBuilder(tokenizer, read_haystack(), chat=True))
    short = runner.NeedleTest(["full"], [0.5], [3000], [0.5], read_needles()[:1])
    with pytest.raises(wk.InputError, match="the haystack has"):
        short.check(model, PromptBuilder(tokenizer, "Too short. " * 50, chat=True))


def test_rouge_and_containment():
    judged = runner.judge("blue flowerpot", "It is under the BLUE flowerpot.")
    assert judged == {"correct": True, "rouge1_recall": 1.0, "rouge1_f1": 0.5}
    assert runner.judge("blue flowerpot", "no idea") == {"correct": False, "rouge1_recall": 0.0, "rouge1_f1": 0.0}
