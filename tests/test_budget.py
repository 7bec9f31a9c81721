"""Budgets: entries, fractions and ``auto``, and errors that name a way out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import winnowkv as wk
from winnowkv.budget import WAY_OUT, Budget, budget_text
from winnowkv.errors import BudgetError

unhurried = settings(deadline=None)  # a busy machine is no failure

# --- Budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked"),
    [(128, 128), (0.12, 0.12), (1, 1), (1.0, 1.0), ("128", 128), (" 5 ", 5), ("+5", 5), ("0.12", 0.12), ("1.0", 1.0)],
)
def test_of_reads_entries_and_fractions(given: int | float | str, asked: int | float) -> None:
    budget = Budget.of(given)
    assert budget.asked == asked
    assert type(budget.asked) is type(asked)  # 1 is one entry, 1.0 is the whole prompt
    assert Budget.of(budget) is budget
    assert Budget.of(str(budget)) == budget


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "above 0"), (0.0, "above 0"), (-3, "above 0"), (-0.5, "above 0"), (float("nan"), "above 0"),
        (1.5, "fraction above 1"), (float("inf"), "fraction above 1"), (2.0, "fraction above 1"),
        (True, "not a number"), (False, "not a number"), (None, "not a number"), ([1], "not a number"),
        ("abc", "not a number"), ("", "not a number"), ("12%", "not a number"),
        ("0", "above 0"), ("-7", "above 0"), ("1.01", "fraction above 1"), ("nan", "above 0"),
    ],
)  # fmt: skip
def test_a_bad_budget_is_named_with_the_way_out(value: object, words: str) -> None:
    with pytest.raises(BudgetError, match=words) as error:
        Budget.of(value)  # type: ignore[arg-type]
    message = str(error.value)
    assert f"budget {str(value) if isinstance(value, str) and words != 'not a number' else repr(value)} " in message
    assert message.endswith(WAY_OUT)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("asked", "tokens", "entries"),
    [
        (0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (0.1, 30, 3), (0.12, 3000, 360), (0.125, 8, 1), (1.0, 77, 77),
        (0.999, 100, 99), (0.001, 100, 0), (128, 3000, 128), (128, 100, 100), (1, 5, 1), (1e-7, 10**7, 1),
    ],
)  # fmt: skip
def test_entries_are_exact_decimals_rounded_down(asked: int | float, tokens: int, entries: int) -> None:
    assert Budget(asked).entries(tokens) == entries


def test_the_decimals_above_would_fail_in_binary() -> None:
    assert int(0.29 * 100) == 28
    assert int(0.57 * 100) == 56


def test_numpy_fractions_are_read_like_pythons() -> None:
    assert Budget.of(np.float64(0.29)).entries(100) == 29


@unhurried
@given(st.integers(1, 999), st.integers(0, 5000))
def test_entries_of_three_decimals(thousandths: int, tokens: int) -> None:
    assert Budget(thousandths / 1000).entries(tokens) == thousandths * tokens // 1000


def test_a_budget_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(1).asked = 2  # type: ignore[misc]


# --- apportion -----------------------------------------------------------------------------------------------------


# --- pyramids ------------------------------------------------------------------------------------------------------


# --- global top-k --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target", "profile"), [("auto", 0.95, None), ("auto:0.9", 0.9, None), ("auto:0.9:a/b.json", 0.9, "a/b.json")]
)
def test_auto_is_a_budget(text: str, target: float, profile: str | None) -> None:
    budget = Budget.of(text)
    assert (budget.target, budget.profile, budget.entries(70)) == (target, profile, 70)
    assert budget_text(budget.asked) == text
    assert Budget.of(0.5).target is None


@pytest.mark.parametrize("text", ["auto:", "auto:1", "auto:0", "auto:1.2.3", "automatic", "auto:x"])
def test_a_budget_auto_with_a_bad_target_is_refused(text: str) -> None:
    with pytest.raises(wk.BudgetError, match="auto"):
        Budget.of(text)


@pytest.mark.parametrize("asked", ["9" * 5000, "-" + "9" * 5000, str(2**63), "1e999", "nan", "\udc80", "0" * 5000, "x" * 10**5])
def test_budgets_that_no_prompt_has_are_refused_in_one_short_sentence(asked):
    with pytest.raises(BudgetError) as refused:
        Budget.of(asked)
    assert len(str(refused.value)) < 400


def test_a_number_with_more_digits_than_python_prints_is_refused():
    for asked in (10**6000, -(10**6000)):
        with pytest.raises(BudgetError, match=r"larger than any prompt|keeps nothing"):
            Budget.of(asked)
