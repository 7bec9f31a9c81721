"""Results survive interruption and never mix."""

import json

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
