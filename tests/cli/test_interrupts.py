"""Ctrl-C, once and more often: what was measured stays, nothing is printed as a traceback, the exit code is 130."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.results import line, write_run
from winnowkv.cli.main import clean_interrupts

# Presses Ctrl-C in the middle of the third measurement, and again while the summary is written.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from rich.console import Console
from winnowkv.cli.main import one_sentence
from winnowkv.cli.progress import resumable
from winnowkv.evaluate.report.store import ResultStore, write_json

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
folder, presses = Path(sys.argv[1]), int(sys.argv[2])
press = lambda: os.kill(os.getpid(), signal.SIGINT)

with one_sentence("winnow"):
    store = ResultStore(folder, {}, lambda line: line["n"])
    try:
        with resumable(Console(stderr=True), store, "lines", 5) as advance:
            for n in range(5):
                if n == 3:
                    press()
                store.add({"n": n})
                advance("step")
    finally:
        for _ in range(presses):
            press()
        write_json(folder / "summary.json", len(store.lines))
        store.close()
"""


def interrupted(folder: Path, presses: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(presses)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("presses", [0, 1])
def test_a_second_one_does_not_disturb_what_the_first_began(tmp_path: Path, presses: int) -> None:
    done = interrupted(tmp_path, presses)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "interrupted: 3 finished lines" in " ".join(done.stderr.split())
    assert ("writing what was measured; Ctrl-C once more ends at once" in done.stderr) == bool(presses)
    assert (tmp_path / "results.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    assert (tmp_path / "summary.json").read_text() == "3\n"


def test_a_third_one_ends_at_once_and_finished_lines_are_there(tmp_path: Path) -> None:
    done = interrupted(tmp_path, 2)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert (tmp_path / "results.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    assert not (tmp_path / "summary.json").exists()


def test_the_handler_is_as_before_if_there_was_no_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with clean_interrupts("winnow"):
        assert signal.getsignal(signal.SIGINT) is not before or before is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_of_the_caller_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with clean_interrupts("winnow"):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, mine)


def test_a_file_that_cannot_be_used_is_one_sentence(winnow, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [line()])
    (tmp_path / "file").write_text("in the way")
    code, _, err = winnow("report", run, "--out", tmp_path / "file" / "page.html")
    assert code == 2
    assert err.startswith("winnow: ")
    assert len(err.splitlines()) == 1
