"""Numbers once: README and docs take their numbers and tables from the records in ``docs/data``.

A page holds markers, which are comments of Markdown and so cannot be seen; what stands between them is filled in:

    <!-- n levels rows.level=best.pause_s .1f -->6.7<!-- /n --> s      one number: record, path, format
    <!-- n levels rows.0.step_ms / levels rows.1.step_ms .1f -->1.2<!-- /n -->      one over another, or over 0.001 (s to ms)
    <!-- n streams -->33<!-- /n -->                                    a short name of docs/data/numbers.yaml
    <!-- table costs -->                                               a table of website/tables_*.py,
    | ...                                                              of a record (RECORD), or one of its tables (RECORD.NAME)
    <!-- /table -->

A number's marker is never the first thing of a line, where Markdown would take it for a block of its own.

    python -m website.numbers [--json]           fill all pages, then say which records are older than their code (make numbers)
    python -m website.numbers check              exit 1 if a page does not say what the records say
    python -m website.numbers record NAME ...    run the commands of these records and write their files
    python -m website.numbers record NAME --result FILE [--revision REVISION]    write it from what its command printed already
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from website.records import DATA, ROOT, Record, read_records
from website.tables import render
from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError
from winnowkv.files import read_text

NUMBER = re.compile(r"<!-- n (?P<said>.+?) -->.*?<!-- /n -->")
SAID = re.compile(r"(?P<terms>.+?)(?: (?P<format>[,.0-9]*[dfgs%]))?")
TABLE = re.compile(r"<!-- table (?P<name>\S+) -->\n.*?<!-- /table -->", re.DOTALL)
NOTHING_BEFORE = re.compile(r"[\s>*+-]*")  # of a line: blanks, a quote's or an item's mark
WIDTH = 80


class Watched(dict[str, Record]):
    """Records by name, which remember whether they were asked for."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        super().__init__(records)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Record:
        self.asked.add(name)
        return super().__getitem__(name)


def pages() -> Iterator[Path]:
    """README and every page of the docs."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def value(term: str, records: Mapping[str, Record]) -> Any:
    """What ``RECORD PATH`` says, or the number that a term is. Raises InputError for a record or a path that is not there."""
    if re.fullmatch(r"[0-9.]+", term):
        return float(term)
    name, _, path = term.partition(" ")
    if name not in records:
        raise InputError(f"record {name!r} is unknown: {term}")
    return records[name].get(path)


def read_names() -> dict[str, str]:
    """Short names of numbers: record, path and format of each."""
    names: dict[str, str] = yaml.safe_load((DATA / "numbers.yaml").read_text(encoding="utf-8"))
    return names


def fill(text: str, records: Mapping[str, Record], names: Mapping[str, str] | None = None) -> str:
    """A page with what the records say between its markers; ``names``: of docs/data/numbers.yaml if None.

    Raises InputError for a record, a path or a name that is not there, and for a number's marker that begins a line.
    """
    short = read_names() if names is None else names

    def number(found: re.Match[str]) -> str:
        if NOTHING_BEFORE.fullmatch(text, text.rfind("\n", 0, found.start()) + 1, found.start()):
            raise InputError(f"{found[0]} begins a line, where Markdown makes a block of it: put a word before it")
        said = found["said"]
        if " " not in said and said not in short:
            raise InputError(f"{found[0]}: {said!r} is no name of docs/data/numbers.yaml: {', '.join(sorted(short))}")
        parts = SAID.fullmatch(short.get(said, said))
        assert parts is not None
        first, *others = (value(term, records) for term in parts["terms"].split(" / "))
        for other in others:
            first /= other
        return f"<!-- n {said} -->{first:{parts['format'] or ''}}<!-- /n -->"

    def table(found: re.Match[str]) -> str:
        return f"<!-- table {found['name']} -->\n{render(found['name'], records)}\n<!-- /table -->"

    return TABLE.sub(table, NUMBER.sub(number, text))


def ages(records: Mapping[str, Record], used: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Of each record what it says, when and how it was measured, how many commits changed its code since, and who uses it."""
    return [
        {
            "record": name, "what": record.what, "measured": record.content.get("date", ""), "revision": record.revision,
            "code": list(record.code), "commits_since": record.commits_since(), "copied_from": record.transcribed,
            "pages": [*used.get(name, ()), *record.pages], "again": again(record),
        }
        for name, record in sorted(records.items())
    ]  # fmt: skip


def again(record: Record) -> str:
    """The command that measures a record again."""
    return record.command if record.by_hand or record.own_file else again_here(record.name)


def again_here(*names: str) -> str:
    """The command that runs the commands of these records."""
    return f"python -m website.numbers record {' '.join(names)}"


def show_ages(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print each record's date, whether its code has changed since, and what to do about it."""
    table = Table("record", "measured", "code since", "used by", title="numbers in README and docs", padding=(0, 1, 0, 0))
    for line in lines:
        commits, copied = line["commits_since"], bool(line["copied_from"])
        age = (
            "unchanged"
            if commits == 0
            else "unknown"
            if commits is None
            else f"{commits}{'+' * copied} commit{'s' * (commits > 1)}"
        )
        used = ", ".join(Path(page).stem for page in line["pages"]) or "no page"
        table.add_row(line["record"], f"{line['measured']}{'*' * copied}", age, used)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    tell("* copied by hand, by a heading of docs/log.md or of a page; N+ commits: at least so many, since that was written.")
    old = [line for line in lines if line["commits_since"] != 0]
    names, commands = [], []
    for line in old:
        if line["again"] == again_here(line["record"]):
            names.append(line["record"])
        elif not line["copied_from"] and line["again"] not in commands:
            commands.append(line["again"])
    for command in [again_here(*names), *commands] if names else commands:
        tell(f"Measure again: {command}")
    rest = [line["record"] for line in old if line["copied_from"] and line["record"] not in names]
    if rest:
        tell(f"To be copied by hand again from what their commands print (docs/data/records.yaml): {', '.join(rest)}.")


def tell(text: str) -> None:
    """Print a text in lines of the terminal's usual width."""
    print(textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def measure(names: Sequence[str], records: Mapping[str, Record], printed: Path | None, revision: str) -> None:
    """Run the commands of records and write their files, or write one of what its command has printed."""
    for name in names:
        if name not in records:
            raise InputError(f"record {name!r} is unknown: it is one of {', '.join(sorted(records))}")
    if not names or (printed is not None and len(names) > 1):
        raise InputError(f"record: give {'the names of records' if printed is None else 'one name beside --result'}")
    for name in names:
        if printed is None:
            records[name].measure()
        else:
            text = read_text(printed, lambda why: InputError(f"--result {printed} {why}"))
            records[name].write(records[name].parse(text), revision)


def main(words: Sequence[str] | None = None) -> None:
    """Fill, check or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", nargs="?", choices=("fill", "check", "record"), default="fill")
    parser.add_argument("names", nargs="*", help="records to measure")
    parser.add_argument("--json", action="store_true", help="after filling, print the records' ages as JSON and nothing else")
    parser.add_argument("--result", type=Path, help="with record and one name: the JSON that its command printed")
    parser.add_argument("--revision", default="", help="with --result: the git revision that was measured")
    args = parser.parse_args(words)
    records = read_records()
    if args.do == "record":
        measure(args.names, records, args.result, args.revision)
        return
    changed = []
    names = read_names()
    used: dict[str, list[str]] = {}
    for page in pages():
        text, watched = page.read_text(encoding="utf-8"), Watched(records)
        filled = fill(text, watched, names)
        for name in watched.asked:
            used.setdefault(name, []).append(str(page.relative_to(ROOT)))
        if filled != text:
            changed.append(str(page.relative_to(ROOT)))
            if args.do == "fill":
                page.write_text(filled, encoding="utf-8")
    if args.do == "check":
        if changed:
            raise InputError(f"{', '.join(changed)} differ from docs/data: run make numbers")
        print("all pages say what docs/data says")
    elif args.json:
        print(json.dumps(ages(records, used), indent=1, ensure_ascii=False))
    else:
        tell(f"filled: {', '.join(changed) or 'nothing had changed'}")
        show_ages(ages(records, used))


if __name__ == "__main__":
    with one_sentence("numbers"):
        main()
