"""benchmarks/study_parts.py."""

import json
import runpy
import sys

import pytest

import winnowkv as wk
from support.paths import BENCHMARKS
from winnowkv.errors import InputError
from winnowkv.models import load as models

sys.path.insert(0, str(BENCHMARKS))  # as when it is run: it imports the file beside it
PARTS = runpy.run_path(str(BENCHMARKS / "study_parts.py"))


def run(*words):
    return PARTS["main"](PARTS["parse"]([str(word) for word in words]))


def needle_file(tmp_path):
    easy = {"needle": "The best thing to do in Corven is to eat a fig.", "question": "What is the best thing to do in Corven?"}
    rows = [{**easy, "answer": "eat a fig"}, {**easy, "answer": "no model says this"}]
    (tmp_path / "needles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "needles.jsonl"


@pytest.mark.slow
def test_needles_count_where_the_full_cache_answers_and_a_run_goes_on(tmp_path):
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    ways = "snapkv;kvzip;kvzip:plus=true;winnow full, refit"
    words = ("needles", "--needles", needle_file(tmp_path), "--length", 200, "--budgets", 190, "--out", tmp_path / "out")
    summary = run(*words, "--ways", ways)
    assert [(row["way"], row["found"], row["texts"]) for row in summary["rows"]] == [(way, 1, 1) for way in ways.split(";")]
    file = tmp_path / "out" / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None] * 4 + ["not answered by the full cache"] * 4
    assert {line["text_tokens"] for line in lines[:4]} == {200}
    assert run(*words, "--ways", ways, "--json")["rows"] == summary["rows"]
    assert len(file.read_text().splitlines()) == len(lines)


def test_unknown_ways_are_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="way 'winnow thorough' is unknown: it is one of snapkv; expected"):
        PARTS["parse"](["needles", "--ways", "winnow thorough"])


def test_every_way_has_a_label_of_its_own_and_a_policy_that_can_be_made():
    ways = PARTS["WAYS"]
    assert len({way.label for way in ways}) == len(ways)
    for way in ways:
        policy = wk.policy(way.policy)
        assert policy.weighs_values == way.weighs
        assert not policy.needs_study or way.study is not None
