"""Curves from an audit: what is measured, written into the profile, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import winnowkv as wk
from support.auto import profile_file, read
from support.results import mass_line
from winnowkv.evaluate.audit.curves import check_curves, curves_of, write_curves
from winnowkv.models.calibration import read_profile


def test_curves_are_written_into_the_profile(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, None)
    lines = [mass_line("snapkv:observe=4", at, 0.1 * at, 0.5 + 0.05 * at) for at in range(9)]
    write_curves(path, llama, lines, lines)
    curve = read_profile(path).curve("snapkv")
    assert curve == curves_of(lines)["snapkv"]
    assert curve.expected(0.4) == pytest.approx(0.7)
    write_curves(path, llama, [{**each, "policy": "cake"} for each in lines], [{**each, "policy": "cake"} for each in lines])
    assert sorted(read_profile(path).curves) == ["cake", "snapkv"]


@pytest.mark.parametrize(
    ("policies", "budgets", "prompts", "reason"),
    [
        (["full"], [0.1, 0.2, 0.3], 8, "evicts"),
        (["snapkv", "snapkv:observe=8"], [0.1, 0.2, 0.3], 8, "twice"),
        (["snapkv"], [0.1, 0.2, "auto:0.9"], 8, "numbers"),
        (["snapkv"], [0.1], 8, "at least 3"),
        (["snapkv"], [0.1, 0.2, 0.3], 3, "3 prompts make no curve: give at least 8"),
    ],
)
def test_settings_that_give_no_curve_are_refused_before_the_work(
    policies: list[str], budgets: list[Any], prompts: int, reason: str
) -> None:
    with pytest.raises(wk.InputError, match=reason):
        check_curves(policies, budgets, prompts)


def test_too_few_prompts_give_no_curve() -> None:
    with pytest.raises(wk.InputError, match="at least 8"):
        curves_of([mass_line("snapkv", 0, 0.5, 0.5)])


def test_a_prompt_kept_whole_has_all_the_mass(llama: Any) -> None:
    assert read(llama, "snapkv:observe=4", 1.0).report.kept_mass == [1.0]
