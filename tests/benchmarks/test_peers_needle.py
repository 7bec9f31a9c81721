"""The parts of benchmarks/peers_needle.py that need no kvpress: exact entries, and the order of its table."""

import runpy

import pytest

from support.paths import BENCHMARKS

PEERS = runpy.run_path(str(BENCHMARKS / "peers_needle.py"))


@pytest.mark.parametrize("tokens", [1, 7, 997, 2999, 3000, 32_768])
def test_the_ratio_keeps_exactly_the_entries_of_the_budget(tokens):
    for kept in range(1, tokens + 1):
        left = tokens * (1 - PEERS["ratio_for"](kept, tokens))
        assert int(left) == round(left) == kept  # kvpress rounds down, its PyramidKV to the nearest


def line(policy, budget, correct, kept=12, pace=5.0):
    return {
        "policy": policy, "budget": budget, "correct": correct, "kept_entries_per_layer": [kept, kept], "prompt_tokens": 100,
        "kept_bytes": 10 * kept, "held_bytes": 20 * kept, "decode_ms_per_token": pace,
    }  # fmt: skip


def test_rows_are_ranked_within_each_budget_and_the_full_cache_comes_once():
    ours = [line("full", 0.12, True, 100), line("full", 128, True, 100), line("snapkv", 128, False), line("snapkv", 0.12, True)]
    theirs = [line("KnormPress()", 0.12, False, pace=None), line("SnapKVPress()", 128, True)]
    rows = PEERS["ranked"]([*PEERS["rows_of"](ours, "winnowkv"), *PEERS["rows_of"](theirs, "kvpress")], ["0.12", "128"])
    assert [(row["policy"], row["budget"], row["found"], row["cases"]) for row in rows] == [
        ("full", "all", 1, 1),
        ("snapkv", "0.12", 1, 1),
        ("KnormPress()", "0.12", 0, 1),
        ("SnapKVPress()", "128", 1, 1),
        ("snapkv", "128", 0, 1),
    ]


def test_the_markdown_table_names_failed_policies():
    rows = PEERS["rows_of"]([line("snapkv", 0.12, True, pace=None)], "winnowkv")
    text = PEERS["markdown"](rows, "title", {"BadPress()": "ValueError: no"})
    assert "| snapkv | winnowkv | 0.12 | 1/1 | 12 | 0.00 | 0.00 | - |" in text
    assert text.endswith("- BadPress() did not run: ValueError: no\n")
