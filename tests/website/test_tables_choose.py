"""The tables of docs/choose.md say what an audit measured, whichever policy is ahead."""

from __future__ import annotations

from typing import Any

import pytest

from website.audit_groups import level_of
from website.figures.way import FILE, draw
from website.records import Record
from website.tables import TABLES, render
from winnowkv.policies.quality import LEVELS, spec_of_quality

MIB = 2**20


class Given(Record):
    """A record with content that is given."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__("given", "", "", ())
        object.__setattr__(self, "result", result)

    @property
    def content(self) -> dict[str, Any]:
        return {"date": "2026-11-30", "machine": {"processor": "a processor"}, "result": self.result}


def measure(mean: float | None, spread: float | None = None) -> dict[str, float | None]:
    low, high = (None, None) if mean is None or spread is None else (mean - spread, mean + spread)
    return {"mean": mean, "low": low, "high": high}


def group(policy: str, budget: float | None, same: float, after: float | None, kept: int, **more: Any) -> dict[str, Any]:
    return {
        "policy": policy, "budget": budget, "whole": budget is None, "prompts": 12, "trivial": 0, "whole_answers": 0,
        "agreement": measure(same, 0.01), "kl_mean": measure(1 - same), "agreement_after": measure(after, 0.02),
        "kl_after": measure(None if after is None else 1 - after), "kept_bytes": kept, "held_bytes": kept, "full_bytes": 100,
        **more,
    }  # fmt: skip


def audit(after: int, *groups: dict[str, Any]) -> Given:
    return Given({"model": "embedded", "after": after, "groups": list(groups)})


LEVEL_ROWS = Given(
    {"rows": [{"level": level, "peak_bytes": size * MIB} for level, size in
              (("full cache", 50), ("lean", 15), ("balanced", 58), ("best", 58))]}
)  # fmt: skip
BALANCED = "winnow:lookahead=64"
RECORDS = {
    "levels": LEVEL_ROWS,
    "policies-summaries": audit(
        64,
        group("full", None, 1.0, 1.0, 100), group("int8", None, 0.99, 0.98, 53),
        group("winnow", 0.12, 0.7, 0.76, 12), group("winnow", 0.25, 0.8, 0.85, 25),
        group("cake", 0.12, 0.75, 0.78, 12), group(BALANCED, 0.12, 0.95, 0.9, 12),
    ),
    "policies-questions": audit(
        0, group("winnow", 0.12, 0.91, None, 12), group(BALANCED, 0.12, 1.0, None, 100, whole_answers=9),
    ),
}  # fmt: skip


def rows(name: str) -> list[list[str]]:
    """The cells of a table's rows."""
    lines = [line for line in render(name, RECORDS).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_summaries_are_compared_after_the_lookahead_best_first() -> None:
    head, _, *found = rows("choose_summaries")
    assert head == ["policy", "12%", "25%", "KL at 12%"]
    assert found == [
        ["`winnow`, balanced", "90.0% (88.0 to 92.0)", "", "0.100"],
        ["`cake`", "78.0% (76.0 to 80.0)", "", "0.220"],
        ["`winnow`", "76.0% (74.0 to 78.0)", "85.0% (83.0 to 87.0)", "0.240"],
        ["`int8` (53% of the bytes)", "", "98.0% (96.0 to 100.0)", ""],
    ]
    said = render("choose_summaries", RECORDS)
    assert "12 prompts, tokens after the first 64" in said
    assert "a processor, 2026-11-30" in said


def test_questions_are_compared_over_all_tokens_and_say_what_was_never_compressed() -> None:
    _, _, *found = rows("choose_questions")
    assert [row[:2] for row in found] == [
        ["`winnow`, balanced (9 of 12 answers never compressed)", "100.0% (99.0 to 101.0)"],
        ["`winnow`", "91.0% (90.0 to 92.0)"],
    ]


def test_advice_has_its_number_and_names_who_is_ahead() -> None:
    found = {row[0]: row[2] for row in rows("choose_advice")}
    assert found["a summary, or a long answer"] == "at 12% 90.0% (88.0 to 92.0)"
    assert (
        found["the same, with a peak below the full cache"]
        == "at 12% 76.0% (74.0 to 78.0); best other `cake` 78.0% (76.0 to 80.0)"
    )
    assert found["the same, and a pause does no harm"] == "at 12% not measured"
    assert found["53% of the bytes are few enough"] == "98.0% (96.0 to 100.0)"
    assert found["an answer to a question, often short"] == "at 12% 91.0% (90.0 to 92.0)"
    assert "of 50.0 MiB" in found["the lowest peak while the prompt is read"]
    assert "lean 15.0, balanced 58.0" in found["the lowest peak while the prompt is read"]


@pytest.mark.parametrize("name", ["choose_summaries", "choose_questions"])
def test_a_record_that_is_not_measured_is_named(name: str) -> None:
    assert "was not measured yet" in render(name, {"levels": LEVEL_ROWS})
    assert name in TABLES


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("policy", ["winnow", "adakv:of=snapkv:observe=16"])
def test_a_level_is_told_by_its_options(policy: str, level: str) -> None:
    assert level_of(spec_of_quality(policy, level)) == (policy, level)


def test_the_diagram_of_concepts_is_what_its_code_draws() -> None:
    assert FILE.read_text(encoding="utf-8") == draw()
