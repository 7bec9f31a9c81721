"""Tables at the width of the terminal: no key is lost, no row is too wide, nothing is dropped; of every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from support.evaluation import write_model
from support.results import CONFIG, evaluation, line, write_run
from support.terminal import blocks, too_wide
from winnowkv.cli import audit, bench, demo, eval as evaluating, needle, report
from winnowkv.cli.tables import Column, ResultTable, columns_of, fold, key_width, keys, least_width, numbers
from winnowkv.evaluate.audit.recommend import summarize as audit_summary
from winnowkv.evaluate.needle.prompts import Needle
from winnowkv.evaluate.report.summary import summarize
from winnowkv.policies import names

Winnow = Callable[..., tuple[int, str, str]]
LONG = "snapkv:observe=16:kernel=9:pooling=avg:quantize=int8"
OTHER = "adakv:floor=0.1:of=snapkv:observe=16"
MACHINE = {"processor": "AMD EPYC 9V74 80-Core Processor", "threads": 2, "accelerator": None}
texts = st.text("abc :0.%/", min_size=1, max_size=45).map(str.strip).filter(bool)


@pytest.fixture(autouse=True)
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns, or a pipe."""
    monkeypatch.setenv("COLUMNS", "80")


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(30, 160))
def test_no_key_is_lost_and_nothing_is_dropped_at_any_width(data: st.DataObject, width: int) -> None:
    key_count, value_count = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 8))
    least = data.draw(st.sampled_from([None, 16]))
    columns = [*keys(*"KLM"[:key_count]), *numbers(f"v{n}" for n in range(value_count)), Column("text", least=least)]
    table = ResultTable(columns)
    for row in data.draw(st.lists(st.lists(texts, min_size=len(columns), max_size=len(columns)), max_size=4)):
        table.add(*row)
    made, legend = fold(table, width)
    values = [column.title for block in made for column in block.columns if not column.key]
    assert values == [column.title for column in columns if not column.key], "each once, in order"
    meaning = dict(entry.split(" ", 1) for entry in legend)
    for block in made:
        assert [column.title for column in block.columns][:key_count] == [column.title for column in columns[:key_count]]
        for row, whole in zip(block.rows, table.rows, strict=True):
            for cell, key in zip(row[:key_count], whole[:key_count], strict=True):
                assert cell == key or meaning[cell.split()[-1]] == key
        few = len(block.columns) <= key_count + 1  # a single value may be wider than any terminal
        assert least_width(block) <= width or few
    assert len(made) == 1 or least_width(table) > width


def test_keys_are_abbreviated_with_a_legend_only_if_they_take_too_much() -> None:
    table = ResultTable([*keys("policy", "budget"), *numbers(f"value {n}\nof it" for n in range(9))])
    table.add("full", "all", *["1.00"] * 9)
    assert len(fold(table, 200)[0]) == 1
    assert fold(table, 80)[1] == []
    table.add(LONG, "12%", *["1.00"] * 9)
    made, legend = fold(table, 80)
    assert legend == [f"[1] {LONG}"]
    assert all(block.rows[1][0].startswith("snapkv [1]") for block in made)
    assert all(key_width(block, [0, 1]) <= 48 for block in made)


def test_a_wide_terminal_shows_one_block(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    evaluating.show(summarize(evaluation(), CONFIG), Path("out"))
    assert len(blocks(capsys.readouterr().out)) == 2  # a table for each protocol


def check(out: str, titles: list[str], keyed: list[str], values: list[str]) -> None:
    """Every block shows the key titles, every row begins with a key, all values are somewhere, and all fits."""
    assert too_wide(out) == []
    found = blocks(out)
    assert found
    for block in found:
        for title in titles:
            assert title in block.header, block
        assert all(any(key in row for key in keyed) for row in block.rows), block
    headers = " ".join(word for block in found for word in block.header.split())
    for value in values:
        assert value in headers, (value, headers)


def test_eval_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    lines = evaluation()
    lines += [line(LONG, 0.4, task="qasper", row="qasper-0"), line(OTHER, 0.4, task="qasper", row="qasper-1")]
    made = summarize(lines, {**CONFIG, "model": "an-organisation/a-model-of-a-rather-long-name-7B-Instruct"})
    policies = ["full", "streaming", "snapkv", "int8", "adakv"]
    report.show(made, Path("report.html"))
    out = capsys.readouterr().out
    check(out, ["policy", "budget"], policies, ["score", "against", "W / T / L", "KV MiB", "kept / full"])
    assert f"[1] {LONG}" in out
    evaluating.show(made, Path("out"))
    out = capsys.readouterr().out
    check(out, ["task", "policy", "budget"], policies, ["rows", "score", "against", "W / T / L", "kept", "KV MiB", "ms/step"])
    assert all("mean over" in block.rows[0] or "qasper" in block.rows[0] for block in blocks(out))


def test_report_of_runs_in_a_pipe(winnow: Winnow, tmp_path: Path) -> None:
    code, out, _ = winnow("report", write_run(tmp_path / "a", evaluation()[:40]), "--out", tmp_path / "page.html")
    assert code == 0
    check(
        "\n".join(row for row in out.splitlines() if str(tmp_path) not in row),
        ["policy", "budget"],
        ["full", "s", "int8"],
        ["score"],
    )


def test_audit(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {
            "prompt": str(at), "id": str(at), "policy": policy, "budget": 0.12, "failed": None, "compared_tokens": 10,
            "agreement": 0.9, "kl_mean": 0.1, "kl_p99": 0.2, "exact_match": False, "first_divergence": None,
            "full_agreement": 1.0, "kept_bytes": 120 * 2**20, "full_bytes": 1000 * 2**20, "held_bytes": 5,
            "truncated_tokens": 0,
        }
        for at in range(9) for policy in (LONG, OTHER, "winnow")
    ]  # fmt: skip
    made = audit_summary(lines, lines, 0.99, {"dtype": "float32"})
    audit.show({**made, "machine": MACHINE}, Path("out"))
    out = capsys.readouterr().out
    values = ["prompts", "token", "interval", "KL", "percentile", "answer", "kept / full"]
    check(out, ["setting"], ["snapkv", "adakv", "winnow at 12%"], values)
    assert made["recommendation"]["sentence"] in " ".join(out.split())


def spread(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value, "least": value, "most": value}


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    mib = 2**20
    where = {"policy": LONG, "budget": 0.12, "prompt_tokens": 32768, "context": 32768}
    prefill = {
        **where, "prefill_s": spread(12.345), "over_plain": spread(1.023), "compress_s": spread(0.0123),
        "kept_bytes": 120 * mib, "full_bytes": 1000 * mib, "peak_memory": 30000 * mib, "plain_peak_memory": None,
    }  # fmt: skip
    caches = ("winnow", "dynamic", "native")
    decode = {
        **where, "batch": 32, "ms": {name: spread(123.4) for name in caches}, "over": {"dynamic": spread(0.512)},
        "tokens_s": dict.fromkeys(caches, 1234.5), "kv_bytes": dict.fromkeys(caches, 1000 * mib),
    }  # fmt: skip
    serve = {
        **where, "compiled": True, "kv_memory": 1024 * mib, "fits": 120, "plain_fits": 12, "tokens_s": spread(1234.5),
        "plain_tokens_s": spread(123.4), "speedup": spread(10.0),
    }  # fmt: skip
    bars = [{"name": f"decode speed-up at 8k, {LONG} at 12%", "value": 2.0, "target": ">= 1.9", "met": True}]
    made = {"model": "m", "machine": MACHINE, "prefill": [prefill], "decode": [decode], "serve": [serve], "growth": [],
            "notes": [], "bars": bars}  # fmt: skip
    bench.show(made, Path("out"))
    out = capsys.readouterr().out
    check(out, ["policy", "budget", "tokens"], ["snapkv"], ["over plain", "ms/step", "speed-up", "ours / plain", "KV MiB"])
    assert all("12%" in row or "0.12" in row for block in blocks(out) for row in block.rows)


def needle_group(policy: str, budget: Any) -> dict[str, Any]:
    return {
        "policy": policy, "budget": budget, "length": 3000, "evicts": policy != "full", "cases": 6, "accuracy": 5 / 6,
        "found": 0.9, "rouge1_f1": 0.51, "rouge1_recall": 0.62, "kept_bytes": 8 * 2**20, "full_bytes": 66 * 2**20,
        "prefill_s": 12.34, "decode_ms_per_token": 45.6,
        "example": {"output": "The best thing to do in San Francisco is eat a sandwich."},
    }  # fmt: skip


def test_needle(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [needle_group(policy, budget) for policy in ("full", LONG, OTHER, "winnow") for budget in (0.12, 128)]
    made = {"variant": "multi", "machine": MACHINE, "failed": 1, "groups": groups}
    needle.show_table(made, Path("out"))
    out = capsys.readouterr().out
    values = ["found", "ROUGE-1", "KV MiB", "prefill", "ms/token", "example answer"]
    found = blocks(out)
    assert too_wide(out) == []
    assert all(title in block.header for block in found for title in ("policy", "budget", "tokens"))
    assert all(value in " ".join(" ".join(block.header for block in found).split()) for value in values)
    assert all(sum("snapkv" in row for row in block.rows) == 2 for block in found)
    accuracy = {"sinks=4": 0.5, "sinks=0 and a long name": 0.25, "another level": 0.75, "one more level": 1.0}
    needle.show_effects([{"policy": "compresskv", "factor": "heads", "budget": 0.12, "accuracy": accuracy}])
    assert too_wide(capsys.readouterr().out) == []


def test_the_demo_is_one_screen_and_says_what_to_try_next(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [needle_group(policy, budget) for policy in demo.POLICIES.split(",") for budget in (0.12, 128)]
    demo.show_screen({"failed": 0, "groups": groups}, Path("winnow-out/demo"))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) <= 24
    check(out, ["policy"], demo.POLICIES.split(","), ["found", "MiB", "ms/token", "at 12%", "at 128"])
    shown, *following = lines[-3:]
    assert shown == "-- winnow found 83% in 8.0 MiB (12%), the full cache 83% in 8.0 MiB"
    assert all(line.startswith("-- ") and ": winnow " in line for line in following)


def test_the_demo_prints_what_the_needle_test_found(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needle.measure(
        model=str(folder), chat=False, out=tmp_path / "out", as_json=False, haystack=" ".join(["w1 w2 w3."] * 300),
        policies=["full", "winnow"], budgets=[0.5, 128], lengths=[400], depths=[0.5], needles=[Needle("w7 w8.", "w9?", "w8")],
        metric="correct", max_new_tokens=2, show=demo.show_screen,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert [row.split()[0] for block in blocks(out) for row in block.rows] == ["full", "winnow"]
    assert "at 50%" in out
    assert "-- winnow found " in out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are words."""
    return write_model(tmp_path_factory.mktemp("model"))


def test_plan(winnow: Winnow, folder: Path) -> None:
    asked = ("plan", "--model", folder, "--context", 512, "--memory", "2MiB", "--batch", 2)
    code, out, err = winnow(*asked, "--policies", f"full,{LONG},{OTHER},streaming,h2o,tova,random,lagkv,knorm,keydiff")
    assert code == 0, err
    out = "\n".join(out.splitlines()[1:])  # the title names the model's folder
    budgets = ["all", "0.12", "0.25", "0.5"]
    check(out, ["budget", "policies"], budgets, ["entries", "request", "peak", "needed", "fits", "batch", "context"])
    assert LONG.split(":")[0] in out


def test_policies(winnow: Winnow) -> None:
    code, out, _ = winnow("policies")
    assert code == 0
    check(out, ["policy", "for"], names(), [])
    assert len(blocks(out)[0].rows) == len(names())
    code, out, _ = winnow("policies", "all")
    assert code == 0
    assert too_wide(out) == []


def test_columns_are_counted_as_the_terminal_shows_them() -> None:
    assert columns_of("ab\nabc") == 3
    assert columns_of("日本") == 4
    assert columns_of("") == 0
