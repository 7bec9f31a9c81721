"""`winnow audit`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.texts import WORDS
from winnowkv.models import load as models

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompts to audit"),
        (("--prompts", "/no/such/file.jsonl"), "prompt file /no/such/file.jsonl cannot be read"),
        (("--prompts", __file__, "--policies", "snapvk"), "Did you mean 'snapkv'"),
        (("--prompts", __file__, "--budgets", "0"), "budget 0 keeps nothing"),
        (("--prompts", __file__, "--keep", "1.5"), "'--keep'"),
        (("--tasks", "longbench_qaspr"), "Did you mean 'longbench_qasper'"),
    ],
)
def test_bad_values_exit_with_two(
    winnow: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = winnow("audit", *arguments)
    assert code == 2
    assert message in err
    assert out == ""


@pytest.mark.skipif(models.find_wheel() is None, reason=f"the embedded model is missing ({models.INSTALL})")
def test_the_command_on_the_embedded_model(winnow: Callable[..., tuple[int, str, str]], tmp_path: Any) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(WORDS * 12 + "\nSay in one sentence what this text is about.")
    arguments = ("--prompts", str(prompt), "--policies", "full,snapkv:observe=16", "--budgets", "0.25,1000",
                 "--max-new-tokens", "12", "--out", str(tmp_path / "out"))  # fmt: skip
    if models.best_device() != "cpu":
        arguments += ("--float32",)
    code, out, err = winnow("audit", *arguments, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    full, quarter, everything = summary["groups"]
    assert full["agreement"]["mean"] == everything["agreement"]["mean"] == everything["exact_match"]["mean"] == 1
    assert everything["kl_p99"]["mean"] < 1e-4
    assert 0 <= quarter["agreement"]["mean"] <= 1
    assert quarter["kl_mean"]["mean"] > everything["kl_mean"]["mean"]
    assert quarter["kept_bytes"] == pytest.approx(quarter["full_bytes"] / 4, rel=0.01)
    # 30 layers, 3 KV heads, keys and values of 64 numbers in the dtype that the model is served in.
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    itemsize = getattr(torch, summary["served_dtype"]).itemsize
    assert line["full_bytes"] == line["prompt_tokens"] * 30 * 3 * 2 * 64 * itemsize
    assert 250 < line["prompt_tokens"] < 350
    assert summary["dtype"] == "float32"
    assert "only 1 row: no interval can be given" in summary["notes"]
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    code, out, _ = winnow("audit", *arguments)  # as a table, of what is there already
    assert code == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    assert "snapkv:observe=16 at 25%" in out
    assert summary["recommendation"]["sentence"] in " ".join(out.split())
