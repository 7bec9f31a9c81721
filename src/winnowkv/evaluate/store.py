"""A folder of results that survives Ctrl-C: one JSON line a finished measurement, flushed at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from winnowkv.errors import InputError

Key = Callable[[dict[str, Any]], Hashable]


class ResultStore:
    """``results.jsonl`` in a folder, with the settings of the run in ``config.json`` beside it.

    Parameters
    ----------
    folder: made if it is not there.
    config: what must be equal for lines to belong together (model, prompts, dtype, ...).
    key: what identifies a line, so that none is computed twice.

    Raises
    ------
    InputError
        Where the folder cannot be written, is being written by another run, holds results of
        other settings, or a line is broken.
    """

    def __init__(self, folder: Path, config: dict[str, Any], key: Key) -> None:
        self.folder = folder
        self.file = folder / "results.jsonl"
        self._key = key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock", timeout=0)
            self._lock.acquire()
            self._settle_config(config)
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

    def _settle_config(self, config: dict[str, Any]) -> None:
        file = self.folder / "config.json"
        if not file.exists():
            write_json(file, config)
            return
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise InputError(f"{file} is not JSON: use another --out or remove the folder") from None
        for name in sorted({*config, *before}):
            if before.get(name) != config.get(name):
                raise InputError(
                    f"{self.folder} holds results of another run ({name}: {before.get(name)!r}, now {config.get(name)!r}): "
                    f"use another --out or remove the folder"
                )

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        raw = self.file.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            # Killed in the middle of a line: that measurement is done again.
            os.truncate(self.file, len(whole))
        lines = []
        for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{self.file}, line {number}: not JSON ({error.msg})") from None
        return lines

    def has(self, key: Hashable) -> bool:
        """Whether a line with this key is finished."""
        return key in self._done

    def add(self, line: dict[str, Any]) -> None:
        """Write a finished line through to the file."""
        self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._out.flush()
        self.lines.append(line)
        self._done.add(self._key(line))

    def close(self) -> None:
        """Close the file and let other runs in."""
        self._out.close()
        self._lock.release()


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, file)
