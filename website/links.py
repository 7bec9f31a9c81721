"""Markdown of the repository as the site needs it: links out of ``docs``, markers of numbers, lists right below a paragraph."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
MARKER = re.compile(r"<!-- /?(?:n|table)\b.*?-->")
ITEM = re.compile(r"(?:[-*] |\d+\. )")


def rewrite(text: str, source: str, page: str, pages: Mapping[str, str], repository: str | None = None) -> str:
    """A file's Markdown for its page.

    ``source``: the file's path in the repository, ``page``: the page's path below ``docs``. ``pages``: for a path in the
    repository the page made of it. What has no page and lies outside ``docs`` becomes a link into the ``repository``, an
    address, or without one plain text with the path.
    """
    folder, here = posixpath.dirname(source), posixpath.dirname(page)

    def target(found: re.Match[str]) -> str:
        label, address = found[1], found[2]
        path, mark, anchor = address.partition("#")
        if not path or re.match(r"[a-z]+:", address):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, path))
        inside = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is not None:
            return f"[{label}]({posixpath.relpath(inside, here or '.')}{mark}{anchor})"
        if repository:
            return f"[{label}]({repository.rstrip('/')}/blob/main/{path}{mark}{anchor})"
        return label if label.strip("`") == path else f"{label} (`{path}`)"

    lines = []
    for line, code in each_line(text):
        lines.append(line if code else LINK.sub(target, MARKER.sub("", line)))
    return loosened("\n".join(lines))


def each_line(text: str) -> Iterator[tuple[str, bool]]:
    """Every line, and whether it belongs to a block of code."""
    fence = ""
    for line in text.split("\n"):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if not fence and mark:
            fence = mark[1]
            yield line, True
        elif fence:
            yield line, True
            fence = "" if line.strip() == fence else fence
        else:
            yield line, False


def loosened(text: str) -> str:
    """With an empty line before each list and table that follows a paragraph at once, as Python's Markdown wants it."""
    out: list[str] = []
    for line, code in each_line(text):
        before = out[-1] if out else ""
        begins = (ITEM.match(line) and not ITEM.match(before)) or (line.startswith("|") and not before.startswith("|"))
        if not code and begins and before.strip() and not before.startswith((" ", "#")):
            out.append("")
        out.append(line)
    return "\n".join(out)
