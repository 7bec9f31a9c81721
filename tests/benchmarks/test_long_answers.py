"""Long answers with a decode budget and without: the script runs, and the budget holds where it was given."""

from __future__ import annotations

import sys

import pytest

from support.paths import ROOT


@pytest.mark.slow
def test_both_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import long_answers

    words = ["--tokens", "96", "--new", "132", "--short", "70", "--rows", "1", "--decode-budget", "64"]
    summary = long_answers.main(long_answers.parse(words))
    sys.modules.pop("long_answers")
    limited, plain = summary["lines"]
    assert (plain["decode_budget"], limited["decode_budget"]) == (None, 64)
    assert plain["decode_entries"] == [131]
    assert limited["decode_entries"] == [64 + 131 - 128]
    assert len(set(limited["held_bytes"].values())) == 1
    assert list(limited["held_bytes"]) == ["16", "66", "132"]
    assert plain["short_answers"] == limited["short_answers"] == 1
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
