"""Measured numbers: one JSON file a record in ``docs/data``, written by the command that measured them.

``docs/data/records.yaml`` names every record with its command and the code that decides its numbers. A record file holds the
command's own JSON under ``result``, and when, where and at which revision it was measured::

    {"command": ..., "date": ..., "revision": ..., "machine": {...}, "versions": {...}, "result": {...}}

A record that was copied from docs/log.md by hand, because no command's output was kept, says so: ``transcribed: heading``.
"""

from __future__ import annotations

import json
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
    command: a shell command that prints JSON, run in the repository's root; for a transcribed record the one in the log.
    code: paths of the repository; a later commit to one of them makes the record old.
    transcribed: the heading in docs/log.md from which it was copied by hand; empty if a command wrote it.
    own_file: the command writes the file by itself, with its own fields (``make soak``, ``make support``).
    """

    name: str
    what: str
    command: str
    code: tuple[str, ...]
    transcribed: str = ""
    own_file: bool = False

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
    def revision(self) -> str:
        """The git revision that was measured; if the file does not say, the one that wrote it. Empty if git does not know."""
        return str(self.content.get("revision") or "").rstrip("+") or git("log", "-1", "--format=%h", "--", str(self.path))

    def get(self, path: str) -> Any:
        """A value of ``result`` by a path such as ``rows.level=best.pause_s``: keys, numbers, ``key=value`` of a list's rows.

        Raises InputError for a path that leads nowhere.
        """
        found: Any = self.content if self.own_file else self.content["result"]
        for step in path.split("."):
            try:
                found = follow(found, step)
            except (KeyError, IndexError, StopIteration, TypeError, ValueError):
                raise InputError(f"record {self.name} has no {path!r}: {step!r} is not there") from None
        return found

    def write(self, result: Any) -> None:
        """Write the file: a command's JSON, with date, revision, machine and versions."""
        stamp = {"date": date.today().isoformat(), "revision": revision(), "machine": machine(), "versions": versions()}
        given = {name: result.pop(name) for name in ("machine", "versions") if isinstance(result, dict) and name in result}
        content = {"command": self.command, **stamp, **given, "result": result}
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def measure(self) -> None:
        """Run the command and write what it prints. Raises InputError if it fails or prints no JSON."""
        if self.transcribed or self.own_file:
            way = (
                f"its command writes it: {self.command}" if self.own_file else f"copied from docs/log.md, {self.transcribed!r}"
            )
            raise InputError(f"record {self.name} is not measured here: {way}")
        here = self.command.replace("python ", f"{sys.executable} ", 1) if self.command.startswith("python ") else self.command
        bin_folder = str(Path(sys.executable).parent)
        shell = f"PATH={shlex.quote(bin_folder)}:$PATH; {here}"
        done = subprocess.run(["sh", "-c", shell], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"record {self.name}: {self.command} ended with exit code {done.returncode}")
        try:
            self.write(json.loads(done.stdout))
        except ValueError:
            raise InputError(f"record {self.name}: {self.command} printed no JSON; add --json") from None

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
    """One step of a path: the row of a list with ``key=value``, its number, or a key."""
    key, equals, value = step.partition("=")
    if isinstance(found, list):
        return next(row for row in found if str(row[key]) == value) if equals else found[int(step)]
    return found[step]


def read_records() -> dict[str, Record]:
    """All records by name. Raises InputError for a field that is unknown or missing."""
    given = yaml.safe_load((DATA / "records.yaml").read_text(encoding="utf-8"))
    records = {}
    for name, fields in given.items():
        if not re.fullmatch(r"[a-z0-9_.-]+", name):
            raise InputError(f"record {name!r}: a name has small letters, digits, dots, _ and - only")
        try:
            records[name] = Record(name, **{**fields, "code": tuple(fields["code"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"record {name} in docs/data/records.yaml: {error}") from None
    return records
