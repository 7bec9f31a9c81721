"""What benchmarks/auto_promise.py counts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import winnowkv as wk
from support.paths import BENCHMARKS
from support.results import mass_line


def promise_script() -> Any:
    """benchmarks/auto_promise.py as a module."""
    spec = importlib.util.spec_from_file_location("auto_promise", BENCHMARKS / "auto_promise.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_promised_and_reached_agreement(tmp_path: Path) -> None:
    script = promise_script()
    lines = [
        {**mass_line("winnow", at, 0.5, 0.7 + 0.1 * at), "budget": budget, "kept_bytes": 3 + at, "full_bytes": 10}
        for at in range(3)
        for budget in ("auto:0.8", "auto:0.9:p.json", 0.5)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    rows = script.promises(tmp_path)
    assert [(row["target"], row["prompts"]) for row in rows] == [(0.8, 3), (0.9, 3)]
    assert rows[0]["agreement"] == pytest.approx(0.8)
    assert rows[0]["kept"] == pytest.approx(0.4)
    (tmp_path / "results.jsonl").write_text(json.dumps({**lines[0], "budget": 0.5}) + "\n")
    with pytest.raises(wk.InputError, match="no line of a budget auto"):
        script.promises(tmp_path)
