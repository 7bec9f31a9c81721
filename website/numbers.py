"""Numbers once: README and docs take their numbers and tables from the records in ``docs/data``.

A page holds markers, which are comments of Markdown and so cannot be seen; what stands between them is filled in:

    <!-- n levels rows.level=best.pause_s .1f -->6.7<!-- /n --> s      one number: record, path, format
    <!-- table costs -->                                               a table of website/tables.py,
    | ...                                                              or of a record's columns and rows
    <!-- /table -->

    python -m website.numbers            fill all pages, then say which records are older than their code (make numbers)
    python -m website.numbers check      exit 1 if a page does not say what the records say
    python -m website.numbers record levels ...   run the commands of these records and write their files
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from website.records import ROOT, Record, read_records
from website.tables import render
from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError

NUMBER = re.compile(r"<!-- n (?P<record>\S+) (?P<path>.+?)(?: (?P<format>[^ ]*[dfgs%]))? -->.*?<!-- /n -->")
TABLE = re.compile(r"<!-- table (?P<name>\S+) -->\n.*?<!-- /table -->", re.DOTALL)


def pages() -> Iterator[Path]:
    """README and every page of the docs."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def fill(text: str, records: Mapping[str, Record]) -> str:
    """A page with what the records say between its markers. Raises InputError for a record or a path that is not there."""

    def number(found: re.Match[str]) -> str:
        name, path, form = found["record"], found["path"], found["format"] or ""
        if name not in records:
            raise InputError(f"record {name!r} is unknown: {found[0]}")
        opening = found[0].partition("-->")[0]
        return f"{opening}-->{records[name].get(path):{form}}<!-- /n -->"

    def table(found: re.Match[str]) -> str:
        return f"<!-- table {found['name']} -->\n{render(found['name'], records)}\n<!-- /table -->"

    return TABLE.sub(table, NUMBER.sub(number, text))


def used(records: Mapping[str, Record]) -> dict[str, list[str]]:
    """The pages that name each record by themselves; a table's function may use more."""
    found: dict[str, list[str]] = {name: [] for name in records}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for name in {match["record"] for match in NUMBER.finditer(text)} | {match["name"] for match in TABLE.finditer(text)}:
            found.setdefault(name, []).append(page.name)
    return found


def show_ages(records: Mapping[str, Record]) -> None:
    """Print each record's date, revision, and whether its code has changed since."""
    table = Table("record", "measured", "at", "code since", title="numbers in README and docs")
    for name, record in sorted(records.items()):
        commits = record.commits_since()
        age = "unknown" if commits is None else f"{commits} commits" if commits else "unchanged"
        by_hand = " (copied from the log)" if record.transcribed else ""
        table.add_row(name, str(record.content.get("date", "")) + by_hand, record.revision[:9], age)
    Console(width=80 if not sys.stdout.isatty() else None).print(table)


def main(words: Sequence[str] | None = None) -> None:
    """Fill, check or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", nargs="?", choices=("fill", "check", "record"), default="fill")
    parser.add_argument("names", nargs="*", help="records to measure")
    args = parser.parse_args(words)
    records = read_records()
    if args.do == "record":
        for name in args.names:
            if name not in records:
                raise InputError(f"record {name!r} is unknown: it is one of {', '.join(sorted(records))}")
            records[name].measure()
        return
    changed = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        filled = fill(text, records)
        if filled != text:
            changed.append(str(page.relative_to(ROOT)))
            if args.do == "fill":
                page.write_text(filled, encoding="utf-8")
    if args.do == "check" and changed:
        raise InputError(f"{', '.join(changed)} differ from docs/data: run make numbers")
    print(
        f"filled: {', '.join(changed) or 'nothing had changed'}" if args.do == "fill" else "all pages say what docs/data says"
    )
    if args.do == "fill":
        show_ages(records)


if __name__ == "__main__":
    with one_sentence("numbers"):
        main()
