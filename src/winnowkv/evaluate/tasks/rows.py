"""Read JSONL files of users and of data sets: one object per line, errors that name file and line."""

from __future__ import annotations

from functools import partial
from typing import Any

from winnowkv.errors import InputError
from winnowkv.files import parse_json, read_text


def json_rows(source: Any, what: str, hint: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file (a path, or a file of the package), each with its place in words for error messages.

    ``what`` says what a row is; ``hint`` is appended to errors about the whole file.
    Raises InputError with file and line for a row that is no JSON object, and for a file without rows.
    """
    text = read_text(source, lambda why: InputError(f"{what} file {source} {why}{hint}"))
    rows = []
    # Not splitlines(): it also splits at separators that JSON leaves as they are inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{what} file {source}, line {number}"
        row = parse_json(line, partial(_broken, where))
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object")
        rows.append((where, row))
    if not rows:
        raise InputError(f"{what} file {source}: holds no {what}{hint}")
    return rows


def _broken(where: str, why: str) -> InputError:
    return InputError(f"{where}: {why}")
