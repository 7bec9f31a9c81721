"""Damaged files of every kind are refused in one sentence or used as what they say: a sample of benchmarks/soak/parsers.py."""

import runpy
import sys

import pytest

from support.paths import BENCHMARKS

EACH = 40


@pytest.fixture(scope="module")
def soak():
    path = list(sys.path)
    try:
        return runpy.run_path(str(BENCHMARKS / "soak" / "parsers.py"))["soak"]
    finally:
        sys.path[:] = path


@pytest.mark.parametrize(
    "kinds",
    [
        ("cache", "cache of a batch", "cache in int8", "cache with a decode budget", "cache with windows"),
        ("profile", "curve"),
        ("prompts", "needles", "chains", "results", "config.yaml", "recipe"),
        ("policy spec", "budget"),
        ("config.json",),
    ],
    ids=lambda kinds: kinds[0],
)
def test_no_damaged_file_gives_a_raw_error_or_another_result(soak, kinds):
    tallies = soak(10 if kinds == ("config.json",) else EACH, 1, names=kinds)
    assert tuple(tallies) == kinds
    assert {name: tally.faults for name, tally in tallies.items() if tally.faults} == {}
    assert all(tally.counts["refused"] for tally in tallies.values())
