"""A folder of results that survives Ctrl-C and a full disk: one JSON line for each finished measurement, flushed at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from winnowkv.errors import InputError

Key = Callable[[dict[str, Any]], Hashable]
CONFIG = "config.yaml"


class ResultStore:
    """``results.jsonl`` in a folder, with the settings of the run in ``config.yaml`` beside it.

    Parameters
    ----------
    folder: created if it does not exist.
    config: what all lines of the folder have in common (model, prompts, dtype, ...).
    key: gives the identity of a line, so that none is computed twice.

    Raises
    ------
    InputError
        If the folder cannot be written, is being written by another run or holds results of
        other settings, or if a line is broken.
    """

    def __init__(self, folder: Path, config: dict[str, Any], key: Key) -> None:
        self.folder = folder
        self.file = folder / "results.jsonl"
        self._key = key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock", timeout=0)
            self._lock.acquire()
            self._check_config(config)
            self.lines = self._read()
            self._out = self.file.open("a", encoding="utf-8")
        except Timeout:
            raise InputError(f"another run is writing to {folder}: wait for it or use another --out") from None
        except OSError as error:
            raise InputError(f"output folder {folder} cannot be written: {error.strerror}") from None
        except InputError:
            self._lock.release()
            raise
        self._done = {key(line) for line in self.lines}

    def _check_config(self, config: dict[str, Any]) -> None:
        file, text = self.folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        if not file.exists():
            replace_text(file, text)
            return
        config = yaml.safe_load(text)  # as it is read back: YAML has lists for tuples
        before = read_config(self.folder)
        for name in sorted({*config, *before}):
            if before.get(name) != config.get(name):
                raise InputError(
                    f"{self.folder} holds results of another run ({name}: {before.get(name)!r}, now {config.get(name)!r}): "
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
        return parse_lines(self.file, whole.decode("utf-8"))

    def has(self, key: Hashable) -> bool:
        """Whether a line with this key is finished."""
        return key in self._done

    def add(self, line: dict[str, Any]) -> None:
        """Write a finished line and flush it. Raises InputError if it cannot be written."""
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
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {getattr(error, 'strerror', None) or 'not YAML'}") from None
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG} is not a YAML mapping: use another --out or remove the folder")
    return config


def parse_lines(file: Path, text: str) -> list[dict[str, Any]]:
    """Parse result lines. Raises InputError that names file and line if one is broken."""
    lines = []
    # Not splitlines(): it also splits at separators that JSON leaves as they are inside a text.
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number}: not JSON ({error.msg})") from None
    return lines


def write_json(file: Path, value: Any) -> None:
    """Write JSON as a whole: a reader sees the old file or the new one, never a part."""
    replace_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)
