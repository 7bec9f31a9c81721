"""`winnow bench`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from support.tokenizers import Letters
from winnowkv.cli import loading

SNAP = "snapkv:observe=8:kernel=3"
Winnow = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(winnow: Winnow, monkeypatch: pytest.MonkeyPatch, llama: LlamaForCausalLM) -> Winnow:
    """The command on the tiny model."""
    monkeypatch.setattr(loading, "load_model", lambda name, check, random: (llama, Letters()))
    return functools.partial(winnow, "bench")


@pytest.mark.slow
def test_the_command_prints_json_and_then_tables(bench: Winnow, tmp_path: Path) -> None:
    arguments = ("--policies", SNAP, "--budgets", 0.25, "--contexts", "300", "--batches", 1, "--rounds", 1, "--steps", 2,
                 "--kv-memory", "1MiB", "--serve-context", 300, "--new-tokens", 30, "--requests", 0,
                 "--out", tmp_path)  # fmt: skip
    code, out, err = bench(*arguments, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["lines"] == summary["expected_lines"] == 3
    code, out, err = bench(*arguments)
    assert code == 0, err
    assert "3 measurements are in" in err
    for said in (
        "Prefill, median of pairs",
        "Decode, steps in turns",
        "dynamic",
        "Decode in a given KV memory",
        "not measured",
    ):
        assert said in out
    assert f"requests that fit in the KV memory over the full cache's, {SNAP} at 25%: " in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policies", "snapvk"), "Did you mean 'snapkv'"),
        (("--contexts", "8q"), "--contexts '8q' is no number of tokens"),
        (("--batches", "one"), "--batches: 'one' is not a number"),
        (("--kv-memory", "lots"), "--kv-memory 'lots' is not a size"),
        (("--rounds", "0"), "'--rounds'"),
    ],
)
def test_bad_values_exit_with_two(bench: Winnow, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = bench(*arguments, "--out", tmp_path)
    assert code == 2
    assert message in err
    assert out == ""
