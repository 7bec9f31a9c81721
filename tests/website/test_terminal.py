"""A command recorded in a terminal, and the recording as an animated picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from winnowkv.errors import InputError

pytest.importorskip("pyte", reason="pyte is not installed: pip install '.[docs]'")

from website.figures import demo, terminal

SCRIPT = r"""
import sys
print("\033[1;32mfound\033[0m  <all>")
sys.stdout.write("one\r\033[2Ktwo &\n")
print(sys.stdout.isatty())
"""
GREEN = terminal.Run(0, "found", "green", True)


def cast(*events: tuple[float, str]) -> terminal.Cast:
    return terminal.Cast({"version": 2, "width": 20, "height": 3, "took": 41.0, "command": "winnow demo"}, list(events))


def test_a_command_is_recorded_as_it_writes_to_a_terminal(tmp_path: Path) -> None:
    made = terminal.record([sys.executable, "-c", SCRIPT], columns=40, rows=12)
    terminal.write(made, tmp_path / "a.cast")
    read = terminal.read(tmp_path / "a.cast")
    assert read == made
    lines = [[run.text for run in line] for line in terminal.screens(read)[-1][1]]
    assert lines[-12:].count(["True"]) == 1
    assert ["two &"] in lines
    assert read.header["command"].startswith(sys.executable)
    with pytest.raises(InputError, match="ended with exit code 3"):
        terminal.record([sys.executable, "-c", "raise SystemExit(3)"])


def test_waits_are_cut_and_the_rest_is_shown_faster() -> None:
    assert terminal.shortened([(0.0, "a"), (100.0, "b"), (101.0, "c")]) == [(0.0, "a"), (3.0, "b"), (4.0, "c")]
    long = terminal.shortened([(float(second), "x") for second in range(201)])
    assert long[-1] == (20.0, "x")
    assert long[100] == (10.0, "x")


def test_screens_are_what_the_terminal_shows() -> None:
    quick = [(1.0, "\x1b[1;32mfound\x1b[0m  x"), (1.01, "y"), (1.02, "\r\x1b[2Kz")]
    found = terminal.screens(cast((0.0, "$ go\r\n"), *quick, (9.0, "z")))
    first, second = (terminal.Run(0, "$ go"),), (terminal.Run(0, "zz"),)
    assert [at for at, _ in found] == [0.0, 1.0, 1.15, 9.0]
    assert found[0][1] == (first, (), ())
    assert found[1][1][1] == (GREEN, terminal.Run(7, "x"))
    assert found[-1][1] == (first, second, ())
    assert terminal.screens(cast((0.0, "\x1b[1;32mfound\x1b[0m")))[0][1][0] == (GREEN,)


def test_a_recording_becomes_a_moving_and_a_still_picture(tmp_path: Path) -> None:
    terminal.write(cast((0.0, "$ go\r\n"), (2.0, "\x1b[1;32mfound\x1b[0m <&>")), tmp_path / "a.cast")
    moving, still = demo.make({}, tmp_path / "out", tmp_path / "a.cast")
    text = moving.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert "prefers-reduced-motion:reduce" in text
    assert text.count(">$ go<") == 1  # two screens show the line, which is there once
    assert "0.000%{transform:translateY(-0px)}25.000%{" in text
    assert root.attrib["width"] == str(int(2 * demo.EDGE + 20 * demo.CELL))
    assert Image.open(still).size[0] == demo.SCALE * int(root.attrib["width"])
    assert demo.make({}, tmp_path / "again", tmp_path / "a.cast")[0].read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", json.dumps({"width": 1, "height": 1}) + "\n[1, 2]\n"])
def test_what_is_no_recording_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.cast").write_text(text)
    with pytest.raises(InputError, match="no asciicast"):
        terminal.read(tmp_path / "a.cast")
    with pytest.raises(InputError, match=r"is missing: python -m website\.figures\.terminal record"):
        terminal.read(tmp_path / "none.cast")
