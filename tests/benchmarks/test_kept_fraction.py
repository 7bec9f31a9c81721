"""What benchmarks/kept_fraction.py counts and draws."""

import json
import runpy

import pytest
import yaml
from matplotlib.image import imread

from support.paths import BENCHMARKS
from winnowkv.errors import InputError

KEPT = runpy.run_path(str(BENCHMARKS / "kept_fraction.py"))


def needle_line(policy, budget, depth, correct, kept=10):
    return {
        "policy": policy, "budget": budget, "length": 300, "depth": depth, "needle": "n", "question": "q", "answer": "a",
        "correct": correct, "kept_bytes": kept, "full_bytes": 100,
    }  # fmt: skip


def write_run(folder, lines, **config):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "dtype": "float32", **config}))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def runs(tmp_path):
    """Three depths that the full cache answers and one it does not, in two folders; ``snapkv`` lacks one at 0.2."""
    full = [needle_line("full", 1, depth, depth < 0.8, 100) for depth in (0.1, 0.3, 0.5, 0.9)]
    winnow = [
        needle_line("winnow", budget, depth, True, 100 * budget) for depth in (0.1, 0.3, 0.5, 0.9) for budget in (0.1, 0.2)
    ]
    snapkv = [needle_line("snapkv", 0.1, depth, depth == 0.3) for depth in (0.1, 0.3, 0.5, 0.9)]
    snapkv += [needle_line("snapkv", 0.2, depth, True, 20) for depth in (0.1, 0.3)]
    return [write_run(tmp_path / "one", [*full, *snapkv]), write_run(tmp_path / "two", winnow)]


def test_only_prompts_count_that_the_full_cache_answers_and_every_policy_read(tmp_path):
    lines, answered = KEPT["counted"](KEPT["read_lines"](runs(tmp_path)))
    found = [(p["policy"], p["budget"], p["prompts"], p["correct"], p["kept_bytes"]) for p in KEPT["points"](lines)]
    assert answered == 3
    assert found == [
        ("full", 1, 2, 1, 100), ("winnow", 0.1, 2, 1, 10), ("winnow", 0.2, 2, 1, 20), ("snapkv", 0.1, 2, 0.5, 10),
        ("snapkv", 0.2, 2, 1, 20),
    ]  # fmt: skip
    lines, _ = KEPT["counted"](KEPT["read_lines"]([tmp_path / "one", tmp_path / "two"]), ["winnow"])
    assert {p["prompts"] for p in KEPT["points"](lines)} == {3}


def test_prompts_of_another_model_are_other_prompts(tmp_path):
    one = write_run(tmp_path / "one", [needle_line("full", 1, 0.1, True, 100)])
    other = write_run(tmp_path / "two", [needle_line("winnow", 0.1, 0.1, True)], model="another")
    with pytest.raises(InputError, match=r"winnow at 0\.1 has the fewest, 0 of 1"):
        KEPT["counted"](KEPT["read_lines"]([one, other]))


def test_runs_without_a_picture_are_refused(tmp_path):
    folder = write_run(tmp_path / "one", [needle_line("full", 1, 0.1, False, 100), needle_line("snapkv", 0.1, 0.1, True)])
    with pytest.raises(InputError, match="no prompt here is answered by the full cache"):
        KEPT["counted"](KEPT["read_lines"]([folder]))
    with pytest.raises(InputError, match=r"policy 'cake' has no lines: there are full, snapkv"):
        KEPT["counted"](KEPT["read_lines"]([folder]), ["cake"])
    with pytest.raises(InputError, match=r"does not end in \.svg"):
        KEPT["main"]([str(folder), "--out", "picture.png"])


def test_the_picture_is_800_pixels_wide_on_white_and_reproducible(tmp_path, capsys):
    folders, out = [str(folder) for folder in runs(tmp_path)], tmp_path / "docs" / "kept.svg"
    KEPT["main"]([*folders, "--out", str(out)])
    first = out.read_bytes()
    KEPT["main"]([*folders, "--out", str(out), "--json"])
    assert out.read_bytes() == first
    assert b"<svg" in first
    picture = imread(out.with_suffix(".png"))
    assert picture.shape[1] == 800
    assert picture[0, 0].tolist() == [1, 1, 1, 1]
    red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.3) & (picture[..., 2] < 0.3)
    assert red.sum() > 500  # winnow's line
    assert (
        "2 needle prompts of 300 tokens, tiny in float32: those that the full cache answers; 1 more" in capsys.readouterr().out
    )
