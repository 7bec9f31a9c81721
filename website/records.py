"""Measured numbers: one JSON file a record in ``docs/data``, written by the command that measured them.

``docs/data/records.yaml`` names every record with its command and the code that decides its numbers. A record file holds the
command's own JSON under ``result``, and when, where and at which revision it was measured::

    {"command": ..., "date": ..., "revision": ..., "machine": {...}, "versions": {...}, "result": {...}}

Where no command's output was kept, the numbers were copied by hand, and the file says from where:
``"transcribed": "docs/log.md, heading"``. It has the shape of the command's JSON, so that measuring it only has to write the
file anew. If the command prints nothing of the kind (``by_hand`` in records.yaml), it holds tables as the pages show them, and
numbers that their sentences name::

    "result": {"tables": {NAME: {"columns": [...], "rows": [[...], ...]}}, "numbers": {NAME: 1.5}}
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from winnowkv.errors import InputError
from winnowkv.evaluate.report.machine import machine, revision, versions

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "data"


@dataclass(frozen=True)
class Record:
    """One record: what it says, the command that writes it, and the code whose changes make it old.

    Attributes
    ----------
    command: a shell command, run in the repository's root, that prints JSON; for ``by_hand`` it prints something else.
        ``$OUT`` is a folder under winnow-out for this record and revision, where an interrupted run goes on.
    code: paths of the repository; a later commit to one of them makes the record old.
    by_hand: the file is always copied from what the command printed, since that is no JSON or is not what the pages say.
    own_file: the command writes the file by itself, with its own fields (``make soak``, ``make support``).
    pages: files that another program makes of the record, beside the pages with markers.
    """

    name: str
    what: str
    command: str
    code: tuple[str, ...]
    by_hand: bool = False
    own_file: bool = False
    pages: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Its file."""
        return DATA / f"{self.name}.json"

    @cached_property
    def content(self) -> dict[str, Any]:
        """The file's content. Raises InputError if it is missing."""
        if not self.path.is_file():
            raise InputError(
                f"record {self.name}: {self.path} is missing; measure it: python -m website.numbers record {self.name}"
            )
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return content

    @property
    def transcribed(self) -> str:
        """The page and its heading from which the numbers were copied by hand; empty if a command wrote the file."""
        return str(self.content.get("transcribed", ""))

    @property
    def note(self) -> str:
        """What readers should know of this measurement beside its numbers; mostly empty."""
        return str(self.content.get("note", ""))

    @cached_property
    def revision(self) -> str:
        """The git revision that was measured.

        If the file names none: of a file that a command wrote the commit that has it, of a copied one the commit that wrote
        its heading, or the last one of its day if that is earlier. Empty if git knows none.
        """
        if self.content.get("revision"):
            return str(self.content["revision"]).rstrip("+")
        if not self.transcribed:
            return git("log", "-1", "--format=%h", "--", str(self.path))
        page, _, heading = self.transcribed.partition(", ")
        written = git("log", "-1", f"-S# {heading}\n", "--format=%as %h", "--", page)
        last = git("log", "-1", f"--before={self.content['date']}T23:59:59Z", "--format=%as %h")
        return min((found for found in (written, last) if found), key=lambda found: found[:10], default="").partition(" ")[2]

    def get(self, path: str) -> Any:
        """A value by a path of keys, numbers and ``key=value`` of a list's rows, such as ``rows.level=best.pause_s``.

        It starts in ``result``, or is one of the file's other fields (``date``, ``machine.processor``).
        Raises InputError for a path that leads nowhere.
        """
        found: Any = self.content
        first = path.partition(".")[0]
        if not self.own_file and (first not in found or first in self.content["result"]):
            found = self.content["result"]
        for step in path.split("."):
            try:
                found = follow(found, step)
            except (KeyError, IndexError, StopIteration, TypeError, ValueError):
                raise InputError(f"record {self.name} has no {path!r}: {step!r} is not there") from None
        return found

    def write(self, result: Any, measured: str = "") -> None:
        """Write the file: a command's JSON, with date, revision, machine and versions, its own ones if it says them.

        ``measured`` is the git revision, if it is not the one that lies here.
        """
        stamp: dict[str, Any] = {
            "date": date.today().isoformat(), "revision": measured or revision(), "machine": machine(), "versions": versions(),
        }  # fmt: skip
        if isinstance(result, dict):
            result = {"revision" if name == "git" else name: value for name, value in result.items()}
            stamp |= {name: given for name in ("revision", "machine", "versions") if (given := result.pop(name, None))}
        text = json.dumps({"command": self.command, **stamp, "result": result}, indent=1, ensure_ascii=False)
        self.path.write_text(text.replace(f"{ROOT}/", "") + "\n", encoding="utf-8")  # no path of the machine's

    def parse(self, printed: str) -> Any:
        """What the command printed. Raises InputError if it is no JSON, or if the file is not written of that."""
        if self.own_file or self.by_hand:
            way = "its command writes it" if self.own_file else f"copy what this prints into docs/data/{self.path.name}"
            raise InputError(f"record {self.name} is not written here: {way}: {self.command}")
        try:
            return json.loads(printed)
        except ValueError:
            raise InputError(f"record {self.name}: {self.command} printed no JSON; add --json") from None

    def measure(self) -> None:
        """Run the command and write what it prints. Raises InputError if it fails or prints no JSON."""
        if self.own_file or self.by_hand:
            self.parse("")
        shell = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; {self.command}"
        variables = os.environ | {"OUT": f"winnow-out/record/{self.name}-{revision()}"}
        done = subprocess.run(["sh", "-c", shell], cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"record {self.name}: {self.command} ended with exit code {done.returncode}")
        self.write(self.parse(done.stdout))

    def commits_since(self) -> int | None:
        """How many commits changed its code since it was measured; None if git or the revision is not there."""
        if not self.revision:
            return None
        count = git("rev-list", "--count", f"{self.revision}..HEAD", "--", *self.code)
        return int(count) if count else None


def git(*words: str) -> str:
    """What git prints in the repository; empty if it fails."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


def follow(found: Any, step: str) -> Any:
    """One step of a path: the row of a list with ``key=value`` (``0=value``: by its first cell), its number, or a key."""
    key, equals, value = step.partition("=")
    if isinstance(found, list):
        return next(row for row in found if str(follow(row, key)) == value) if equals else found[int(step)]
    return found[step]


def read_records() -> dict[str, Record]:
    """All records by name. Raises InputError for a field that is unknown or missing."""
    given = yaml.safe_load((DATA / "records.yaml").read_text(encoding="utf-8"))
    records = {}
    for name, fields in given.items():
        if not re.fullmatch(r"[a-z0-9_.-]+", name):
            raise InputError(f"record {name!r}: a name has small letters, digits, dots, _ and - only")
        try:
            lists = {key: tuple(fields.get(key, ())) for key in ("code", "pages")}
            records[name] = Record(name, **{**fields, **lists})
        except (TypeError, AttributeError) as error:
            raise InputError(f"record {name} in docs/data/records.yaml: {error}") from None
        if not records[name].code:
            raise InputError(f"record {name} in docs/data/records.yaml: name the code whose changes make it old")
    return records
