"""Evaluation tasks: prompts and scores are the authors', rows come from files or the hub, errors name file and line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from winnowkv.errors import InputError
from winnowkv.evaluate.tasks import tasks
from winnowkv.evaluate.tasks.tasks import find_tasks

DATASETS = (*tasks.LOCALIZATION, *tasks.AGGREGATION)
METRICS = {  # official names, and lm-eval's
    "qa_f1": "qa_f1_score",
    "rouge_l": "rouge_score",
    "classification": "classification_score",
    "retrieval": "retrieval_score",
    "count": "count_score",
    "code_sim": "code_sim_score",
}
BABILONG = {"input": " Mary went home. ", "question": "Where is Mary? ", "target": "home", "task": "qa1", "index": 0}
LONGBENCH = {"context": "The text.", "input": "The question?", "answers": ["red"], "_id": "a"}


def task(name: str) -> tasks.EvalTask:
    (found,) = find_tasks([name])
    return found


def write(folder: Path, name: str, *docs: Any) -> tasks.EvalTask:
    """A task, its rows written below a data folder."""
    found = task(name)
    file = folder / found.file
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(json.dumps(doc, ensure_ascii=False) for doc in docs) + "\n", encoding="utf-8")
    return found


def score(folder: Path, name: str, prediction: str, **fields: Any) -> float:
    """The score of an answer to a row of LongBench."""
    found = write(folder, name, {**LONGBENCH, **fields})
    (row,) = found.rows(folder)
    return found.score(row, prediction)


@pytest.mark.parametrize("dataset", DATASETS)
def test_prompt_length_and_metric_are_longbenchs(data_dir, tmp_path, dataset):
    official = {
        name: json.loads((data_dir / "longbench_config" / f"dataset2{name}.json").read_text())[dataset]
        for name in ("prompt", "maxlen", "metric")
    }
    found = write(tmp_path, f"longbench_{dataset}", {**LONGBENCH, "all_classes": ["red"]})
    (row,) = found.rows(tmp_path)
    assert row.prompt == official["prompt"].format(**LONGBENCH)
    assert row.before + row.context == official["prompt"].partition("{context}")[0] + "The text."
    assert (found.max_new_tokens, found.metric) == (official["maxlen"], METRICS[official["metric"]])
    assert found.chat == (dataset not in ("trec", "triviaqa", "samsum", "lcc", "repobench-p"))
    assert found.first_line == (dataset in ("trec", "triviaqa", "samsum"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tasks.MAKERS if name not in tasks.GROUPS["ruler13"]])
def test_real_rows_are_read_whole_and_their_answers_are_right(data_dir, name):
    found = task(name)
    rows = found.rows(data_dir)
    assert len(rows) == sum(1 for line in (data_dir / found.file).read_text().split("\n") if line)
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.context.strip() and row.answers for row in rows)
    assert all(row.after.strip() for row in rows)
    for row in rows[:5]:
        right = " ".join(row.answers) if name.startswith("ruler") else row.answers[0]
        assert found.score(row, right) == pytest.approx(1, abs=1e-6)
        assert found.score(row, "?") == 0


def test_the_best_of_several_answers_counts(tmp_path):
    assert score(tmp_path, "longbench_qasper", "The Red one!", answers=["blue", "a red one"]) == 1
    assert score(tmp_path, "longbench_qasper", "red\nor blue", answers=["red"]) == pytest.approx(0.5)


def test_only_the_first_line_that_is_not_empty_counts(tmp_path):
    assert score(tmp_path, "longbench_triviaqa", "\n\nred\n\nPassage: more") == 1
    assert score(tmp_path, "longbench_triviaqa", " \nred") == 0  # a line with a space is a line
    assert score(tmp_path, "longbench_samsum", "red\nDialogue: blue", answers=["red"]) == pytest.approx(1)
    classes = {"all_classes": ["red", "dark red", "blue"], "answers": ["dark red"]}
    assert score(tmp_path, "longbench_trec", "\ndark red\nType: blue", **classes) == 1
    assert score(tmp_path, "longbench_trec", "dark red or blue", **classes) == 0.5


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ("\n\nx = 1\ny = 2", 1.0),
        ("# a comment\n```python\n// another\nx = 1", 1.0),
        ("# only a comment", 0.0),
        ("# a comment\n\nx = 1", 0.0),  # LongBench takes the empty line
        ("x = 2", 0.8),
    ],
)
def test_code_is_compared_by_its_first_line_that_is_no_comment(tmp_path, prediction, wanted):
    assert score(tmp_path, "longbench_lcc", prediction, answers=["x = 1"]) == wanted
    assert score(tmp_path, "longbench_repobench-p", prediction, answers=["x = 1", "unlike"]) == wanted


def test_counts_and_paragraphs(tmp_path):
    assert score(tmp_path, "longbench_passage_count", "It is 3 of 7", answers=["7"]) == 0.5
    assert score(tmp_path, "longbench_passage_retrieval_en", "Paragraph 12", answers=["Paragraph 12"]) == 1
    assert score(tmp_path, "longbench_passage_retrieval_en", "Paragraph 1", answers=["Paragraph 12"]) == 0


def test_babilong_prompts_are_lm_evals(tmp_path):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    for kind in ("qa1", "qa5"):
        doc = {**BABILONG, "task": kind}
        found = write(tmp_path, "babilong_1k", doc)
        (row,) = found.rows(tmp_path)
        dataset = {kind: Dataset.from_list([doc])}
        config = {**tasks.definition(f"babilong/babilong_{kind}.yaml"), "custom_dataset": lambda _d=dataset, **_: _d}
        theirs = ConfigurableTask(config=config)
        assert row.prompt == theirs.fewshot_context(doc, num_fewshot=theirs.config.num_fewshot)
        assert (row.context, row.after) == ("Mary went home.", "\nWhere is Mary?")
        assert found.score(row, "She is at HOME now") == 1
        assert found.score(row, "She is out") == 0
    with pytest.raises(InputError, match=r"lm-eval's task babilong_qa99 cannot be used"):
        write(tmp_path, "babilong_1k", {**BABILONG, "task": "qa99"}).rows(tmp_path)


def test_a_limit_takes_every_kind_of_babilong_question(tmp_path):
    docs = [{**BABILONG, "task": kind, "index": index} for kind in ("qa1", "qa2") for index in range(3)]
    rows = write(tmp_path, "babilong_2k", *docs).rows(tmp_path, limit=3)
    assert [row.id for row in rows] == ["qa1-0", "qa2-0", "qa1-1"]


def test_ruler_is_cut_at_the_question_and_counts_every_string(tmp_path):
    doc = {"input": "One is 11.\nTwo is 22.\nWhat are they? They are", "outputs": ["11", "22"], "index": 4}
    found = write(tmp_path, "ruler_niah_multikey_3_4096", doc)
    (row,) = found.rows(tmp_path)
    assert (row.context, row.after, row.id) == ("One is 11.\nTwo is 22.", "\nWhat are they? They are", "4")
    assert [found.score(row, text) for text in ("22 and 11", "22.", "no")] == [1, 0.5, 0]
    assert not found.chat


def test_longeval_takes_the_first_number(tmp_path):
    doc = {"prompt": "line a: <12>\n\nNow the record is over. Line a? ", "expected_number": 12}
    found = write(tmp_path, "longeval_lines_200", doc)
    (row,) = found.rows(tmp_path)
    assert (row.context, row.after) == ("line a: <12>\n", "\nNow the record is over. Line a? ")
    assert [found.score(row, text) for text in ("It is <12>.", "120", "In line 3: 12", "none")] == [1, 0, 0, 0]
    assert [found.complete(text) for text in ("It is", "It is 12", "It is 12.")] == [False, False, True]


def test_one_line_answers_are_complete_after_their_first_line_of_text():
    assert [task("longbench_trec").complete(text) for text in ("\n\nred", "\nred\n", "")] == [False, True, False]
    assert not task("longbench_qasper").complete("red\nblue\n")


def test_tasks_and_groups_are_found_by_name():
    assert [found.name for found in find_tasks(["longbench"])] == [f"longbench_{name}" for name in DATASETS]
    assert len(find_tasks(["ruler", "longeval", "babilong", "babilong_1k"])) == 4
    with pytest.raises(InputError, match=r"task 'longbench_qaspr' is unknown. Did you mean 'longbench_qasper'\? Known: "):
        find_tasks(["longbench_qasper", "longbench_qaspr"])
    with pytest.raises(InputError, match="no task was named"):
        find_tasks([])
    kinds = {found.name: found.kind for found in find_tasks(list(tasks.GROUPS))}
    assert kinds["longbench_qasper"] == kinds["longeval_lines_200"] == "localization"
    assert kinds["longbench_gov_report"] == kinds["longbench_lcc"] == kinds["longbench_trec"] == "aggregation"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({**LONGBENCH, "context": " "}), "field 'context' is missing or not a text that is not empty"),
        (json.dumps({"context": "c", "answers": ["a"]}), "field 'input' is missing or not a text"),
        (json.dumps({**LONGBENCH, "answers": "red"}), "field 'answers' is missing or not a list of texts"),
        (json.dumps({**LONGBENCH, "answers": []}), "field 'answers' is missing or not a list of texts"),
        (json.dumps(LONGBENCH), "field 'all_classes' is missing or not a list of texts"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, reason):
    found = write(tmp_path, "longbench_trec", {**LONGBENCH, "all_classes": ["red"]})
    with (tmp_path / found.file).open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(InputError, match=rf"longbench/trec\.jsonl, line 3: {reason}"):
        found.rows(tmp_path)


def test_files_without_rows_are_refused(tmp_path):
    found = task("longbench_qasper")
    with pytest.raises(InputError, match=r"longbench_qasper file .*qasper\.jsonl cannot be read: No such file"):
        found.rows(tmp_path)
    (tmp_path / "longbench").mkdir()
    (tmp_path / found.file).write_text("\n")
    with pytest.raises(InputError, match="holds no longbench_qasper; --data is"):
        found.rows(tmp_path)


def test_separators_inside_a_text_do_not_split_a_row(tmp_path):
    found = write(tmp_path, "longbench_qasper", {**LONGBENCH, "context": "one\u2028two\x85three"})
    assert found.rows(tmp_path)[0].context == "one\u2028two\x85three"


def test_rows_are_read_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return [{"context": "c", "question": f"{split}?", "answers": ["a"], "input": "c", "target": "t"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (row,) = task("longbench_qasper").rows(None)
    assert (row.id, row.prompt.count("test?"), asked) == ("0", 1, [("Xnhyacinth/LongBench", "qasper", "test")])
    rows = task("babilong_1k").rows(None, limit=2)
    assert [row.id for row in rows] == ["qa1-0", "qa2-0"]
    assert ("RMT-team/babilong-1k-samples", "1k", "qa5") in asked
    with pytest.raises(InputError, match="no data set on the hub: give --data a folder that holds ruler/"):
        task("ruler_niah_multikey_3_4096").rows(None)


@pytest.mark.parametrize("error", [ConnectionError("no network\nmore"), ValueError("no network")])
def test_a_hub_that_cannot_be_reached_is_reported(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"LongBench \(qasper\) cannot be read from the hub: no network \(give --data"):
        task("longbench_qasper").rows(None)


def test_a_missing_package_is_named_with_the_command_that_gets_it(monkeypatch):
    tasks.definition.cache_clear()
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(InputError, match=r"task qasper cannot be used: .* \(pip install 'winnowkv\[eval\]'\)"):
        find_tasks(["longbench_qasper"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"cannot be used: .*lm_eval.*pip install 'winnowkv\[eval\]'"):
        find_tasks(["longbench_qasper"])


def test_a_template_that_lm_eval_changed_is_not_guessed():
    with pytest.raises(InputError, match="longbench_qasper: the prompt template of this lm-eval version cannot be read"):
        tasks.corrected("qasper", "{{context}} {{passage}}")
    # Corrected by lm-eval itself, nothing is corrected twice.
    assert tasks.corrected("lcc", "{{context}}Next line of code:\n") == "{{context}}Next line of code:\n"
