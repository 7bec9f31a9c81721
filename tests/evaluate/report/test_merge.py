"""Several runs as one: pairs with the full cache of any of them, labels, and folders that are no runs."""

import json

import pytest

from support.results import FULL_SCORES, MACHINE, SNAPKV_SCORES, VERSIONS, group, line, lines_of, write_run
from winnowkv.errors import InputError
from winnowkv.evaluate.report.merge import merge
from winnowkv.evaluate.report.summary import OVER_ROWS, summarize


def test_merged_runs_are_compared_with_the_full_cache_of_any_of_them(tmp_path):
    a = write_run(tmp_path / "a", lines_of("full", FULL_SCORES))
    b = write_run(tmp_path / "b", lines_of("snapkv", SNAPKV_SCORES))
    lines, config = merge([a, b])
    assert group(summarize(lines, config), OVER_ROWS, "snapkv")["against_full"]["losses"] == 3
    assert config["model"] == "tiny"
    assert config["machine"] == MACHINE
    assert config["differs"] == {}
    assert list(config["runs"]) == [str(a), str(b)]


def test_the_later_of_equal_measurements_is_kept(tmp_path):
    a = write_run(tmp_path / "a", [line("full", 0.2), line("snapkv", 0.1)])
    b = write_run(tmp_path / "b", [line("full", 0.6)])
    lines, _ = merge([a, b])
    assert sorted((one["policy"], one["score"]) for one in lines) == [("full", 0.6), ("snapkv", 0.1)]
    assert sorted((one["policy"], one["score"]) for one in merge([b, a])[0]) == [("full", 0.2), ("snapkv", 0.1)]


def test_models_and_dtypes_stay_apart_and_are_labelled(tmp_path):
    runs = [write_run(tmp_path / "a", [line("full", 0.9)]), write_run(tmp_path / "b", [line("snapkv", 0.1)], model="other"),
            write_run(tmp_path / "c", [line("full", 0.5)], dtype="bfloat16")]  # fmt: skip
    summary = summarize(*merge(runs))
    labels = [(section["model"], section["dtype"]) for section in summary["sections"]]
    assert labels == [("tiny", "float32"), ("other", "float32"), ("tiny", "bfloat16")]
    assert group(summary, "qa", "snapkv", section=1)["against_full"] is None
    assert "2 models (tiny, other): shown side by side, never averaged, never paired." in summary["notes"]
    assert "2 dtypes (float32, bfloat16): shown side by side, never averaged, never paired." in summary["notes"]


def test_prompts_that_differ_between_runs_are_not_paired(tmp_path):
    a = write_run(tmp_path / "a", [line("full", 0.9), line("full", 0.9, row="r1")])
    cut = line("snapkv", 0.1, row="r1", prompt_tokens=500, kept_entries=60)
    b = write_run(tmp_path / "b", [line("snapkv", 0.1), cut], max_context=500)
    summary = summarize(*merge([a, b]))
    snap = group(summary, "qa", "snapkv")
    assert (snap["against_full"]["rows"], snap["against_full"]["excluded"]) == (1, 1)
    assert snap["kept_fraction"] == pytest.approx(0.12)
    assert [bad["row"] for bad in summary["sections"][0]["worst"]] == ["r0"]
    assert "1 measurements read another prompt than the full cache did and are not paired with it." in (
        summary["sections"][0]["notes"])  # fmt: skip
    assert f"The runs differ in max_context: 6000 ({a}), 500 ({b})." in summary["notes"]


def test_other_machines_and_versions_are_noted(tmp_path):
    a = write_run(tmp_path / "a", [line("full")])
    b = write_run(tmp_path / "b", [line("snapkv", versions={**VERSIONS, "torch": "2.6.0"})], machine={**MACHINE, "threads": 8})
    notes = summarize(*merge([a, b]))["notes"]
    assert f"The runs differ in machine: AMD EPYC, 2 threads ({a}), AMD EPYC, 8 threads ({b})." in notes
    assert "Times of different machines are not comparable." in notes
    assert "Results of several versions of torch: 2.13.0, 2.6.0." in notes


def test_rows_of_other_data_under_one_name_are_refused(tmp_path):
    a = write_run(tmp_path / "a", [line("full")])
    b = write_run(tmp_path / "b", [line("snapkv", answers=["another"])])
    with pytest.raises(InputError, match=r"a and .*b hold different rows under one name \(qa, row r0\)"):
        merge([a, b])


def test_half_a_line_at_the_end_is_left_out_and_stays_in_the_file(tmp_path):
    run = write_run(tmp_path / "a", [line("full")], machine=None)
    with (run / "results.jsonl").open("a") as file:
        file.write('{"task": "qa", "ro')
    before = (run / "results.jsonl").read_bytes()
    assert len(merge([run])[0]) == 1
    assert (run / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken\n", "line 2: not JSON"),
        ("[1]\n", "line 2: not a JSON object"),
        ('{"policy": "full", "budget": 1}\n', "line 2: it lacks 'task', so it is no line of winnow eval"),
        (json.dumps(line(score="high")) + "\n", "line 2: field score: input should be a valid number, not 'high'"),
        (json.dumps(line(budget="12%", kept_entries=1, kept_bytes=1, held_bytes=1) | {"budget": "12%"}) + "\n",
         "line 2: budget '12%' is not a number"),
        (json.dumps(line(kept_bytes=None)) + "\n", "line 2: field kept_bytes: input should be a valid number, not None"),
        (json.dumps(line(prediction=None)) + "\n", "line 2: field prediction: input should be a valid string, not None"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named_by_file_and_number(tmp_path, text, message):
    run = write_run(tmp_path / "a", [line("full")])
    with (run / "results.jsonl").open("a") as file:
        file.write(text)
    with pytest.raises(InputError, match=f"results.jsonl, {message}"):
        merge([run])


def test_a_line_that_is_no_text_is_named_by_number(tmp_path):
    run = write_run(tmp_path / "a", [line("full")])
    with (run / "results.jsonl").open("ab") as file:
        file.write(b'{"task": "\xff"}\n')
    with pytest.raises(InputError, match=r"results.jsonl, line 2 is not UTF-8 text"):
        merge([run])


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    none = write_run(tmp_path / "none", [])
    needle = write_run(tmp_path / "needle", [line("full")], command="needle")
    lost = write_run(tmp_path / "lost", [line("full")])
    (lost / "results.jsonl").unlink()
    for folder, message in ((tmp_path / "absent", "is not a folder"), (tmp_path / "empty", "config.yaml cannot be read"),
                            (none, "holds no finished line"), (needle, "holds no results of winnow eval but of winnow needle"),
                            (lost, "results.jsonl cannot be read")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            merge([folder])
