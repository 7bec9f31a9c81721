"""Read JSONL files of users and of data sets: one object per line, errors that name file and line."""

from __future__ import annotations

import json
from typing import Any

from winnowkv.errors import InputError


def json_rows(source: Any, what: str, hint: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file (a path, or a file of the package), each with its place in words for error messages.

    ``what`` says what a row is; ``hint`` is appended to errors about the whole file.
    Raises InputError with file and line for a row that is no JSON object, and for a file without rows.
    """
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} file {source} cannot be read: {getattr(error, 'strerror', None) or error}{hint}") from None
    rows = []
    # Not splitlines(): it also splits at separators that JSON leaves as they are inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{what} file {source}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object")
        rows.append((where, row))
    if not rows:
        raise InputError(f"{what} file {source}: holds no {what}{hint}")
    return rows
