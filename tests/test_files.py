"""Files are read strictly, with errors in one line, and written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from winnowkv.errors import InputError
from winnowkv.files import check_plain, parse_json, parse_yaml, read_text, replacing, shown, write_text

BOMB = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a": 1}x', "not JSON"),
        ("[" * 100_000, "levels deep"),
        ("[" * 70 + "]" * 70, "levels deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "levels deep"),
        ("9" * 5000, "more digits"),
        (f'{{"a": [0, {2**63}]}}', r"field 'a' \[1\]: the whole number has more than 63 bits"),
        ('{"a": {"b": NaN}}', "field 'a' 'b': nan is not a finite number"),
        ("[-Infinity]", r"field \[0\]: -inf is not a finite number"),
        ("1e999", "inf is not a finite number"),
        ('"\\ud800"', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice"),
    ],
)
def test_json_that_is_no_plain_data_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        parse_json(text, InputError)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML"),
        ("[" * 1500, "levels deep"),
        ("a: &a [*a]", "levels deep"),
        (BOMB, "values"),
        ("a: 1\na: 2", "key 'a' twice"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: .nan", "field 'a': nan is not a finite number"),
        ("a: 2001-01-01", "is not plain data but a date"),
        ("a: 2001-99-99", "is not YAML"),
        ("!!timestamp x", "is not YAML"),
        ("!!bool x", "is not YAML"),
        ("!!int ''", "is not YAML"),
        ("!!python/name:os.system", "is not YAML"),
        ("? [a]\n: 1", "is not YAML"),
        ("a: !!binary eHg=", "is not plain data but a bytes"),
        ("a: \x00", "is not YAML"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        parse_yaml(text, InputError)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_plain_data_comes_back_as_it_is() -> None:
    value = {"a": [1, -2.5, None, True, "\u2028ä\U0001f600", {"b": []}], "c": {"d": 2**63 - 1}}
    check_plain(value, InputError)
    assert parse_json('{"a": [1, -2.5, null, true, "\\u2028ä\\ud83d\\ude00", {"b": []}], "c": {"d": 9223372036854775807}}',
                      InputError) == value  # fmt: skip
    assert parse_yaml("a: &a [1, 2.5]\nb: *a\n<<: {c: yes}\n", InputError) == {"a": [1, 2.5], "b": [1, 2.5], "c": True}
    assert parse_yaml("", InputError) is None


def test_text_is_read_without_a_mark_and_with_one_kind_of_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a", InputError) == "one\ntwo\nthree\n"
    (tmp_path / "a").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(InputError, match="line 2 is not UTF-8 text"):
        read_text(tmp_path / "a", InputError)
    for path in (tmp_path, tmp_path / "none", tmp_path / "a" / "b", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(InputError, match="cannot be read"):
            read_text(path, InputError)


def test_values_are_shown_short() -> None:
    for value in ("x" * 10**6, 10**6000, [[["x"] * 100] * 100] * 100, dict.fromkeys(range(100), "y" * 500), b"z" * 10**5):
        assert len(shown(value)) <= 210
    assert shown("ab") == "'ab'"
    assert "\n" not in shown("a\nb")


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_text(file, "one", InputError)

    def interrupted() -> None:
        with replacing(file, InputError) as scratch:
            scratch.write_text("half")
            assert file.read_text() == "one"
            raise KeyboardInterrupt

    def late() -> None:
        with replacing(tmp_path / "b", InputError, overwrite=False) as scratch:
            scratch.write_text("mine")
            (tmp_path / "b").write_text("somebody was quicker")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(InputError, match="cannot be written: No space"), replacing(file, InputError):
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="exists already"):
        late()
    assert (tmp_path / "b").read_text() == "somebody was quicker"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="is not a regular file"):
            write_text(path, "x", InputError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "pipe"]
    assert file.read_text() == "one"
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "c", "new", InputError)
    finally:
        os.umask(umask)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o640
