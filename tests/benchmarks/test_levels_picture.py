"""What benchmarks/levels_picture.py counts and draws."""

import json
import runpy
import sys

import pytest
import yaml

from support.paths import BENCHMARKS
from winnowkv.errors import InputError

sys.path.insert(0, str(BENCHMARKS))  # as when it is run: it imports the file beside it
PICTURE = runpy.run_path(str(BENCHMARKS / "levels_picture.py"))


def line(policy, row, same, budget=0.1, **more):
    return {
        "policy": policy, "budget": budget, "task": "t", "row": row, "same_tokens": same,
        "kl_tokens": [0.5] * len(same), "kept_bytes": 100 * budget, "full_bytes": 100, **more,
    }  # fmt: skip


LINES = [
    line("winnow", "a", "1100"), line("winnow", "b", "1111"), line("winnow", "c", "1"),
    line("best", "a", "1111"), line("best", "b", "1110"), line("best", "c", "1"),
    line("cake", "a", "0000"), line("cake", "b", "0001"), line("cake", "d", "1111"),
]  # fmt: skip


def test_rows_count_that_all_have_and_tokens_after_the_first_ones():
    made, rows = PICTURE["points"](LINES, 3)
    assert rows == 2
    assert [(point["policy"], point["correct"]) for point in made] == [
        ("winnow, best", 0.75), ("winnow, lean", 0.5), ("cake", 0.25),
    ]  # fmt: skip
    with pytest.raises(InputError, match="no row was measured for all variants and budgets with more than 9 tokens"):
        PICTURE["points"](LINES, 9)
    with pytest.raises(InputError, match="no row"):
        PICTURE["points"]([line("winnow", "a", "11", failed="why")], 1)


def test_the_picture_is_written(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "dtype": "float32"}))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LINES))
    PICTURE["main"]([str(tmp_path), "--after", "2", "--out", str(tmp_path / "p.svg"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["title"] == "2 summaries, after 2 tokens of an answer, tiny in float32"
    assert (tmp_path / "p.svg").stat().st_size > 1000
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(InputError, match="is not there"):
        PICTURE["main"]([str(tmp_path / "none")])
