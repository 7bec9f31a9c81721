"""`winnow report`."""

import io
import json
import re
import sys

from support.results import CONFIG, evaluation, line, write_run
from winnowkv.cli.report import show
from winnowkv.evaluate.report.summary import summarize


def test_report_on_the_command_line(winnow, tmp_path):
    lines = evaluation()
    runs = [write_run(tmp_path / name, [one for one in lines if one["protocol"] == name], protocol=name)
            for name in ("official", "context-only")]  # fmt: skip
    code, out, err = winnow("report", *runs, "--out", tmp_path / "page.html")
    assert (code, err) == (0, "")
    assert "official: tiny in float32, mean over tasks (6 rows)" in out
    assert "context-only: tiny in float32, mean over tasks (3 rows)" in out
    assert re.search(r"streaming +12% +40\.0 +\S+ to \S+ +-30\.0 +-30\.0 to -30\.0 +0 / 0 / 6", out)
    assert "2 protocols (official, context-only): shown side by side, never averaged, never paired." in out
    assert "what full said" in (tmp_path / "page.html").read_text(encoding="utf-8")
    code, out, _ = winnow("report", *runs, "--out", tmp_path / "page.html", "--json")
    assert [section["protocol"] for section in json.loads(out)["sections"]] == ["official", "context-only"]


def test_report_tells_bad_input_in_one_sentence(winnow, tmp_path):
    run = write_run(tmp_path / "run", [line()])
    (run / "results.jsonl").open("a").write("{oops\n")
    for arguments, message in (((tmp_path / "none",), "none is not a folder: give folders that winnow eval wrote"),
                               ((run,), "results.jsonl, line 2: not JSON")):  # fmt: skip
        code, out, err = winnow("report", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.startswith("winnow: ")


def test_names_with_brackets_are_shown_as_they_are(monkeypatch, tmp_path):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    show(summarize([line("full"), line("mine:x=[bold]", 0.2)], CONFIG), tmp_path)
    assert "mine:x=[bold]" in stream.getvalue().replace("\n", "")
