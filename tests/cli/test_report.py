"""`winnow report`."""

import io
import json
import re
import sys

from support.results import CONFIG, broken, evaluation, line, write_run
from winnowkv.cli.eval import show as show_evaluation
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
    assert re.search(r"streaming +12% +40\.0 +\S+ to \S+ +-30\.0 +-30\.0 to -30\.0", out)
    assert re.search(r"streaming +12% +0 / 0 / 6", out)
    assert "2 protocols (official, context-only): shown side by side, never averaged, never paired." in " ".join(out.split())
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


def test_a_mean_says_over_how_many_rows_it_is_and_who_lacks_the_others(winnow, monkeypatch, tmp_path):
    lines = [line(policy, 0.5, row=str(row)) for policy in ("full", "cake") for row in range(4)]
    lines += [line("snapkv", 0.5, row=str(row)) for row in range(3)] + [broken("out of memory", row="3")]
    code, out, err = winnow("report", write_run(tmp_path / "run", lines), "--out", tmp_path / "page.html")
    assert (code, err) == (0, "")
    assert "mean over tasks (3 of 4 rows)" in out
    said = "Means at 12% are over the 3 of 4 rows that all policies answered: snapkv lacks 1 (out of memory)."
    assert said in " ".join(out.split())
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "3 of 4" in page
    assert said in page
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    show_evaluation(summarize(lines, CONFIG), tmp_path)
    assert "3 of 4" in stream.getvalue()
    assert said in " ".join(stream.getvalue().split())
