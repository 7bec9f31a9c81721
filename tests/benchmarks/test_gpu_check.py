"""benchmarks/gpu_check.py: its measurements on a tiny model, time limits, failed steps and interruptions."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import pytest

from support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))  # as when it is run: it imports the file beside it
gpu = importlib.import_module("gpu_check")
tables = importlib.import_module("gpu_check_table")
SIZES = gpu.SMALL._replace(compiled=())
SPECS = ("snapkv", "snapkv:nonsense=1", "snapkv:lookahead=4:draft=3:refit=true")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """The lines of every step but the laws."""
    out = tmp_path_factory.mktemp("gpu")
    for step in ("prefill", "options", "serve", "decode"):
        gpu.measure(step, SIZES, SPECS, out)
    return {step: gpu.lines_of(step, out) for step in ("prefill", "options", "serve", "decode")}


def test_every_cell_is_measured_in_turn(measured):
    for step, lines in measured.items():
        assert [line["cell"] for line in lines] == [cell["cell"] for cell in gpu.cells(step, SIZES, SPECS)]
        assert not any(line.get("failed") for line in lines)
    assert [line["batch"] for line in measured["decode"]] == [1, 2]
    assert {"native", "dynamic", "static"} <= set(measured["decode"][0]["ms"])
    static, engine = measured["serve"]
    assert static["fits"] == engine["plain_fits"] > 0  # the same memory for both
    assert engine["fits"] > static["fits"]


def test_an_option_costs_its_choice_and_an_unknown_one_is_skipped_with_the_reason(measured):
    plain, unknown, looking = measured["options"]
    assert unknown["skipped"].startswith("this version does not know it: snapkv has no option 'nonsense'")
    assert "choosing_s" not in plain
    assert (looking["lookahead_tokens"], looking["draft_tokens"]) == (4, 3)
    assert looking["before_s"]["count"] == 4 * SIZES.rounds
    assert looking["choosing_s"]["count"] == SIZES.rounds
    assert looking["kept_bytes"] == plain["kept_bytes"] < plain["full_bytes"]


def test_the_table_has_a_row_for_each_cell_and_names_what_failed(measured):
    laws = {"step": "laws", "cell": "tests", "passed": 7, "skipped": 1, "wrong": ["tests/a.py::b"]}
    lost = {"step": "decode", "cell": "batch 9", "failed": "out of | memory"}
    found = {
        "machine": {"accelerator": "NVIDIA H200", "processor": "x"}, "versions": {"torch": "2.13.0"}, "git": "abc",
        "steps": {
            name: {
                "status": "failed with 1: no" if name == "decode" else "done", "measured": len(lines), "of": 9, "lines": lines,
            }
            for name, lines in {"laws": [laws], **measured, "decode": [*measured["decode"], lost]}.items()
        },
    }  # fmt: skip
    text = tables.table(found)
    assert text.startswith("NVIDIA H200, torch 2.13.0, revision abc:")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2 + sum(map(len, measured.values()))
    assert all(row.count("|") == 5 for row in rows)
    assert "| laws | tests | 7 passed, 1 skipped | tests/a.py::b |" in rows
    assert "| decode | batch 9 | failed: out of / memory |  |" in rows
    assert text.endswith("- decode: failed with 1: no, 3 of 9 measured")


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [
        ("print(1)", 60, "done"),
        ("raise ValueError('no room')", 60, "failed with 1: ValueError: no room"),
        ("import time; time.sleep(60)", 0.2, "out of time after 0 s"),
    ],
)
def test_a_step_ends_in_words(tmp_path, code, seconds, status):
    begin = time.monotonic()
    assert gpu.ended([sys.executable, "-c", code], tmp_path / "log", seconds) == status
    assert time.monotonic() - begin < 50  # what is out of time is ended, not waited for


def test_one_cell_that_fails_does_not_end_its_step(tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr("winnowkv.evaluate.bench.cells.prefill", broken)
    gpu.measure("prefill", SIZES, SPECS, tmp_path)
    assert [line["failed"] for line in gpu.lines_of("prefill", tmp_path)] == ["out of memory"] * len(gpu.POLICIES)


def test_a_failed_step_is_reported_and_what_was_measured_is_kept_on_an_interruption(tmp_path, monkeypatch):
    def ended(command: list[str], log: Any, seconds: float) -> str:
        step = command[-1]
        if step == "serve":
            raise KeyboardInterrupt
        gpu.add(tmp_path, {"step": step, "cell": "winnow", "failed": "no memory"})
        return "failed with 1: no memory"

    monkeypatch.setattr(gpu, "ended", ended)
    with pytest.raises(KeyboardInterrupt):
        gpu.check(["prefill", "options", "serve", "decode"], SIZES, [], SPECS, tmp_path)
    steps = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {
        "prefill": "failed with 1: no memory", "options": "failed with 1: no memory", "serve": "interrupted",
    }  # fmt: skip
    assert [step["measured"] for step in steps.values()] == [1, 1, 0]
    assert "- serve: interrupted, 0 of 2 measured" in (tmp_path / "gpu-check.md").read_text()


def test_what_a_step_leaves_over_goes_to_the_next(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "ended", lambda command, log, seconds: given.append(seconds) or "done")
    gpu.check(["prefill", "serve"], SIZES, [], SPECS, tmp_path)
    assert given[0] <= SIZES.seconds["prefill"]
    assert given[1] > SIZES.seconds["serve"]
    assert sum(gpu.WHOLE.seconds.values()) <= 8 * 60


def test_the_laws_are_counted_as_far_as_they_went(tmp_path):
    assert gpu.law_line(tmp_path)["failed"].startswith("pytest did not run its tests")
    said = (
        "tests/laws/a.py::one[x y] PASSED [ 1%]\ntests/laws/a.py::two FAILED [ 2%]\ntests/laws/b.py::three SKIPPED (no) [ 3%]\n"
    )
    (tmp_path / "laws.log").write_text(f"{said}tests/laws/b.py::four ")
    line = gpu.law_line(tmp_path)
    assert (line["passed"], line["skipped"], line["wrong"]) == (1, 1, ["tests/laws/a.py::two"])
    assert "failed" not in line
    (tmp_path / "laws.code").write_text("2")
    assert gpu.law_line(tmp_path)["failed"]


def test_only_the_laws_may_run_out_of_time():
    done = {"status": "done", "measured": 2, "of": 2, "lines": [{}, {}]}
    assert not gpu.went_wrong(done)
    assert not gpu.went_wrong({**done, "status": "out of time after 9 s"})
    assert gpu.went_wrong({**done, "status": "out of time after 9 s", "measured": 1})
    assert gpu.went_wrong({**done, "lines": [{"failed": "no"}]})
    assert gpu.went_wrong({**done, "lines": [{"wrong": ["a test"]}]})


def test_an_unknown_step_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.arguments(["--steps", "laws,decod"])
    assert "step 'decod' is unknown: it is one of laws, " in capsys.readouterr().err
