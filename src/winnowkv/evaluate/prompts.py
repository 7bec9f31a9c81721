"""Needle-in-a-haystack prompts: read needles and haystacks, hide one in the other at a given depth."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from winnowkv.errors import InputError
from winnowkv.models import encode

FIELDS = ("needle", "question", "answer")
SENTENCE_END = re.compile(r"[.!?][\"']?\s+")


@dataclass(frozen=True)
class Needle:
    """A fact to hide, the question that asks for it, and the string a right output contains."""

    needle: str
    question: str
    answer: str


def read_needles(path: Path | None = None) -> list[Needle]:
    """Needles of a JSONL file, one ``{"needle", "question", "answer"}`` a line; None gives the eight of the package.

    Raises InputError with file and line for a row that is not JSON or lacks a field.
    """
    source = path or files("winnowkv.evaluate") / "data" / "needles.jsonl"
    return [Needle(*(row[field] for field in FIELDS)) for row in read_rows(source, "needle", FIELDS)]


def read_rows(source: Any, what: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each an object with these fields as texts that are not empty.

    Raises InputError with file and line for a row that is not, and for a file without rows.
    """
    shape = f"{{{', '.join(fields)}}}"
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} file {source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{what} file {source}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise InputError(f"{what} file {source}, line {number}: not a JSON object with {', '.join(fields)}")
        for field in fields:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise InputError(f"{what} file {source}, line {number}: field {field!r} is missing or not a text")
        rows.append(row)
    if not rows:
        raise InputError(f"{what} file {source}: holds no {what}; a row is {shape}")
    return rows


def read_haystack(path: Path | None = None) -> str:
    """Text of a file, or of all ``*.txt`` files of a folder in name order; None gives the package's own essays."""
    if path is None:
        return (files("winnowkv.evaluate") / "data" / "haystack.txt").read_text(encoding="utf-8")
    sources = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not sources:
        raise InputError(f"haystack folder {path}: holds no .txt file")
    try:
        return "\n\n".join(source.read_text(encoding="utf-8", errors="replace").strip() for source in sources)
    except OSError as error:
        raise InputError(f"haystack {path} cannot be read: {error.strerror}") from None


class PromptBuilder:
    """Builds prompts of an exact length from one haystack in the book form, in the model's chat template or raw.

    Raises
    ------
    InputError
        For ``chat=True`` with a tokenizer that has no chat template.
    """

    def __init__(self, tokenizer: Any, haystack: str, *, chat: bool) -> None:
        encode(tokenizer, "", chat=chat)  # complains now where there is no chat template
        self.tokenizer = tokenizer
        self.chat = chat
        self._text = haystack
        self._offsets = tokenizer(haystack, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    @property
    def haystack_tokens(self) -> int:
        """Tokens of the whole haystack."""
        return len(self._offsets)

    def build(self, needle: Needle, length: int, depth: float) -> list[int]:
        """Token ids of a prompt of ``length`` tokens with the needle near ``depth`` (0 the start, 1 the end).

        The needle goes behind the sentence that ends nearest before the depth. The count is met
        to the token where the tokenizer lets it, else it stays a token or two below.
        Raises InputError where haystack or length are too short.
        """
        overhead = len(self._ids("", needle))
        take = length - overhead - len(self.tokenizer(" " + needle.needle, add_special_tokens=False).input_ids)
        if take < 16:
            raise InputError(f"length {length} is too short: question, template and needle take {length - take} tokens")
        best: list[int] = []
        for _ in range(8):
            if take > self.haystack_tokens:
                raise InputError(
                    f"the haystack has {self.haystack_tokens} tokens, a prompt of {length} needs {take}: "
                    f"give a longer --haystack or smaller --lengths"
                )
            ids = self._ids(self._hide(needle.needle, take, depth), needle)
            if len(best) < len(ids) <= length:
                best = ids
            if len(ids) == length:
                break
            take += length - len(ids)
        return best

    def _hide(self, fact: str, take: int, depth: float) -> str:
        hay = self._text[: self._offsets[take - 1][1]]
        wanted = self._offsets[min(int(depth * take), take - 1)][0]
        ends = [match.end() for match in SENTENCE_END.finditer(hay) if match.end() <= wanted]
        at = ends[-1] if ends else 0
        return f"{hay[:at]}{fact} {hay[at:]}"

    def _ids(self, book: str, needle: Needle) -> list[int]:
        text = f"<book>{book}</book>\nBased on the content of the book, Question: {needle.question}\nAnswer:"
        return encode(self.tokenizer, text, chat=self.chat)
