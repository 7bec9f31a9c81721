"""What levels of quality cost: the script runs, and says of each level what it is about."""

from __future__ import annotations

import sys

import pytest

from support.paths import ROOT


@pytest.mark.slow
def test_every_level_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import levels

    summary = levels.main(levels.parse(["--tokens", "200", "--new", "66", "--rounds", "1"]))
    sys.modules.pop("levels")
    rows = {row["level"]: row for row in summary["rows"]}
    assert list(rows) == ["full cache", "lean", "balanced", "best"]
    assert rows["full cache"]["held_bytes"] > 2 * max(rows[level]["held_bytes"] for level in ("lean", "best"))
    assert rows["balanced"]["peak_bytes"] > rows["lean"]["peak_bytes"]
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
