"""A folder of results that survives Ctrl-C and a full disk: one JSON line for each finished measurement, flushed at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from winnowkv.errors import InputError
from winnowkv.files import decode, parse_json, parse_yaml, read_text, reason, shown, write_text

Key = Callable[[dict[str, Any]], Hashable]
CONFIG = "config.yaml"


class ResultStore:
    """``results.jsonl`` in a folder, with the settings of the run in ``config.yaml`` beside it.

    Parameters
    ----------
    folder: created if it does not exist.
    config: what all lines of the folder have in common (model, prompts, dtype, ...).
    key: gives the identity of a line, so that none is computed twice.
    fault: says what is wrong with a line that was read, None for a good one.

    Raises
    ------
    InputError
        If the folder cannot be written, is being written by another run or holds results of
        other settings, or if a line is broken.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], key: Key, fault: Callable[[dict[str, Any]], str | None] | None = None
    ) -> None:
        self.folder = folder
        self.file = folder / "results.jsonl"
        self._key = key
        self._fault = fault
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock", timeout=0)
            self._lock.acquire()
            self._check_config(config)
            self.lines = self._read()
            self._done = {self._checked_key(number, line) for number, line in enumerate(self.lines, 1)}
            self._out = self.file.open("a", encoding="utf-8")
        except Timeout:
            raise InputError(f"another run is writing to {folder}: wait for it or use another --out") from None
        except OSError as error:
            raise InputError(f"output folder {folder} cannot be written: {error.strerror}") from None
        except InputError:
            self._lock.release()
            raise

    def _check_config(self, config: dict[str, Any]) -> None:
        file, text = self.folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        if not file.exists():
            replace_text(file, text)
            return
        config = yaml.safe_load(text)  # as it is read back: YAML has lists for tuples
        before = read_config(self.folder)
        for name in sorted({*config, *before}):
            if before.get(name) != config.get(name):
                found, now = shown(before.get(name)), shown(config.get(name))
                raise InputError(
                    f"{self.folder} holds results of another run ({name}: {found}, now {now}): "
                    f"use another --out or remove the folder"
                )

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        # A run that was killed, or a full disk, can leave half a line: that measurement is repeated.
        raw = self.file.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.file, len(whole))
        return parse_lines(self.file, decode(whole, partial(_broken, self.file)))

    def _checked_key(self, number: int, line: dict[str, Any]) -> Hashable:
        fault = self._fault(line) if self._fault is not None else None
        try:
            found = self._key(line)
            hash(found)
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"has {reason(error)}"
            fault = fault or f"it is no line of this command, it {what}"
        if fault:
            raise InputError(f"{self.file}, line {number}: {fault}")
        return found

    def has(self, key: Hashable) -> bool:
        """Whether a line with this key is finished."""
        return key in self._done

    def add(self, line: dict[str, Any]) -> None:
        """Write a finished line and flush it; what is not a finite number is null in it. Raises InputError if it cannot."""
        line = {name: _finite(value) for name, value in line.items()}
        try:
            self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._out.flush()
        except OSError as error:
            raise InputError(
                f"{self.file} cannot be written: {error.strerror}. {len(self.lines)} finished lines are safe in it; "
                f"make room and run the same command again"
            ) from None
        self.lines.append(line)
        self._done.add(self._key(line))

    def close(self) -> None:
        """Close the file and release the folder for other runs."""
        try:
            self._out.close()
        except OSError:
            pass  # add() has reported it; closing tries to write the same bytes again
        finally:
            self._lock.release()


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run. Raises InputError if the folder holds none or they are broken."""

    def fail(why: str) -> InputError:
        return InputError(f"{folder / CONFIG} {why}: use another --out or remove the folder")

    config = parse_yaml(read_text(folder / CONFIG, fail), fail)
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise fail("is not a YAML mapping of names to values")
    return config


def parse_lines(file: Path, text: str) -> list[dict[str, Any]]:
    """Parse result lines. Raises InputError that names file and line if one is broken."""
    lines = []
    # Not splitlines(): it also splits at separators that JSON leaves as they are inside a text.
    for number, text_line in enumerate(text.split("\n")[:-1], 1):
        line = parse_json(text_line, partial(_broken, f"{file}, line {number}:"))
        if not isinstance(line, dict):
            raise InputError(f"{file}, line {number}: not a JSON object")
        lines.append(line)
    return lines


def _broken(what: Any, why: str) -> InputError:
    return InputError(f"{what} {why}")


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def write_json(file: Path, value: Any) -> None:
    """Write JSON as a whole: a reader sees the old file or the new one, never a part."""
    replace_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_text(file: Path, text: str, what: str = "") -> None:
    """Write a text file as a whole or not at all. Raises InputError if it cannot be written."""
    write_text(file, text, lambda why: InputError(f"{what}{file} {why}"))
