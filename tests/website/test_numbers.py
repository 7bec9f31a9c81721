"""Numbers in pages come from records, every page says what the records say, and a record's age is known."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.records import Given, given
from website import numbers, records as core
from website.numbers import Watched, ages, fill, pages, read_names, show_ages
from website.records import ROOT, Record, follow, read_records
from website.tables import markdown, render, tables
from winnowkv.errors import InputError

SPEED = given(
    "speed",
    {
        "rows": [{"level": "lean", "s": 0.5}, {"level": "best", "s": 6.66}], "columns": ["a"], "share": 0.123, "tokens": 2048,
        "tables": {"found": {"columns": ["policy", "12%"], "rows": [["full", "9"], ["snapkv", ""]]}},
    },
    date="2026-11-29", machine={"processor": "a processor"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("speed rows.level=best.s .1f", "6.7"),
        ("speed rows.0.s .2f", "0.50"),
        ("speed share .0%", "12%"),
        ("speed share", "0.123"),
        ("speed tokens ,d", "2,048"),
        ("speed rows.1.level", "best"),
        ("speed tables.found.rows.0=full.1", "9"),
        ("speed date", "2026-11-29"),
        ("speed machine.processor", "a processor"),
        ("speed rows.level=best.s / speed rows.level=lean.s .1f", "13.3"),
        ("speed rows.level=best.s / 0.001 ,.0f", "6,660"),
        ("share", "12%"),
    ],
)
def test_a_number_is_filled_in(marker: str, said: str) -> None:
    page = f"It takes <!-- n {marker} -->old<!-- /n --> so."
    filled = fill(page, SPEED, {"share": "speed share .0%"})
    assert filled == f"It takes <!-- n {marker} -->{said}<!-- /n --> so."
    assert fill(filled, SPEED, {"share": "speed share .0%"}) == filled


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("so <!-- n slow share -->1<!-- /n -->", "'slow' is unknown"),
        ("so <!-- n share -->1<!-- /n -->", "'share' is no name of docs/data/numbers.yaml"),
        ("so <!-- n speed rows.level=none.s -->1<!-- /n -->", "'level=none' is not there"),
        ("so\n- <!-- n speed share -->1<!-- /n -->", "begins a line"),
        ("<!-- table nothing -->\n<!-- /table -->", "'nothing' is neither"),
        ("<!-- table speed.lost -->\n<!-- /table -->", "'lost' is not there"),
    ],
)
def test_what_no_record_says_is_refused(page: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fill(page, SPEED, {})


def test_a_path_follows_keys_numbers_and_rows() -> None:
    assert follow([{"a": 1}, {"a": 2}], "a=2") == {"a": 2}
    assert follow([["x", 1], ["y", 2]], "0=y") == ["y", 2]
    assert follow([5, 6], "1") == 6
    assert follow({"x": 3}, "x") == 3


def test_a_table_of_a_record_is_filled_in_and_remembers_its_record() -> None:
    watched = Watched(SPEED | given("other", {}))
    filled = fill("<!-- table speed.found -->\nold\n<!-- /table -->", watched, {})
    assert filled == "<!-- table speed.found -->\n| policy | 12% |\n|---|---|\n| full | 9 |\n| snapkv | |\n<!-- /table -->"
    assert watched.asked == {"speed"}
    assert markdown(["", "a", ""], [["x", "", ""]]) == "| | a | |\n|---|---|---|\n| x | | |"
    with pytest.raises(InputError, match="2 columns has a row of 1"):
        markdown(["a", "b"], [["x"]])


def test_every_page_says_what_the_records_say() -> None:
    records = read_records()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert fill(text, records) == text, f"{page}: run make numbers"


def test_every_table_and_every_short_name_is_used() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    records = read_records()
    parts = {
        f"{name}.{part}" for name, record in records.items() for part in record.content.get("result", {}).get("tables", ())
    }
    assert not {name for name in parts if f"<!-- table {name} -->" not in text}
    assert not {name for name in read_names() if f"<!-- n {name} -->" not in text}


def test_records_and_files_belong_together() -> None:
    records = read_records()
    assert {file.stem for file in core.DATA.glob("*.json")} == set(records)
    for name, record in records.items():
        assert all((ROOT / path).exists() for path in (*record.code, *record.pages)), f"{name}: a path of it is gone"
        assert record.own_file or record.by_hand or "--json" in record.command, f"{name}: its command prints no JSON"
        assert not record.by_hand or record.transcribed, f"{name}: say from where it was copied"
        assert "/work" not in record.path.read_text(encoding="utf-8"), f"{name}: a path of one machine"
        if record.transcribed:
            page, _, heading = record.transcribed.partition(", ")
            assert f"# {heading}\n" in (ROOT / page).read_text(encoding="utf-8"), f"{name}: {page} has no heading {heading!r}"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with ``code.py`` and a log, of which ``website.records`` reads."""
    monkeypatch.setattr(core, "ROOT", tmp_path)
    monkeypatch.setattr(core, "DATA", tmp_path)
    (tmp_path / "docs").mkdir()
    git(tmp_path, "init", "-q")
    commit(tmp_path, "code.py", "1", "2026-11-01")
    return tmp_path


def git(folder: Path, *words: str, day: str = "2026-11-01") -> str:
    """What git prints, with a fixed date and author."""
    settings = [
        f"-c{one}" for one in ("user.name=a", "user.email=a@example.org", "commit.gpgsign=false", "core.hooksPath=/dev/null")
    ]
    when = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), f"{day}T12:00:00Z")
    command = ["git", "-C", str(folder), *(word for one in settings for word in ("-c", one)), *words]
    return subprocess.run(command, env=os.environ | when, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder: Path, file: str, text: str, day: str) -> str:
    """Commit a file; the revision."""
    (folder / file).write_text(text)
    git(folder, "add", file)
    git(folder, "commit", "-q", "-m", "x", day=day)
    return git(folder, "rev-parse", "HEAD")


def test_a_record_is_as_old_as_the_commits_to_its_code(repository: Path) -> None:
    def made(**content: Any) -> Record:
        return Given("r", "", "", ("code.py",), held=content)

    measured = commit(repository, "code.py", "2", "2026-11-02")
    commit(repository, "docs/log.md", "### How fast\n", "2026-11-03")
    commit(repository, "code.py", "3", "2026-11-04")
    commit(repository, "docs/other.md", "### Moved here\n", "2026-11-05")
    commit(repository, "code.py", "4", "2026-11-05")
    assert made(revision=measured).commits_since() == 2
    assert made(revision=f"{measured[:12]}+").commits_since() == 2
    assert made(revision="0" * 12).commits_since() is None
    assert made(transcribed="docs/log.md, How fast", date="2026-11-03").commits_since() == 2
    assert made(transcribed="docs/other.md, Moved here", date="2026-11-04").commits_since() == 1
    assert made(transcribed="docs/other.md, Moved here", date="2026-11-05").commits_since() == 1


def test_a_command_writes_its_record(repository: Path) -> None:
    printed = '{"git": "abc", "machine": {"processor": "p"}, "rows": ["%s"], "folder": "%s"}'
    command = f"""printf '{printed}' "$PWD/x" "$OUT" """
    Record("r", "", command, ("code.py",)).measure()
    content = json.loads((repository / "r.json").read_text())
    assert (content["revision"], content["machine"], content["command"]) == ("abc", {"processor": "p"}, command)
    assert content["result"]["rows"] == ["x"]
    assert content["result"]["folder"].startswith("winnow-out/record/r-")
    assert set(content) == {"command", "date", "revision", "machine", "versions", "result"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"command": "exit 3"}, "exit code 3"),
        ({"command": "echo hello"}, "printed no JSON"),
        ({"command": "make bench", "by_hand": True}, "copy what this prints into docs/data/r.json: make bench"),
        ({"command": "make soak", "own_file": True}, "its command writes it: make soak"),
    ],
)
def test_what_is_no_json_is_not_recorded(repository: Path, fields: dict[str, Any], said: str) -> None:
    record = Record("r", "", code=("code.py",), **fields)
    with pytest.raises(InputError, match=said):
        record.measure()
    assert not record.path.exists()


def test_what_a_command_printed_before_becomes_a_record(repository: Path) -> None:
    (repository / "printed.json").write_text('{"rows": [1]}')
    numbers.measure(["r"], {"r": Record("r", "", "x --json", ("code.py",))}, repository / "printed.json", "abc123")
    content = json.loads((repository / "r.json").read_text())
    assert (content["result"], content["revision"]) == ({"rows": [1]}, "abc123")
    with pytest.raises(InputError, match="give one name beside --result"):
        numbers.measure(["r", "r"], {"r": Record("r", "", "x", ("code.py",))}, repository / "printed.json", "")


def test_ages_name_pages_commands_and_copies_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    line = {
        "what": "",
        "revision": "abc",
        "code": [],
        "pages": ["README.md", "docs/winnow-measurements.md"],
        "measured": "2026-11-29",
    }
    name = "levels-of-quality"
    made = [
        {**line, "record": name, "commits_since": 12, "copied_from": "docs/log.md, A", "again": numbers.again_here(name)},
        {**line, "record": "bench", "commits_since": 1, "copied_from": "docs/log.md, B", "again": "winnow bench"},
        {**line, "record": "soak", "commits_since": None, "copied_from": "", "again": "make soak"},
        {**line, "record": "new", "commits_since": 0, "copied_from": "", "again": numbers.again_here("new")},
    ]  # fmt: skip
    show_ages(made)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for text in ("12+ commits", "1+ commit ", "unknown", "unchanged", "2026-11-29*"):
        assert text in said
    told = " ".join(said.split())
    assert "Measure again: python -m website.numbers record levels-of-quality Measure again: make soak To be copied" in told
    assert told.endswith("bench.")


def test_ages_of_records_come_from_their_files() -> None:
    speed = SPEED["speed"]
    (line,) = ages(SPEED, {"speed": ["README.md"]})
    assert line["measured"] == "2026-11-29"
    assert line["again"] == "python -m website.numbers record speed"
    assert line["pages"] == ["README.md"]
    assert line["commits_since"] == speed.commits_since()


def test_every_table_function_is_one_that_a_page_could_use() -> None:
    records = read_records()
    for name in tables():
        made = render(name, records)
        assert made.startswith(("|", "```"))
        assert "nan" not in made.lower()
