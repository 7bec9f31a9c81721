"""Pictures are drawn from records alone, each from a small one here, and pages show exactly the pictures that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from website.figures import FILES, audits, bench, needle_map, style
from website.figures.__main__ import main
from website.numbers import pages
from website.records import ROOT, Record, read_records
from winnowkv.errors import InputError

PICTURES = ROOT / "docs" / "pictures"
NOT_DRAWN = {"serve.png", "way.svg"}  # of a server that answers (benchmarks/serve_picture.py); a drawing without numbers
LINK = re.compile(r"!\[[^\]]*\]\((?P<path>[^)\s]+\.(?:png|svg))\)|<img[^>]*src=\"(?P<source>[^\"]+\.(?:png|svg))\"")
BEST = "winnow:lookahead=64:draft=64:rounds=2:refit=true"


class Given(Record):
    """A record with a result that is given in place of a file."""

    @property
    def content(self) -> dict[str, Any]:
        return {"date": "2026-11-29", "machine": {"processor": "a CPU", "threads": 1}, "result": json.loads(self.what)}


def given(name: str, result: Any) -> Given:
    return Given(name, json.dumps(result), "", ())


def group(policy: str, budget: float, share: float, *, kept: float, after: bool = True, **more: Any) -> dict[str, Any]:
    interval = {"mean": share, "low": share - 0.05, "high": min(share + 0.05, 1.0)}
    nothing = dict.fromkeys(("mean", "low", "high"))
    return {
        "policy": policy, "budget": budget, "whole": False, "prompts": 3, "whole_answers": 0, "agreement": interval,
        "prompts_after": 3 if after else 0, "agreement_after": interval if after else nothing,
        "kept_bytes": 100 * kept, "full_bytes": 100, **more,
    }  # fmt: skip


def audit_of(after: bool) -> dict[str, Any]:
    evicting = {"winnow": 0.8, "snapkv": 0.6, "cake": 0.7, "random": 0.4, "winnow:lookahead=64": 0.9, BEST: 0.95}
    groups = [
        group(policy, budget, share + budget / 10, kept=budget, after=after)
        for policy, share in evicting.items()
        for budget in (0.06, 0.5)
    ]
    groups += [group("int8", budget, 0.99, kept=0.53, after=after, whole=True) for budget in (0.06, 0.5)]
    if not after:  # no answer was long enough for the levels that look to evict anything
        for one in groups:
            one["whole_answers"] = 3 if "lookahead" in one["policy"] else 0
    return {"model": "embedded", "dtype": "float32", "after": 64, "groups": groups}


def needles() -> dict[str, Any]:
    def one(policy: str, length: int, found: float) -> dict[str, Any]:
        by_depth = {"correct": {"0.0": found, "0.5": 1.0}}
        return {
            "policy": policy, "budget": 0.12, "evicts": policy != "full", "length": length, "cases": 4,
            "accuracy": (found + 1) / 2, "by_depth": by_depth,
        }  # fmt: skip

    return {"groups": [one(policy, length, 0.5) for policy in ("full", "winnow") for length in (500, 1000)]}


def speeds() -> dict[str, Any]:
    columns = ["prompt", *bench.COLUMNS]
    rows = [[f"{context:,} tokens", *(f"{40 + at} ms" for at in range(len(bench.COLUMNS)))] for context in (2048, 4096)]
    memory = [[name, str(at + 1), str(50 * (at + 1))] for at, name in enumerate(bench.ROWS)]
    return {"tables": {"decode": {"columns": columns, "rows": rows}, "memory": {"columns": ["", "", ""], "rows": memory}}}


def page() -> dict[str, Any]:
    """What a policy kept of six tokens in one layer with one head, as the page of ``winnow explain`` holds it."""
    import torch

    from winnowkv.cache.kept import KeptTokens
    from winnowkv.explain.page import component_data

    kept = KeptTokens("snapkv", 0.5, 6, 1, (torch.tensor([[0, 4, 5]]).int(),), None, None, None, None)
    data = component_data([" a", " b", " c", " d", " e", "."], [kept])
    return {"token": 4, "facts": {"model": "tiny"}, "data": json.dumps(data)}


RECORDS: Mapping[str, Any] = {
    "policies-summaries": lambda: audit_of(after=True),
    "policies-questions": lambda: audit_of(after=False),
    "needles": needles,
    "bench": speeds,
    "serve-contexts": lambda: {
        "stored": [{"seen": 6839}],
        "asked": [
            {"way": "whole text", "first": 47.2, "cold": None},
            {"way": "context, portable", "first": 0.083, "cold": 0.22},
        ],
    },
    "auto-budget": lambda: {"tables": {"realised": {"rows": [["`auto:0.8`", "86.2% (79.7 to 92.1)", "14%"]]}}},
    "explain": page,
}


def records_of(name: str) -> dict[str, Record]:
    return {record: given(record, RECORDS[record]()) for record in import_module(f"website.figures.{name}").RECORDS}


@pytest.mark.parametrize("name", sorted(set(FILES) - {"demo", "explain_shot"}))
def test_a_picture_is_drawn_from_its_records(name: str, tmp_path: Path) -> None:
    files = import_module(f"website.figures.{name}").make(records_of(name), tmp_path)
    assert tuple(file.name for file in files) == FILES[name]
    assert Image.open(tmp_path / f"{name}.png").size[0] >= 900


def test_the_same_record_gives_the_same_files(tmp_path: Path) -> None:
    make = import_module("website.figures.needle_map").make
    one, two = (make(records_of("needle_map"), tmp_path / folder) for folder in ("one", "two"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


@pytest.mark.slow
def test_the_page_of_explain_is_taken_from_its_record(tmp_path: Path) -> None:
    from support.browser import start_browser

    start_browser(tmp_path / "profile").quit()  # skips without Chromium
    from website.figures import explain_shot

    files = explain_shot.make(records_of("explain_shot"), tmp_path)
    assert tuple(file.name for file in files) == FILES["explain_shot"]
    assert Image.open(files[0]).size == (explain_shot.WIDTH, explain_shot.HEIGHT)
    lost = {"explain": given("explain", {**page(), "token": 6})}
    with pytest.raises(InputError, match="has no token 6"):
        explain_shot.make(lost, tmp_path)


def test_an_audit_says_what_was_measured() -> None:
    long, short = audits.read(given("s", audit_of(after=True))), audits.read(given("q", audit_of(after=False)))
    assert list(long.lines) == [audits.LEAN, "snapkv", "cake", "random", audits.BALANCED, audits.BEST, "int8"]
    assert long.published() == ["cake", "snapkv", "random"]
    assert (long.after, long.whole) == (64, ())
    assert [point.kept for point in long.lines["int8"]] == [0.53]  # once, though measured at two budgets
    assert long.lines["cake"][0] == audits.Point(0.06, pytest.approx(0.706), pytest.approx(0.656), pytest.approx(0.756))
    assert short.whole == (audits.BALANCED, audits.BEST)
    assert audits.BEST not in short.lines
    assert short.after == 0
    one = {"after": 0, "groups": [group("snapkv", 0.1, 0.5, kept=0.1, after=False, agreement={"mean": 0.5, "low": None})]}
    with pytest.raises(InputError, match="snapkv has no interval"):
        audits.read(given("one", one))


def test_steps_and_memory_are_read_from_tables() -> None:
    record = given("bench", speeds())
    assert bench.read_steps(record)[0] == bench.Step(bench.WINNOW, 1, 2048, 40.0)
    assert bench.read_engines(record)["transformers, full cache"] == (3, 150.0)
    assert bench.memory(bench.PLAIN, 4096, 1) == 90.0
    with pytest.raises(InputError, match="has no column 'decode step, `winnow`'"):
        bench.read_steps(given("bench", {"tables": {"decode": {"columns": ["prompt"], "rows": []}}}))
    with pytest.raises(InputError, match="does not begin with a number"):
        bench.number("about 3")


def test_needles_are_counted_at_each_depth() -> None:
    assert needle_map.cases_of(needles()["groups"][0]) == 2
    with pytest.raises(InputError, match="no groups"):
        needle_map.make({"needles": given("needles", {"groups": []})}, Path("none"))


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([1, 20, 40], [1, 20, 40]),
        ([20, 21], [15.5, 25.5]),
        ([0, 1, 50], [0, 10, 50]),
        ([48, 49, 50], [30, 40, 50]),
        ([10, 18, 19], [5.666666666666666, 15.666666666666666, 25.666666666666664]),
    ],
)
def test_labels_are_moved_apart_no_further_than_needed(wanted: list[float], placed: list[float]) -> None:
    assert style.spread(wanted, 10, 0, 50) == pytest.approx(placed)


def test_unknown_and_missing_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'pie' is unknown"):
        main(["pie"])
    missing = {name: Record(name, "", "", ()) for name in RECORDS}
    monkeypatch.setattr("website.records.DATA", tmp_path)
    monkeypatch.setattr("website.figures.__main__.read_records", lambda: missing)
    with pytest.raises(InputError, match=r"needle_map: record needles: .* is missing.*; decode: record bench: "):
        main(["needle_map", "decode", "--out", str(tmp_path)])


def shown() -> Iterator[tuple[Path, Path]]:
    """Pages, and the pictures of this repository that they show."""
    for file in pages():
        for found in LINK.finditer(file.read_text(encoding="utf-8")):
            path = found["path"] or found["source"]
            if "://" not in path:
                yield file, (file.parent / path).resolve()


def test_pages_show_pictures_that_exist() -> None:
    lost = [f"{file.name}: {picture}" for file, picture in shown() if not picture.is_file()]
    assert not lost


def test_every_picture_is_drawn_here_and_on_a_page() -> None:
    folders = ROOT / "docs", PICTURES  # docs/diagrams are of website/diagrams.py
    found = {file for folder in folders for ending in ("png", "svg") for file in folder.glob(f"*.{ending}")}
    made = {PICTURES / name for names in FILES.values() for name in names}
    assert made <= found
    assert found - made <= {PICTURES / name for name in NOT_DRAWN}
    used = {picture.with_suffix("") for _, picture in shown()}
    assert not [file.name for file in found if file.with_suffix("") not in used]


def test_the_records_of_pictures_are_listed() -> None:
    listed = read_records()
    drawn = set(FILES) - {"demo"}  # of a recording, not of a record
    assert {name for figure in drawn for name in import_module(f"website.figures.{figure}").RECORDS} <= set(listed)


@pytest.mark.parametrize("file", sorted(PICTURES.glob("*.svg")), ids=lambda file: file.stem)
def test_a_picture_is_well_formed_and_has_no_date(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "<dc:date>" not in text
