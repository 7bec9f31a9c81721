"""Numbers in pages come from records, and every page says what the records say."""

from __future__ import annotations

import pytest

from website.numbers import fill, pages
from website.records import Record, follow, read_records
from winnowkv.errors import InputError


class Given(Record):
    """A record with content that is given."""

    @property
    def content(self):
        return {
            "result": {"rows": [{"level": "lean", "s": 0.5}, {"level": "best", "s": 6.66}], "columns": ["a"], "share": 0.123}
        }


RECORDS = {"speed": Given("speed", "", "", ())}


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("rows.level=best.s .1f", "6.7"),
        ("rows.0.s .2f", "0.50"),
        ("share .0%", "12%"),
        ("share", "0.123"),
        ("rows.1.level", "best"),
    ],
)
def test_a_number_is_filled_in(marker: str, said: str) -> None:
    page = f"It takes <!-- n speed {marker} -->old<!-- /n --> so."
    filled = fill(page, RECORDS)
    assert filled == f"It takes <!-- n speed {marker} -->{said}<!-- /n --> so."
    assert fill(filled, RECORDS) == filled


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<!-- n slow share -->1<!-- /n -->", "'slow' is unknown"),
        ("<!-- n speed rows.level=none.s -->1<!-- /n -->", "'level=none' is not there"),
        ("<!-- table nothing -->\n<!-- /table -->", "'nothing' is neither"),
    ],
)
def test_what_no_record_says_is_refused(page: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fill(page, RECORDS)


def test_a_path_follows_keys_numbers_and_rows() -> None:
    assert follow([{"a": 1}, {"a": 2}], "a=2") == {"a": 2}
    assert follow([5, 6], "1") == 6
    assert follow({"x": 3}, "x") == 3


def test_every_page_says_what_the_records_say() -> None:
    records = read_records()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert fill(text, records) == text, f"{page}: run make numbers"


def test_every_record_has_a_file_and_every_file_a_record() -> None:
    records = read_records()
    assert all(record.path.is_file() for record in records.values())
    assert {file.stem for file in next(iter(records.values())).path.parent.glob("*.json")} == set(records)
