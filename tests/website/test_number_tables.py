"""Tables of README and docs say what the commands' JSON says."""

from __future__ import annotations

from typing import Any

import pytest

from support.records import given
from website.records import read_records
from website.tables import render
from winnowkv.errors import InputError
from winnowkv.report import MIB

LEVELS = {"full cache": (1, 0.01), "lean": (2, 0.02), "balanced": (3, 0.46), "best": (4, 11.32)}
SHARES = {
    "int8": 1.0, "snapkv": 0.6, "cake": 0.7, "expected": 0.9, "cake:preset=paper": 0.95, "winnow": 0.8,
    "winnow:lookahead=64": 0.85, "winnow:lookahead=64:draft=64:rounds=2:refit=true": 0.88,
}  # fmt: skip


def levels() -> dict[str, Any]:
    """What benchmarks/levels.py prints, of a prompt of 1,024 tokens."""
    steps = {"step_ms": 20, "before_ms": 30, "answer_s": 7, "peak_bytes": 2 * MIB, "held_bytes": MIB}
    rows = [{"level": name, "first_token_s": first, "pause_s": pause, **steps} for name, (first, pause) in LEVELS.items()]
    return {"tokens": 1024, "new": 99, "rows": rows}


def audit(after: int) -> dict[str, Any]:
    """A summary of ``winnow audit``: SHARES at 12% and, 0.5 worse, at 6%; 0.1 worse after so many tokens."""
    groups = [
        {
            "policy": policy,
            "budget": budget,
            "agreement": {"mean": share - less},
            "agreement_after": {"mean": share - less - 0.1},
        }
        for policy, share in SHARES.items()
        for budget, less in ((0.06, 0.5), (0.12, 0.0))
    ]
    for group in groups:
        ended = group["policy"] == "winnow:lookahead=64" and after > 50
        wide = group["policy"] == "cake" and after > 50
        group |= {"prompts": 5, "whole_answers": 5 if ended else 4}
        group |= {"full_bytes": 100, "kept_bytes": 12, "held_bytes": 23 if wide else 13}
    return {"after": after, "groups": groups}


def test_the_readmes_costs_are_of_audits_and_levels() -> None:
    records = given("levels", levels()) | given("policies-summaries", audit(48)) | given("policies-questions", audit(64))
    lines = render("costs", records).splitlines()
    assert lines[2] == "| summaries: same token after 48 of an answer | 100% | 60.0% (`cake`) | 70.0% | 75.0% | 78.0% |"
    assert lines[3] == (
        "| answers to questions: same token | 100% | 70.0% (`cake`, holds 23%) | 80.0% | 85.0% (never compressed) | 88.0% |"
    )
    assert lines[4] == "| first token of 1,024 tokens | 1.00 s | | 2.00 s | 3.00 s | 4.00 s |"
    assert lines[5] == "| pause after the 64th token | | | | 0.5 s | 11.3 s |"
    assert lines[6] == "| held at most, and then (of 1.0 MiB) | 1.0 | | 2.0, 1.0 | 2.0, 1.0 | 2.0, 1.0 |"
    del records["policies-questions"].content["result"]["groups"][-2:]
    with pytest.raises(InputError, match="policies-questions has no winnow:lookahead=64:draft=64"):
        render("costs", records)


def test_the_levels_have_their_costs() -> None:
    lines = render("level_costs", given("levels", levels())).splitlines()
    assert lines[5] == "| best | 4.00 s | 11.32 s | 30 ms | 20 ms | 2.0 MiB | 1.0 MiB |"


def test_the_demo_shows_the_published_rule_that_found_most() -> None:
    found = {"full": (1, 1), "winnow": (1, 0.5), "random": (1, 1), "cake": (0.5, 1), "headkv": (0.8, 0.2), "cake:a=1": (1, 1)}
    groups = [
        {"policy": policy, "budget": budget, "accuracy": share, "kept_bytes": 3.25 * MIB, "decode_ms_per_token": 41.04}
        for policy, shares in found.items()
        for budget, share in zip((0.12, 96), shares, strict=True)
    ]
    assert render("demo", given("demo", {"groups": groups})).splitlines() == [
        "```text",
        "             found     MiB  ms/token   found     MiB  ms/token",
        "policy      at 12%  at 12%    at 12%   at 96   at 96     at 96",
        "full          100%     3.2      41.0    100%     3.2      41.0",
        "winnow        100%     3.2      41.0     50%     3.2      41.0",
        "headkv         80%     3.2      41.0     20%     3.2      41.0",
        "```",
    ]


def test_waits_and_http_are_of_their_benchmarks() -> None:
    stalls = [
        {"interleave": side, "first_token_s": 5.0, "before_s": {"p50": 0.02}, "during_s": {"max": most}}
        for side, most in (("256", 0.5), ("none", 4.0), ("256", 0.7), ("none", 6.0))
    ]
    rates = {"bare": {"tokens_s": 100.0}, "served": {"tokens_s": 95.0}}
    overhead = {"summary": rates, "ratio": 0.96, "arguments": {"streams": "8"}}
    started = "OMP_NUM_THREADS=1 python benchmarks/serve_overhead.py --out $OUT --json"
    lines = serving_costs(
        given("serve-stall", {"lines": stalls, "arguments": {"streams": "4", "prompt_tokens": "2000"}})
        | given("serve-overhead", overhead, command=started)
    )
    assert lines[0] == (
        "| a running stream's longest wait while 2,000 tokens are read (4 streams, 20 ms a token) "
        "| `benchmarks/serve_stall.py` | 0.6 s; 5 s without interleaving. The prompt's first token: 5.00 and 5.00 s |"
    )
    assert lines[1] == (
        "| what HTTP costs over the bare engine, 8 streams | `benchmarks/serve_overhead.py` "
        "| 95.0 of 100.0 tokens/s: 4.0% (medians) |"
    )


def test_stored_texts_and_long_answers_are_of_their_benchmarks() -> None:
    ways = {"portable": (0.1, 0.3, 300, 2, 8), "unequal": (0.2, 0.4, 150, 4, 9), "hinted": (0.15, 0.35, 200, 2, 3)}
    asked = [{"way": "whole text", "first": 30, "cold": None, "times": 3, "times_faster": 1}]
    stored = []
    for way, (first, cold, faster, size, took) in ways.items():
        asked.append({"way": f"context, {way}", "first": first, "cold": cold, "times": 3, "times_faster": faster})
        stored.append({"way": way, "seen": 1234, "bytes": size * MIB, "elapsed": took})
    started = "python benchmarks/serve_contexts.py --json"
    bounded = {"decode_budget": 64, "held_bytes": {"500": 2e6, "1000": 3e6}}
    lines = serving_costs(
        given("serve-contexts", {"stored": stored, "asked": asked}, command=started, note="load 1")
        | given("long-answers", {"new": 1000, "lines": [bounded, {"decode_budget": None, "most_bytes": 9e6}]})
    )
    assert lines[2] == (
        "| first token of a question on a stored text of 1,234 tokens (load 1, 3 rounds) | `benchmarks/serve_contexts.py` "
        "| whole text sent again 30.0 s; context in memory 0.100 s portable, 0.200 s unequal, 0.150 s hinted "
        "(200 times shorter); from its file 0.30 to 0.40 s |"
    )
    assert lines[3] == (
        "| storing that text | the same | 3 s with a hint, 8 s studied and portable, 9 s unequal; 2.0 and 4.0 MiB |"
    )
    assert lines[4] == (
        "| four answers of 1,000 tokens, `decode_budget` 64 | `benchmarks/long_answers.py` "
        "| 2.0 and 3.0 MB at 500 and 1,000 tokens; 9.0 MB are set aside without |"
    )


def serving_costs(records: dict[str, Any]) -> list[str]:
    """The rows of the table, with the pages' own records for those that a test does not give."""
    return render("serving_costs", read_records() | records).splitlines()[2:]


def test_streams_are_of_both_records() -> None:
    def side(name: str, at_once: int) -> dict[str, Any]:
        shares = {"p50": 1.0, "p95": 22.4, "p99": 12345.0}
        more = {"first_token_s": shares, "inter_token_s": shares, "decode_tokens_s": 12.34, "tokens_s": 5.67}
        return {"side": name, "streams": 9, "at_once": at_once, **more}

    records = given("serve-speed", {"lines": [side("vllm", 2), side("full", 3), side("winnow", 4)]})
    lines = render("streams", records | given("serve-speed-equal", {"lines": [side("equal", 5)]})).splitlines()
    assert lines[3] == "| vLLM | 9 | 2 | 12.3 | 5.7 | 1 / 22 / 12,300 s | 1,000 / 22,400 / 12,300,000 ms |"
    assert lines[5] == "| `winnow:equal=true` at 12% | 9 | 5 | 12.3 | | | 1,000 ms at p50 |"


def test_documents_in_vllm_are_beside_plain_vllm() -> None:
    works = {
        "own documents": ("at_once", "tokens_s", "step_ms", "decode_tokens_s"), "one document": ("tokens_s", "step_ms"),
        "first token": ("first_s",), "first token, cached": ("first_s",),
    }  # fmt: skip
    rows = [
        {"document": 512, "work": work, "figure": figure, "requests": {"context": 6}, "plain": 3, "context": 12, "ratio": 4.25}
        for work, figures in works.items()
        for figure in figures
    ]
    records = given("vllm-speed", {"rows": rows})
    lines = render("vllm_speed", records).splitlines()
    assert lines[0] == "| | 512 tokens: vLLM | contexts | |"
    assert lines[2] == "| requests at once, each on its own document | 3 | 12 | 4x |"
    assert lines[4] == "| decode step of the largest batch | 3 ms | 12 ms | |"
    assert lines[6] == "| first token, nothing in vLLM's blocks | 3.0 s | 12.0 s | 4.2x |"
    assert lines[8] == "| tokens a second (6 requests) | 3.0 | 12.0 | 4.2x |"
    assert lines[9] == "| decode step | 3 ms | 12 ms | 0.2x |"
    gains = render("vllm_gain", records).splitlines()
    assert gains[2:4] == [
        "| requests at once, each on its own document | 3 / 12 |",
        "| tokens a second of a decode step | 3.0 / 12.0 |",
    ]


def test_needles_of_both_windows_are_under_the_papers_names() -> None:
    rows = [["`windowkv` (`preset=repo`)", "8", "7", "3", "2"], ["`snapkv`", "6", "5", "4", "1"]]
    lines = render("windows_of_papers", given("question-window", {"tables": {"found": {"rows": rows}}})).splitlines()
    assert lines[2:] == ["| WindowKV (`preset=repo`) | 3 / 2 | 8 / 7 |", "| SnapKV | 4 / 1 | 6 / 5 |"]
