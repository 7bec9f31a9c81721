"""Results survive interruption and never mix."""

import json
import os

import pytest

from winnowkv.errors import InputError
from winnowkv.evaluate.report.store import ResultStore, read_config, write_json


def key(line):
    return line["id"]


def test_lines_are_flushed_one_by_one_and_read_back(tmp_path):
    store = ResultStore(tmp_path / "run", {"model": "m"}, key)
    store.add({"id": 1, "text": "ä"})
    # Read before close(): a killed process leaves what was added.
    assert json.loads((tmp_path / "run" / "results.jsonl").read_text(encoding="utf-8")) == {"id": 1, "text": "ä"}
    store.close()
    again = ResultStore(tmp_path / "run", {"model": "m"}, key)
    assert again.has(1)
    assert not again.has(2)
    assert again.lines == [{"id": 1, "text": "ä"}]


def test_line_separators_inside_a_text_are_no_line_ends(tmp_path):
    store = ResultStore(tmp_path, {}, key)
    store.add({"id": 1, "prediction": "a\u2028b\x85c\x0b"})
    store.close()
    assert ResultStore(tmp_path, {}, key).lines == [{"id": 1, "prediction": "a\u2028b\x85c\x0b"}]


def test_half_a_line_is_dropped_and_done_again(tmp_path):
    store = ResultStore(tmp_path, {}, key)
    store.add({"id": 1})
    store.close()
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"id": 2, "tex')
    again = ResultStore(tmp_path, {}, key)
    assert not again.has(2)
    again.add({"id": 2})
    assert [json.loads(line)["id"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [1, 2]


def test_other_settings_are_refused_by_name_and_value(tmp_path):
    ResultStore(tmp_path, {"model": "a", "chat": True}, key).close()
    with pytest.raises(InputError, match=r"model: 'a', now 'b'"):
        ResultStore(tmp_path, {"model": "b", "chat": True}, key)


def test_settings_come_back_as_they_were(tmp_path):
    config = {"model": "m", "depths": (0.1, 0.5), "own": [{"question": "Wo? é"}], "limit": None}
    ResultStore(tmp_path, config, key).close()
    assert read_config(tmp_path) == {**config, "depths": [0.1, 0.5]}
    ResultStore(tmp_path, config, key).close()


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"id": 1}\nnot json\n{"id": 3}\n')
    with pytest.raises(InputError, match=r"results.jsonl, line 2: not JSON"):
        ResultStore(tmp_path, {}, key)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"output folder .*file cannot be written"):
        ResultStore(tmp_path / "file", {}, key)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    first = ResultStore(tmp_path, {}, key)
    with pytest.raises(InputError, match="another run is writing"):
        ResultStore(tmp_path, {}, key)
    first.close()
    ResultStore(tmp_path, {}, key).close()


def test_write_json_leaves_no_scratch(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "not a JSON object"), ("[" * 100_000, "levels deep"), ('{"id": NaN}', "nan is not a finite number"),
        ('{"id": ' + "9" * 5000 + "}", "more digits"), ('{"x": 1}', "lacks 'id'"), ('{"id": []}', "unhashable"),
        ('{"id": "\\ud800"}', "half a character"), ('{"id": 1, "id": 2}', "stands twice"), ("", "not JSON"),
    ],
)  # fmt: skip
def test_lines_of_any_kind_are_refused_by_number(tmp_path, line, words):
    (tmp_path / "results.jsonl").write_text(f'{{"id": 0}}\n{line}\n')
    with pytest.raises(InputError, match=rf"results.jsonl, line 2: .*{words}") as refused:
        ResultStore(tmp_path, {}, key)
    assert len(str(refused.value)) < 400
    # The folder is free again for a run that can use it.
    (tmp_path / "results.jsonl").unlink()
    ResultStore(tmp_path, {}, key).close()


def test_a_line_that_is_no_text_is_refused_by_number(tmp_path):
    (tmp_path / "results.jsonl").write_bytes(b'{"id": 0}\n{"id": "\xff"}\n')
    with pytest.raises(InputError, match="line 2 is not UTF-8 text"):
        ResultStore(tmp_path, {}, key)


def test_what_is_not_a_finite_number_is_null_and_can_be_read_again(tmp_path):
    store = ResultStore(tmp_path, {}, key)
    store.add({"id": 1, "score": float("nan"), "more": {"a": [1.5, float("inf")]}})
    store.close()
    assert ResultStore(tmp_path, {}, key).lines == store.lines == [{"id": 1, "score": None, "more": {"a": [1.5, None]}}]


@pytest.mark.parametrize(
    "text", ["", "- a", "a: [", "[" * 1000, "a: &a [*a]", "1: 2", "a: .inf", "a: " + "9" * 5000, "a: 1\na: 2", "!!timestamp x"]
)
def test_settings_of_any_kind_are_refused_by_file(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    for read in (lambda: read_config(tmp_path), lambda: ResultStore(tmp_path, {"model": "m"}, key)):
        with pytest.raises(InputError, match=r"config\.yaml") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_a_path_that_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none" / "a.json"):
        with pytest.raises(InputError, match=r"is not a regular file|cannot be written"):
            write_json(path, {})
    assert (tmp_path / "pipe").is_fifo()
