"""A small sample of benchmarks/soak/engine.py, and that it would notice a mistake."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from support.paths import BENCHMARKS
from winnowkv.engine.scheduler import Scheduler
from winnowkv.engine.slot_layer import SlotLayer

SOAK = runpy.run_path(str(BENCHMARKS / "soak" / "engine.py"), run_name="soak_engine")


def test_random_requests_are_answered_as_alone() -> None:
    found = SOAK["soak"](30, seed=20)
    assert found.mismatches == []
    assert found.requests == 30
    assert found.choices > 30
    assert len(found.policies) > 2
    assert {"stop", "length", "error", "cancelled", "refused"} <= set(found.reasons)


@pytest.mark.parametrize("mistake", ["a row is lost", "bytes are kept"])
def test_a_mistake_is_told_with_the_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, mistake: str
) -> None:
    if mistake == "a row is lost":  # the last row should move into the place of one that has ended
        monkeypatch.setattr(SlotLayer, "move", lambda *_: None)
    else:
        monkeypatch.setattr(Scheduler, "held_bytes", property(lambda self: 7))
    monkeypatch.setattr(sys, "argv", ["engine.py", "--count", "12", "--seed", "13", "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        SOAK["main"]()
    assert ended.value.code == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["requests"] == 12
    assert written["mismatches"]
    assert "(--seed 13 --count " in capsys.readouterr().out
