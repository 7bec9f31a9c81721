"""Needle-in-a-haystack prompts: read needles and haystacks, and hide needles at given depths."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from winnowkv.errors import InputError
from winnowkv.evaluate.tasks.rows import json_rows
from winnowkv.files import plain_lines, read_bytes
from winnowkv.prompt.chat import encode

NEEDLE_FIELDS = ("needle", "question", "answer")
FIELD_ALIASES = {"answer": "real_needle"}  # its name in the needle files of the retrieval-head papers
SENTENCE_END = re.compile(r"[.!?][\"']?\s+")
VARIANTS = ("single", "multi", "multi-hop")
DEFAULT_NEEDLE_COUNT = 3  # needles of a multi-needle prompt


@dataclass(frozen=True)
class Needle:
    """A fact to hide, the question that asks for it, and the string a right output contains."""

    needle: str
    question: str
    answer: str

    @property
    def needles(self) -> tuple[str, ...]:
        return (self.needle,)

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.answer,)


@dataclass(frozen=True)
class NeedleSet:
    """Several facts to hide, one question that needs all of them, and the strings a right output contains."""

    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


Hidden = Needle | NeedleSet


def read_variant(variant: str, path: Path | None = None, count: int | None = None) -> list[Hidden]:
    """The facts and questions of a variant of the test; ``path`` None reads the package's own.

    Variants
    --------
    single: one needle per prompt.
    multi: ``count`` needles per prompt (:data:`DEFAULT_NEEDLE_COUNT` if None), asked for in one question.
    multi-hop: a chain of facts, of which the first names what the next is about.

    Raises InputError for an unknown variant, a count for another variant than multi, and broken files.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant {variant!r} is unknown: use one of {', '.join(VARIANTS)}")
    if variant == "multi":
        return list(needle_sets(read_needles(path), DEFAULT_NEEDLE_COUNT if count is None else count))
    if count is not None:
        raise InputError(f"a count of {count} needles is for the variant 'multi', not for {variant!r}: leave it out")
    return list(read_needles(path)) if variant == "single" else list(read_chains(path))


def read_needles(path: Path | None = None) -> list[Needle]:
    """Needles of a JSONL file, one ``{"needle", "question", "answer"}`` per line; None reads the eight of the package.

    If ``answer`` is absent, ``real_needle`` is read.
    Raises InputError with file and line for a row that is not JSON or lacks a field.
    """
    source = path or files("winnowkv.evaluate.needle") / "data" / "needles.jsonl"
    return [
        Needle(*(row[field] for field in NEEDLE_FIELDS))
        for row in read_rows(source, "needle", NEEDLE_FIELDS, aliases=FIELD_ALIASES)
    ]


def needle_sets(needles: Sequence[Needle], count: int) -> list[NeedleSet]:
    """Sets of ``count`` consecutive needles of the list, one set starting at each needle.

    The list is circular, so that every needle is at every place of a set once.
    """
    if not 2 <= count <= len(needles):
        raise InputError(
            f"{count} needles a prompt cannot be made of the {len(needles)} in the file: ask for 2 to {len(needles)}"
        )
    sets = []
    for start in range(len(needles)):
        chosen = [needles[(start + step) % len(needles)] for step in range(count)]
        question = f"{' '.join(needle.question for needle in chosen)} Answer all {count} questions."
        sets.append(NeedleSet(tuple(n.needle for n in chosen), question, tuple(n.answer for n in chosen)))
    return sets


def read_chains(path: Path | None = None) -> list[NeedleSet]:
    """Chains of a JSONL file, one ``{"needles": [...], "question", "answer"}`` per line; None reads the six of the package.

    Raises InputError with file and line for a row that is not JSON or lacks a field.
    """
    source = path or files("winnowkv.evaluate.needle") / "data" / "chains.jsonl"
    rows = read_rows(source, "chain", ("question", "answer"), lists=("needles",))
    return [NeedleSet(tuple(row["needles"]), row["question"], (row["answer"],)) for row in rows]


def read_rows(
    source: Any, what: str, fields: Sequence[str], *, lists: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each an object with non-empty texts in these fields.

    ``lists`` are fields that hold two such texts or more; ``aliases`` are other names, read if a field is absent.
    Raises InputError with file and line for any other row, and for a file without rows.
    """
    shape = f"; a row is {{{', '.join([*lists, *fields])}}}"
    rows = []
    for where, row in json_rows(source, what, shape):
        for field, alias in (aliases or {}).items():
            if field not in row and alias in row:
                row[field] = row[alias]
        for field in lists:
            texts = row.get(field)
            if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
                raise InputError(f"{where}: field {field!r} is not a list of two texts or more")
        for field in fields:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise InputError(f"{where}: field {field!r} is missing or not a text")
        rows.append(row)
    return rows


def read_haystack(path: Path | None = None) -> str:
    """Text of a file, or of all ``*.txt`` files in and below a folder, in name order; None reads the package's essays."""
    if path is None:
        return (files("winnowkv.evaluate.needle") / "data" / "haystack.txt").read_text(encoding="utf-8")
    sources = sorted(path.rglob("*.txt")) if os.path.isdir(path) else [path]  # unlike Path.is_dir() it raises for no name
    if not sources:
        raise InputError(f"haystack folder {path}: holds no .txt file")
    texts = [read_bytes(source, lambda why: InputError(f"haystack {path} {why}")) for source in sources]
    return "\n\n".join(plain_lines(text.decode("utf-8-sig", "replace")).strip() for text in texts)


class PromptBuilder:
    """Builds prompts of an exact length in tokens from one haystack, in the model's chat template or raw.

    Raises
    ------
    InputError
        For ``chat=True`` with a tokenizer that has no chat template.
    """

    def __init__(self, tokenizer: Any, haystack: str, *, chat: bool) -> None:
        encode(tokenizer, "", chat=chat)  # raises now if there is no chat template
        self.tokenizer = tokenizer
        self.chat = chat
        self._text = haystack
        self._offsets = tokenizer(haystack, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    @property
    def haystack_tokens(self) -> int:
        """Tokens of the whole haystack."""
        return len(self._offsets)

    def build(self, hidden: Hidden, length: int, depth: float) -> list[int]:
        """Token ids of a prompt of ``length`` tokens with the first needle near ``depth`` (0 the start, 1 the end).

        More needles are spread evenly from there; after the end they continue at the start. A needle
        is put after the last sentence that ends before its depth. The length is exact if the
        tokenizer allows it, else a token or two shorter.
        Raises InputError if the haystack or the length is too short.
        """
        overhead = len(self._ids("", hidden))
        facts = "".join(f" {fact}" for fact in hidden.needles)
        take = length - overhead - len(self.tokenizer(facts, add_special_tokens=False).input_ids)
        if take < 16:
            raise InputError(f"length {length} is too short: question, template and needle take {length - take} tokens")
        best: list[int] = []
        for _ in range(8):
            if take > self.haystack_tokens:
                raise InputError(
                    f"the haystack has {self.haystack_tokens} tokens, a prompt of {length} needs {take}: "
                    f"give a longer --haystack or smaller --lengths"
                )
            ids = self._ids(self._hide(hidden.needles, take, depth), hidden)
            if len(best) < len(ids) <= length:
                best = ids
            if len(ids) == length:
                break
            take += length - len(ids)
        return best

    def _hide(self, facts: Sequence[str], take: int, depth: float) -> str:
        book = self._text[: self._offsets[take - 1][1]]
        ends = [0, *(match.end() for match in SENTENCE_END.finditer(book))]
        wanted = [self._offsets[min(int(at * take), take - 1)][0] for at in spread(depth, len(facts))]
        places = [ends[bisect_right(ends, at) - 1] for at in wanted]
        # From the last to the first, so that an insertion does not move the places of those that follow.
        for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
            book = f"{book[:place]}{fact} {book[place:]}"
        return book

    def _ids(self, book: str, hidden: Hidden) -> list[int]:
        text = f"<book>{book}</book>\nBased on the content of the book, Question: {hidden.question}\nAnswer:"
        return encode(self.tokenizer, text, chat=self.chat)


def spread(depth: float, count: int) -> list[float]:
    """Depths of ``count`` needles, evenly spread from ``depth``; after 1 they continue at 0."""
    steps = [depth + step / count for step in range(count)]
    return [at if at <= 1 else at - 1 for at in steps]
