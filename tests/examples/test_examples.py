"""Every example runs, prints what is true of its own numbers, is short, and is listed."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest

import winnowkv as wk
from support.paths import ROOT
from support.serving import running, tiny_app
from winnowkv.cli.serve import said
from winnowkv.engine.engine import Engine
from winnowkv.evaluate.needle.prompts import read_haystack, read_needles
from winnowkv.models import load as models
from winnowkv.policies import registry

EXAMPLES = ROOT / "examples"
SHORT = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb") and path.name != "vllm_demo.py")
NOTEBOOK = EXAMPLES / "what_was_kept.ipynb"
FACT = read_needles()[3]  # the month of a festival
MIB = r"(\d+\.\d+)"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model is missing ({models.INSTALL})")
    return wk.load("embedded", device="cpu")


@pytest.fixture
def run(embedded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example in this process, on the one model that all of them share; returns what it prints."""
    monkeypatch.setattr(wk, "load", lambda name: embedded)
    monkeypatch.setattr(registry, "_registered", {})

    def call(name: str, *arguments: object) -> str:
        load_example(name).main([str(one) for one in arguments])
        return capsys.readouterr().out

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short text with a fact in it."""
    paragraphs = read_haystack().split("\n\n")[1:3]
    file = tmp_path / "text.txt"
    file.write_text(f"{paragraphs[0]} {FACT.needle}\n\n{paragraphs[1]}", encoding="utf-8")
    return file


def load_example(name: str) -> ModuleType:
    """An example as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook, in order."""
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def lines_of(path: Path) -> int:
    """Lines of a script, or of code in a notebook."""
    if path.suffix == ".py":
        return len(path.read_text(encoding="utf-8").splitlines())
    return sum(len(cell["source"]) for cell in code_cells(path))


def sizes(pattern: str, out: str) -> list[tuple[float, ...]]:
    """The numbers that a pattern finds in what was printed, at least once."""
    found = [tuple(map(float, match.groups())) for match in re.finditer(pattern, out)]
    assert found, f"{pattern!r} is not in {out!r}"
    return found


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_run(path: Path) -> None:
    assert lines_of(path) < 60
    if path.suffix == ".py":
        assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def test_the_readme_lists_every_example_and_nothing_else() -> None:
    listed = set(re.findall(r"\]\(([^)#:]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    there = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}
    assert {name.split("/")[0] for name in listed if not name.startswith("..")} == there
    assert all((EXAMPLES / name).exists() for name in listed)


def test_the_notebook_is_committed_without_outputs() -> None:
    assert [(cell["outputs"], cell["execution_count"]) for cell in code_cells(NOTEBOOK)] == [([], None)] * len(
        code_cells(NOTEBOOK)
    )


@pytest.mark.slow
def test_rag_finds_the_passage_and_answers_from_a_part_of_it(run: Run) -> None:
    out = run("rag", "What is the capital of the kingdom of Zubravia?")
    passages, tokens = sizes(r"(\d+) passages, (\d+) tokens", out)[0]
    ((read, kept, full),) = sizes(rf"(\d+) tokens read, {MIB} of {MIB} MiB kept", out)
    assert passages > 90
    assert read < tokens / 10
    assert 0.11 < kept / full < 0.14  # two digits of each are printed
    answer, best = out.splitlines()[3], out.splitlines()[5]
    assert "Halvenport" in answer
    assert re.match(r"  passage \d+: .*Halvenport\.'$", best)


@pytest.mark.slow
def test_many_questions_are_answered_from_the_saved_text(run: Run, text: Path) -> None:
    out = run("many_questions", "--file", text, FACT.question)
    ((held, full),) = sizes(rf"{MIB} of {MIB} MiB held", out)
    ((saved,),) = sizes(rf"saved: {MIB} MiB", out)
    assert held < 0.6 * full
    assert abs(saved - held) < 0.3
    assert FACT.answer in out.split(FACT.question)[1]
    ((question,),) = sizes(r"(\d+) tokens were read, not the text", out)
    assert question < sizes(r"(\d+) tokens read", out)[0][0] / 4


def test_many_questions_hides_what_it_asks_for() -> None:
    made = load_example("many_questions")
    assert all(fact.needle in made.essay_with_facts() for fact in made.FACTS)


@pytest.mark.slow
def test_batch_summaries_prints_each_text_within_the_memory(run: Run, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.txt" for name in ("bees", "bread", "maps")]
    for file, paragraph in zip(files, (1, 3, 4), strict=True):
        file.write_text(read_haystack().split("\n\n")[paragraph], encoding="utf-8")
    out = run("batch_summaries", *files, "--new", 8, "--kv-memory", "6MiB")
    assert sorted(re.findall(r"^ *\d+\.\d s  (\w+)\.txt: \w", out, re.MULTILINE)) == ["bees", "bread", "maps"]
    ((most, whole),) = sizes(rf"at most {MIB} MiB held; their whole caches together: {MIB} MiB", out)
    assert most < 6.05
    assert whole > 8


def test_batch_summaries_takes_whole_essays() -> None:
    essays = load_example("batch_summaries").essays(16)
    assert "\n\n".join(essays.values()) == read_haystack()
    assert next(iter(essays)) == "On Keeping Bees"


@pytest.mark.slow
def test_a_chat_holds_a_bounded_part_of_its_turns(run: Run) -> None:
    out = run("chat_with_memory", "--new", 40)
    turns = sizes(r"\[(\d+) tokens of turns, (\d+) of their entries held", out)
    assert len(turns) == 4
    assert all(held <= 64 + 63 for _, held in turns)
    assert turns[-1][1] < turns[-1][0]
    assert sizes(r"At rest: (\d+) entries", out) == [(64.0,)]
    assert "Amberfield" in out.split("Where does Ada live?")[1]


@pytest.mark.slow
def test_a_pipeline_reads_into_a_compressed_cache(run: Run, text: Path) -> None:
    out = run("pipeline", "--file", text, "--budget", 0.25)
    shares = sizes(r"of [\d.]+ MiB \(([\d.]+)%\)", out)
    assert shares[0] == (100.0,)
    assert 24.5 < shares[1][0] < 25.5
    whole, part = re.findall(r"% kept: (.*)", out)
    assert FACT.answer in whole
    assert FACT.answer in part


@pytest.mark.slow
def test_own_data_names_a_setting(run: Run, tmp_path: Path) -> None:
    made = load_example("own_data")
    prompts = made.write_prompts(tmp_path / "mine.jsonl", 2)
    assert [set(json.loads(row)) for row in prompts.read_text().splitlines()] == [{"prompt"}] * 2
    out = run("own_data", "--prompts", prompts, "--policies", "winnow", "--budgets", "0.5", "--keep", "0.01", "--new", 8)
    ((share, kept),) = sizes(rf"winnow at 50% +{MIB}% \(.*\) of the tokens are the same, {MIB} MiB kept", out)
    assert 0 < share <= 100
    assert kept > 1
    assert "Use winnow at 50%" in out
    assert "over 2 prompts" in out


@pytest.mark.slow
def test_a_policy_of_ones_own_is_the_same_as_object_and_by_name(run: Run, text: Path) -> None:
    parts = run("own_policy", "--file", text).strip().split("\n\n")
    assert [part.split(", ")[0] for part in parts] == ["snapkv", "valuesnap:norm=1.0", "adakv:of=valuesnap:norm=1"]
    assert [part.split(", ")[1].split(" of")[0] for part in parts] == ["25%"] * 3
    assert all(part.split(" MiB kept\n")[1] for part in parts)
    made = wk.policy("valuesnap:norm=1")
    assert made == type(made)(norm=1.0)
    assert type(made).__module__ == "example_own_policy"


@pytest.mark.slow
def test_langchain_asks_about_a_stored_text(run: Run, embedded: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed (pip install langchain-openai)")
    with running(tiny_app(Engine(*embedded), model="embedded", store=str(tmp_path / "store"))) as server:
        out = run("langchain_chat", "--url", f"{server.url}/v1")
    ((kept, seen),) = sizes(r"stored: ([\d.]+) entries a head of (\d+) tokens", out)
    assert kept == 128 < seen / 4
    used = re.findall(r"'input_tokens': (\d+).*'cache_read': (\d+)", out)
    assert len(used) == 2
    assert all(int(all_of_it) - int(stored) < 24 for all_of_it, stored in used)  # the question and the template's end
    assert FACT.answer in out.split(FACT.question)[1]


class Started:
    """A process that has printed something; whoever waits for it must have ended it."""

    def __init__(self, printed: str) -> None:
        self.stdout, self.ended = io.StringIO(printed), False

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.ended

    def terminate(self) -> None:
        self.ended = True


@pytest.mark.slow
def test_langchain_finds_the_server_that_it_starts(winnow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it starts takes these options, and says where it listens as the example reads it."""
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed (pip install langchain-openai)")
    monkeypatch.setattr("winnowkv.serve.logs.set_up", lambda **options: None)

    def serve(settings: Any, model: str, device: Any, dtype: Any, socket: Any, address: str, as_json: bool) -> None:
        assert model == "embedded"
        socket.close()
        print(said(settings, address, as_json), flush=True)

    def start(command: list[str], **options: Any) -> Started:
        assert command[:3] == [sys.executable, "-m", "winnowkv"]
        code, out, err = winnow(*command[3:])
        assert (code, err) == (0, "")
        return Started(out)

    monkeypatch.setattr("winnowkv.cli.serve.run", serve)
    monkeypatch.setattr(subprocess, "Popen", start)
    asked = argparse.Namespace(url=None, model="embedded")
    with load_example("langchain_chat").server(asked) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)


@pytest.mark.slow
def test_langchain_ends_its_server_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed (pip install langchain-openai)")
    example, asked = load_example("langchain_chat"), argparse.Namespace(url=None, model="embedded")
    processes = [Started('{\n  "url": "http://127.0.0.1:1"\n}\n'), Started("")]  # the second one ended at once
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: next(each for each in processes if not each.ended))
    with pytest.raises(KeyError, match="mine"), example.server(asked):
        raise KeyError("mine")
    with pytest.raises(json.JSONDecodeError), example.server(asked):
        pass
    assert all(each.ended for each in processes)


def test_python_runs_the_command_as_a_module() -> None:
    """``python -m winnowkv``, which the example starts its server with."""
    found = subprocess.run([sys.executable, "-m", "winnowkv", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"winnow {wk.__version__}\n"


@pytest.mark.slow
def test_the_notebook_draws_what_was_kept(
    embedded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(wk, "load", lambda name: embedded)
    figures: list[Any] = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    names: dict[str, Any] = {}
    for cell in code_cells(NOTEBOOK):
        exec("".join(cell["source"]), names)
    kept, out = names["kept"], capsys.readouterr().out
    map_axes, bar_axes = (figure.axes[0] for figure in figures)
    image = map_axes.images[0].get_array()
    assert image.shape == (kept.layers, kept.tokens)
    assert image.mean() == pytest.approx(kept.kept_fraction)
    heights = [bar.get_height() for bar in bar_axes.patches]
    assert sum(heights) == pytest.approx(image.sum())
    assert kept.kept_fraction == pytest.approx(0.2, abs=0.01)
    assert len(set(heights)) > 1  # layers get parts of their own
    assert FACT.answer in out.splitlines()[0]
    words = out[out.index("<|im_start|>") :]
    assert "…" in words
    assert FACT.needle in words.replace("\n", " ")
    plt.close("all")
