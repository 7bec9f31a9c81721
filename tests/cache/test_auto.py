"""``budget="auto"``: the curve, the budget that a prompt's scores ask for, and where the curve comes from."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, strategies as st

import winnowkv as wk
from support.models import PROMPT, prompt
from support.paths import ROOT
from support.profiles import random_profile
from support.reference import positions, same_positions
from winnowkv.budget import Budget, spoken
from winnowkv.cache.reading import prefill
from winnowkv.evaluate.audit.auto import check_curves, curves_of, write_curves
from winnowkv.models.calibration import read_profile
from winnowkv.models.curve import Curve, fit_curve
from winnowkv.models.info import Fingerprint

SHARES = st.floats(0, 1)
SPECS = [
    "expected:observe=4:samples=16",
    "winnow:observe=4:samples=16:least=4",
    "snapkv:observe=4",
    "adakv:observe=4",
    "windowkv:observe=4:window=4:top=2:group=2",
]


def profile_file(model: Any, folder: Path, curve: Curve | None) -> Path:
    """A profile of the model whose policies all have one curve."""
    made = random_profile(Fingerprint.of(model), model.config.num_hidden_layers)
    if curve is not None:
        made.curves.update({spec.split(":")[0]: curve for spec in SPECS})
    made.write(folder / "p.json")
    return folder / "p.json"


def read(model: Any, spec: str, budget: Any) -> wk.CompactCache:
    cache = wk.CompactCache(model, spec, budget, task="localization", record=PROMPT)
    prefill(model, prompt(PROMPT), cache)
    return cache


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=30))
def test_a_fitted_curve_ascends_and_ends_whole(measured: list[tuple[float, float]]) -> None:
    curve = fit_curve(measured, 3)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(curve.points))
    assert curve.points[-1] == (1.0, 1.0)
    # In least squares the mean of the fit is the mean of what was measured.
    assert min(y for _, y in measured) - 1e-9 <= curve.points[0][1] <= max(y for _, y in measured) + 1e-9


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=12), st.floats(0.01, 0.99))
@example([(0.8032301256954291, 0.0), *[(0.8032301256954291, 1.0)] * 3], 0.5)
@example([(0.9999999999999999, 0.0)], 0.25)
def test_what_is_needed_is_the_least_mass_that_is_expected_to_do(measured: list[tuple[float, float]], target: float) -> None:
    curve = fit_curve(measured, 3)
    needed = curve.needed(target)
    assert curve.expected(needed) >= target - 1e-9
    if needed > 1e-6:
        assert curve.expected(needed * 0.999) <= target + 1e-9


def test_a_fit_by_hand() -> None:
    curve = fit_curve([(0.2, 0.5), (0.4, 0.9), (0.6, 0.7), (0.8, 1.0)], 4)
    assert curve.points == ((0.2, 0.5), (0.5, 0.8), (0.8, 1.0), (1.0, 1.0))
    assert curve.expected(0.35) == pytest.approx(0.65)
    assert curve.needed(0.9) == pytest.approx(0.65)


@pytest.mark.parametrize("points", [(), ((0.5, 0.5), (0.4, 0.6)), ((0.5, 0.5), (0.6, 0.4)), ((0.5, 1.5),)])
def test_a_curve_that_does_not_ascend_is_refused(points: Any) -> None:
    with pytest.raises(wk.ProfileError, match="must ascend"):
        Curve(points, 3)


@pytest.mark.parametrize(
    ("text", "target", "profile"), [("auto", 0.95, None), ("auto:0.9", 0.9, None), ("auto:0.9:a/b.json", 0.9, "a/b.json")]
)
def test_auto_is_a_budget(text: str, target: float, profile: str | None) -> None:
    budget = Budget.of(text)
    assert (budget.target, budget.profile, budget.entries(70)) == (target, profile, 70)
    assert spoken(budget.asked) == text
    assert Budget.of(0.5).target is None


@pytest.mark.parametrize("text", ["auto:", "auto:1", "auto:0", "auto:1.2.3", "automatic", "auto:x"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(wk.BudgetError, match="auto"):
        Budget.of(text)


@pytest.mark.parametrize("spec", SPECS)
def test_auto_keeps_the_least_that_keeps_the_mass(model: Any, spec: str, tmp_path: Path) -> None:
    """With a straight curve the kept share of the scores is the target, and the result that of the budget in numbers."""
    path = profile_file(model, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    chosen = read(model, spec, f"auto:0.8:{path}")
    assert 0.8 <= chosen.report.kept_mass[0] < 1
    entries = round(sum(chosen.report.kept_entries[0]) / len(chosen.layers))
    same = read(model, spec, entries)
    assert same_positions(positions(chosen), positions(same))
    assert same.report.kept_mass == chosen.report.kept_mass
    less = read(model, spec, max(int(entries / 1.1) - 1, 8))
    assert less.report.kept_mass[0] < chosen.report.kept_mass[0]


def test_a_recorded_prompt_chooses_the_same(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    live = read(llama, SPECS[0], f"auto:0.7:{path}")
    recorded = wk.CompactCache(llama, "full", 1, record=PROMPT)
    prefill(llama, prompt(PROMPT), recorded)
    again = recorded.replay(SPECS[0], f"auto:0.7:{path}")
    assert same_positions(positions(live), positions(again))


def test_rows_of_a_batch_choose_by_themselves(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    ids = torch.cat([prompt(PROMPT, 1), prompt(PROMPT, 2)])
    cache = wk.CompactCache(llama, "snapkv:observe=4", f"auto:0.75:{path}")
    prefill(llama, ids, cache)
    alone = []
    for row in ids:
        one = wk.CompactCache(llama, "snapkv:observe=4", f"auto:0.75:{path}")
        prefill(llama, row[None], one)
        alone.append(one.report.kept_entries[0])
    assert cache.report.kept_entries == alone


def test_what_eviction_cannot_reach_keeps_everything(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.5, 0.5),), 9))
    cache = read(llama, SPECS[0], f"auto:0.9:{path}")
    assert cache.report.kept_bytes == cache.report.full_bytes
    assert "everything is kept" in cache.report.notes[0]


def test_a_short_prompt_is_kept_whole(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    cache = wk.CompactCache(llama, "snapkv", f"auto:0.5:{path}")
    prefill(llama, prompt(20), cache)
    assert cache.report.kept_bytes == cache.report.full_bytes


def test_a_profile_without_a_curve_says_how_to_get_one(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, None)
    with pytest.raises(wk.ProfileError, match="winnow audit --prompts FILE --policies snapkv --curves"):
        wk.CompactCache(llama, "snapkv", f"auto:0.9:{path}")


def line(policy: str, at: int, mass: float, agreement: float) -> dict[str, Any]:
    return {
        "policy": policy, "budget": 0.1, "prompt": f"p{at}", "kept_mass": mass, "agreement": agreement, "failed": None,
        "compared_tokens": 5,
    }  # fmt: skip


def test_curves_are_written_into_the_profile(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, None)
    lines = [line("snapkv:observe=4", at, 0.1 * at, 0.5 + 0.05 * at) for at in range(9)]
    write_curves(path, llama, lines, lines)
    curve = read_profile(path).curve("snapkv")
    assert curve == curves_of(lines)["snapkv"]
    assert curve.expected(0.4) == pytest.approx(0.7)
    write_curves(path, llama, [{**each, "policy": "cake"} for each in lines], [{**each, "policy": "cake"} for each in lines])
    assert sorted(read_profile(path).curves) == ["cake", "snapkv"]


@pytest.mark.parametrize(
    ("policies", "budgets", "reason"),
    [
        (["full"], [0.1, 0.2, 0.3], "evicts"),
        (["snapkv", "snapkv:observe=8"], [0.1, 0.2, 0.3], "twice"),
        (["snapkv"], [0.1, 0.2, "auto:0.9"], "numbers"),
        (["snapkv"], [0.1], "at least 3"),
    ],
)
def test_what_makes_no_curve_is_refused_before_the_work(policies: list[str], budgets: list[Any], reason: str) -> None:
    with pytest.raises(wk.InputError, match=reason):
        check_curves(policies, budgets)


def test_few_prompts_make_no_curve() -> None:
    with pytest.raises(wk.InputError, match="at least 8"):
        curves_of([line("snapkv", 0, 0.5, 0.5)])


def test_what_is_kept_whole_has_all_the_mass(llama: Any) -> None:
    assert read(llama, "snapkv:observe=4", 1.0).report.kept_mass == [1.0]


def promise_script() -> Any:
    """benchmarks/auto_promise.py as a module."""
    spec = importlib.util.spec_from_file_location("auto_promise", ROOT / "benchmarks" / "auto_promise.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_what_was_promised(tmp_path: Path) -> None:
    script = promise_script()
    lines = [
        {**line("winnow", at, 0.5, 0.7 + 0.1 * at), "budget": budget, "kept_bytes": 3 + at, "full_bytes": 10}
        for at in range(3)
        for budget in ("auto:0.8", "auto:0.9:p.json", 0.5)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    rows = script.promises(tmp_path)
    assert [(row["target"], row["prompts"]) for row in rows] == [(0.8, 3), (0.9, 3)]
    assert rows[0]["agreement"] == pytest.approx(0.8)
    assert rows[0]["kept"] == pytest.approx(0.4)
    script.draw(rows, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    (tmp_path / "results.jsonl").write_text(json.dumps({**lines[0], "budget": 0.5}) + "\n")
    with pytest.raises(wk.InputError, match="no line of a budget auto"):
        script.promises(tmp_path)
