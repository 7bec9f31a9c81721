"""`winnow eval` on a tiny random model: files, tables, resuming, protocols that do not mix, bad values, workers."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import winnowkv as wk
from support.evaluation import ROWS, said, tiny_evaluation
from winnowkv.cli import eval as command, loading
from winnowkv.evaluate.tasks import run as runner

pytestmark = pytest.mark.slow

LINES = ROWS * 5  # full once, two other policies at two budgets
# Dies as by kill -9, in the middle of a row's lines.
KILLED = """
import os, signal, sys
from winnowkv.cli.main import main
from winnowkv.evaluate.report.store import ResultStore
real = ResultStore.add
def add(store, line):
    real(store, line)
    if len(store.lines) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
ResultStore.add = add
sys.argv = ["winnow", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return tiny_evaluation(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def options_of(asked):
    """The evaluation as options of the command."""
    return ("eval", "--tasks", "longeval", "--policies", ",".join(asked.policies), "--budgets", "0.5,20",
            "--model", asked.model, "--data", asked.data)  # fmt: skip


def lines_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    """A folder with all lines."""
    folder = tmp_path_factory.mktemp("finished")
    command.measure(asked, folder, None, None)
    return folder


def test_json_is_the_summary_and_nothing_else(winnow, options_of, finished, tmp_path):
    code, out, err = winnow(*options_of, "--out", tmp_path, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "summary.json").read_text())
    assert f"{LINES}/{LINES}" in err
    assert said(lines_in(tmp_path)) == said(lines_in(finished))
    assert len({runner.identity(line) for line in lines_in(tmp_path)}) == len(lines_in(tmp_path)) == LINES
    assert "<html" in (tmp_path / "report.html").read_text()


def test_the_table_shows_scores_bytes_and_the_path_of_the_page(winnow, options_of, finished, monkeypatch):
    monkeypatch.setattr(runner.Worker, "answer", None)  # everything is there already
    code, out, err = winnow(*options_of, "--out", finished)
    assert code == 0
    assert f"{LINES} measurements are in" in err
    for words in ("mean over tasks", "longeval_lines_200", "snapkv:observe=8", "W / T / L", "ms/step", "report.html", "rows"):
        assert words in out
    (section,) = json.loads((finished / "summary.json").read_text())["sections"]
    group = next(g for g in section["groups"] if g["task"] == "longeval_lines_200" and g["policy"] == "streaming")
    assert f"{100 * group['kept_fraction']:.1f}%" in out
    assert section["notes"]
    assert all(" ".join(note.split()) in " ".join(out.split()) for note in section["notes"])


def test_a_killed_run_continues_with_the_missing_lines(winnow, options_of, finished, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, *options_of, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    before = (tmp_path / "results.jsonl").read_text()
    assert len(before.splitlines()) == 8
    code, _, err = winnow(*options_of, "--out", tmp_path)
    assert code == 0
    assert "8 measurements are in" in err
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert said(lines_in(tmp_path)) == said(lines_in(finished))


def test_an_interrupt_keeps_what_is_finished(asked, finished, tmp_path, monkeypatch, capsys):
    real, rows = runner.Worker.answer, []

    def answer(worker, shard):
        rows.extend(shard)
        if len(rows) == 3:
            raise KeyboardInterrupt
        return real(worker, shard)

    monkeypatch.setattr(runner.Worker, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        command.measure(asked, tmp_path, None, None)
    assert "interrupted: 10 finished lines" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["lines"] == 10
    monkeypatch.setattr(runner.Worker, "answer", real)
    assert command.measure(asked, tmp_path, None, None)["lines"] == LINES
    assert said(lines_in(tmp_path)) == said(lines_in(finished))


def test_an_interrupt_before_the_first_line(asked, tmp_path, monkeypatch):
    def answer(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Worker, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        command.measure(asked, tmp_path, None, None)
    assert json.loads((tmp_path / "summary.json").read_text())["lines"] == 0


def test_another_protocol_in_the_same_folder_is_refused_before_the_model_loads(winnow, options_of, finished, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    code, out, err = winnow(*options_of, "--protocol", "context-only", "--out", finished)
    assert code == 2
    assert "mixed protocols" in err
    assert "'official', now 'context-only'" in err
    assert out == ""


def test_the_other_protocol_in_a_folder_of_its_own(asked, tmp_path):
    summary = command.measure(replace(asked, protocol="context-only", limit=2), tmp_path, None, None)
    assert [section["protocol"] for section in summary["sections"]] == ["context-only"]
    assert {line["protocol"] for line in lines_in(tmp_path)} == {"context-only"}


def test_rows_that_cannot_be_answered_fail_and_the_run_continues(winnow, options_of, tmp_path):
    changed = [word.replace("0.5,20", "5,20") for word in options_of]
    code, out, _ = winnow(*changed, "--out", tmp_path)
    assert code == 0
    failed = [line for line in lines_in(tmp_path) if line["failed"]]
    assert {(line["policy"], line["budget"]) for line in failed} == {("snapkv:observe=8", 5)}
    assert len(failed) == ROWS
    words = " ".join(out.split())
    assert f"snapkv:observe=8 lacks {ROWS} (snapkv: a budget of 5 entries" in words
    assert "is below sinks + window" in words


@pytest.mark.parametrize("protocol", ["official", "context-only"])
def test_rows_that_decode_together_answer_as_alone(asked, tmp_path, protocol):
    alone = replace(asked, protocol=protocol)
    command.measure(alone, tmp_path / "alone", None, None)
    command.measure(replace(alone, batch=3), tmp_path / "batch", None, None)
    assert said(lines_in(tmp_path / "batch")) == said(lines_in(tmp_path / "alone"))
    assert max(line["decode_batch"] for line in lines_in(tmp_path / "batch")) >= 12


def test_rows_of_a_batch_that_does_not_fit_are_tried_one_by_one(asked, finished, tmp_path, monkeypatch):
    real = runner.decode_together

    def small(model, kept, limit, done):
        if len({one.logits.data_ptr() for one in kept}) > 1:
            raise torch.OutOfMemoryError("too many rows")
        return real(model, kept, limit, done)

    monkeypatch.setattr(runner, "decode_together", small)
    command.measure(replace(asked, batch=4), tmp_path, None, None)
    assert said(lines_in(tmp_path)) == said(lines_in(finished))


def test_a_limit_draws_the_same_rows_by_its_seed(asked, tmp_path):
    drawn = {}
    for seed in (0, 3):
        command.measure(replace(asked, limit=3, seed=seed, policies=("full",)), tmp_path / str(seed), None, None)
        drawn[seed] = [line["row"] for line in lines_in(tmp_path / str(seed))]
    assert drawn[0] == ["0", "1", "2"]
    assert len(set(drawn[3])) == 3
    assert drawn[3] != drawn[0]
    again = [row.id for _, row in replace(asked, limit=3, seed=3).rows()]
    assert again == drawn[3]


def test_a_full_disk_is_reported_and_finished_lines_are_kept(asked, finished, monkeypatch):
    def sync(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(wk.InputError, match=f"(?i)no space left on device.* All {LINES} lines are safe"):
        command.measure(asked, finished, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "longbenhc"), "task 'longbenhc' is unknown. Did you mean 'longbench'?"),
        (("--tasks", ","), "no task was named"),
        (("--policies", "snapvk"), "Did you mean 'snapkv'"),
        (("--policies", ""), "no policy was named"),
        (("--budgets", "0.0"), "budget 0.0 keeps nothing"),
        (("--protocol", "mine"), "protocol 'mine' is unknown: it is one of official, context-only"),
        (("--data", "/no/such/folder"), "/no/such/folder/longeval/lines_200.jsonl cannot be read"),
        (("--model", "/no/such/model"), "'/no/such/model' does not exist"),
        (("--policies", "compresskv"), "no profile ships with the package for this model"),
        (
            ("--recipe", "/no/such/recipe.yaml", "--tasks", "longeval"),
            "--tasks, --policies, --budgets: /no/such/recipe.yaml decides",
        ),
    ],
)
def test_bad_values_exit_with_two_and_one_sentence(winnow, options_of, tmp_path, arguments, message):
    code, out, err = winnow(*options_of, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("winnow: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_loads_nothing(winnow, options_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    code, out, _ = winnow(*options_of, "--out", tmp_path / "out", "--dry-run", "--json")
    (plan,) = json.loads(out)["plans"]
    assert code == 0
    assert plan["rows"] == {"longeval_lines_200": ROWS}
    assert len(plan["settings"]) == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "address"),
    [(("--ray",), "auto"), (("--ray", "--limit", "2"), "auto"), (("--ray", "10.0.0.1:6379"), "10.0.0.1:6379")],
)
def test_the_address_of_a_cluster_may_be_left_out(winnow, options_of, tmp_path, monkeypatch, arguments, address):
    asked = []

    def pool(evaluation, workers, where):
        asked.append((workers, where))
        raise wk.InputError("no Ray here")

    monkeypatch.setattr("winnowkv.scale.pool", pool)
    code, _, err = winnow(*options_of, "--out", tmp_path, *arguments)
    assert code == 2
    assert "no Ray here" in err
    assert asked == [(None, address)]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install ray)")
def test_workers_write_what_one_process_writes(winnow, options_of, finished, tmp_path):
    code, out, err = winnow(*options_of, "--workers", "2", "--out", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["lines"] == LINES
    assert f"{LINES}/{LINES}" in err
    assert said(lines_in(tmp_path)) == said(lines_in(finished))
    import ray

    assert not ray.is_initialized()  # what the command started it has ended
