"""Docstrings of the package as pages need them: their sections, and the form that mkdocstrings reads.

In the package a section is ``Parameters`` with a line of dashes below it, and an item is ``name: text`` or
``name, name: text``. numpydoc, which mkdocstrings reads, wants the text below the name. :class:`HouseStyle` turns one into
the other while Griffe collects the package (``mkdocs.yml``).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

import winnowkv

NUMPYDOC = {"Parameters", "Attributes"}  # sections of items that numpydoc knows
ITEMS = NUMPYDOC | {"Class attributes"}
KEPT = {"Returns", "Yields", "Raises", "Examples"}  # have numpydoc's form already
ITEM = re.compile(r"([a-z_][\w]*(?:, [a-z_][\w]*)*): ")
NEXT_ITEM = re.compile(r"(?<=[.)]) (?=[a-z_]{3,}(?:, [a-z_]+)*: )")  # "cache: after it was read. ids: all tokens"
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")


def sections(docstring: str | None) -> dict[str, str]:
    """A docstring's sections by their headings, in order; what comes before the first one is under ``""``."""
    found: dict[str, list[str]] = {"": []}
    lines = inspect.cleandoc(docstring or "").split("\n")
    heading = ""
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and re.fullmatch(r"-{3,}", below):
            found[heading := line] = []
        elif not (re.fullmatch(r"-{3,}", line) and not found[heading]):
            found[heading].append(line)
    return {name: "\n".join(text).strip("\n") for name, text in found.items()}


def items(section: str) -> dict[str, str]:
    """What a section says of each name; names that are explained together have the same text."""
    texts: list[str] = []
    for line in section.split("\n"):
        if ITEM.match(line):
            texts += NEXT_ITEM.split(line)
        elif texts and line.startswith(" "):
            first, *more = NEXT_ITEM.split(f"{texts[-1]} {line.strip()}")
            texts[-1:] = [first, *more]
    found = {}
    for text in texts:
        names, _, said = text.partition(": ")
        found.update(dict.fromkeys(names.split(", "), said))
    return found


def markdown(text: str) -> str:
    """Sphinx roles as code, linked where they name something public."""

    def link(role: re.Match[str]) -> str:
        name = role[1].removeprefix("winnowkv.")
        short = role[1].rsplit(".", 1)[-1] if "~" in role[0] or role[1].startswith("winnowkv.") else role[1]
        public = next((part for part in (name.partition(".")[0], name.rsplit(".", 1)[-1]) if part in winnowkv.__all__), None)
        return f"[`{short}`][winnowkv.{public}]" if public else f"`{short}`"

    return ROLE.sub(link, text)


def numpydoc(docstring: str) -> str:
    """The docstring with its items as numpydoc has them, and headings that numpydoc does not know as bold text."""
    texts, known = [], []  # what numpydoc knows comes last: it would take all that follows for a part of it
    for heading, section in sections(docstring).items():
        said = section if heading == "Examples" else markdown(section)
        if heading in NUMPYDOC:
            texts.append(rest(said))
            said = "\n".join(f"{name}\n    {about}" for name, about in items(said).items())
        elif heading in ITEMS:
            said = "\n".join(f"- `{name}`: {about}" for name, about in items(said).items()) + f"\n\n{rest(said)}"
        if heading in NUMPYDOC | KEPT:
            known.append(f"{heading}\n{'-' * len(heading)}\n{said}")
        else:
            texts.append(f"**{heading}**\n\n{said}" if heading else said)
    return "\n\n".join(filter(None, [*texts, *known]))


def rest(section: str) -> str:
    """Paragraphs of a section that are no items."""
    return "\n\n".join(each for each in section.split("\n\n") if each.strip() and not ITEM.match(each))


class HouseStyle(griffe.Extension):
    """Turns the docstrings of the package into numpydoc's form."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """One object was collected."""
        if obj.docstring is not None:
            obj.docstring.value = numpydoc(obj.docstring.value)
