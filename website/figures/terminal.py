"""Record a command in a terminal, and read the recording as the screens that it showed.

    python -m website.figures.terminal record              winnow demo into docs/data/demo.cast
    python -m website.figures.terminal record FILE -- COMMAND ...

The file is an asciicast of version 2: a header, then a line for each piece of output with its second. The command runs in an
empty folder. Long waits are cut, and what is left is shown faster, so that all lasts about :data:`SHOWN` seconds; the header's
``took`` says how long it was.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyte

from website.records import DATA
from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError
from winnowkv.evaluate.report.machine import machine, revision, versions

CAST = DATA / "demo.cast"
COMMAND = ("winnow", "demo")
COLUMNS, ROWS = 80, 28
SHOWN = 20.0  # seconds of the recording, the last screen's time not counted
IDLE = 3.0  # seconds that a wait is cut to
FRAME = 0.15  # seconds between two screens at least
ERASED = re.compile(
    r"\r\x1b\[2K[^\n]*(?=\r\x1b\[2K)"
)  # a line that is written and erased again: most of what a progress bar writes
Event = tuple[float, str]


@dataclass(frozen=True)
class Cast:
    """A recording: its header, and pieces of output, each with its second."""

    header: dict[str, Any]
    events: list[Event]


@dataclass(frozen=True)
class Run:
    """Characters of one line that look alike, and the column of the first."""

    column: int
    text: str
    colour: str = "default"
    bold: bool = False


Line = tuple[Run, ...]
Screen = tuple[Line, ...]


def record(command: Sequence[str], columns: int = COLUMNS, rows: int = ROWS) -> Cast:
    """Run a command in a terminal of this size and note what it writes. Raises InputError if it fails."""
    began, events = time.monotonic(), [(0.0, f"$ {shlex.join(command)}\r\n")]
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    here = {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows), "LANG": "C.UTF-8"}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, cwd=folder, env={**os.environ, **here, "PATH": path}
        )
        os.close(side)
        text = codecs.getincrementaldecoder("utf-8")("replace")
        for part in output(main):
            events.append((time.monotonic() - began, text.decode(part)))
        code = child.wait()
    if code:
        raise InputError(f"{shlex.join(command)} ended with exit code {code}")
    about = {"date": date.today().isoformat(), "revision": revision(), "machine": machine(), "versions": versions()}
    took = round(events[-1][0], 1)
    header = {"version": 2, "width": columns, "height": rows, "command": shlex.join(command), "took": took, **about}
    return Cast(header, shortened(events))


def output(main: int) -> Iterator[bytes]:
    """What is written to a terminal until its other side is closed."""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux says so when the last process of the other side has ended
            part = b""
        if not part:
            os.close(main)
            return
        yield part


def shortened(events: Sequence[Event]) -> list[Event]:
    """Events whose waits are at most IDLE seconds, and which then last at most SHOWN seconds, all shown faster alike."""
    at, before, cut = 0.0, 0.0, []
    for second, text in events:
        at += min(second - before, IDLE)
        before = second
        cut.append((at, text))
    faster = max(cut[-1][0] / SHOWN, 1.0) if cut else 1.0
    pieces: list[Event] = []
    for second, text in cut:
        shown = round(second / faster, 1)  # what is written within a tenth of a second is one piece
        if pieces and pieces[-1][0] == shown:
            pieces[-1] = (shown, pieces[-1][1] + text)
        else:
            pieces.append((shown, text))
    return [(second, ERASED.sub("", text)) for second, text in pieces]


def write(cast: Cast, file: Path) -> None:
    """Write a recording."""
    lines = [cast.header, *([second, "o", text] for second, text in cast.events)]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read(file: Path) -> Cast:
    """Read a recording. Raises InputError if the file is missing or is no asciicast of version 2."""
    if not file.is_file():
        raise InputError(f"{file} is missing: python -m website.figures.terminal record")
    try:
        header, *events = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        return Cast({"width": header["width"], "height": header["height"], **header}, [(at, text) for at, _, text in events])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{file} is no asciicast of version 2: a header with width and height, then [second, 'o', text]"
        ) from None


def screens(cast: Cast) -> list[tuple[float, Screen]]:
    """The screens that were shown, each with its first second; those that lasted less than FRAME seconds are left out."""
    terminal = pyte.Screen(cast.header["width"], cast.header["height"])
    stream = pyte.Stream(terminal)
    found: list[tuple[float, Screen]] = []
    for number, (second, text) in enumerate(cast.events):
        stream.feed(text)
        following = cast.events[number + 1][0] if number + 1 < len(cast.events) else float("inf")
        begun = found[-1][0] if found else -FRAME
        if second - begun < FRAME and following - begun < FRAME:
            continue
        shown = shot(terminal)
        if not found or found[-1][1] != shown:
            found.append((max(second, begun + FRAME) if found else 0.0, shown))
    return found


def shot(terminal: pyte.Screen) -> Screen:
    """What a terminal shows, lines without the blanks at their ends."""
    return tuple(tuple(runs(terminal, row)) for row in range(terminal.lines))


def runs(terminal: pyte.Screen, row: int) -> Iterator[Run]:
    """The runs of one line; blanks between them that have no look of their own belong to none."""
    line, begin = terminal.buffer[row], 0
    while begin < terminal.columns:
        first = line[begin]
        end = begin + 1
        while end < terminal.columns and (line[end].fg, line[end].bold) == (first.fg, first.bold):
            end += 1
        text = "".join(line[column].data for column in range(begin, end))
        if text.strip():
            blanks = len(text) - len(text.lstrip())
            yield Run(begin + blanks, text.strip(), first.fg, first.bold)
        begin = end


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["record"])
    parser.add_argument("file", nargs="?", type=Path, default=CAST)
    parser.add_argument("command", nargs="*", default=list(COMMAND))
    args = parser.parse_args()
    cast = record(args.command)
    write(cast, args.file)
    print(f"{args.file}: {cast.header['took']} s, shown in {cast.events[-1][0]:.0f}, {len(cast.events)} pieces")


if __name__ == "__main__":
    with one_sentence("website.figures.terminal"):
        main()
