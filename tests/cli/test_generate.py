"""`winnow generate` on a tiny model: the answer of a compress block, sampling, chunks, and how lengths are folded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import winnowkv as wk
from support.evaluation import write_model
from support.terminal import too_wide
from winnowkv.models.load import load
from winnowkv.report import summary

Winnow = Callable[..., tuple[int, str, str]]
PROMPT = " ".join(f"w{(7 * n) % 120 + 1}" for n in range(150))
DRAWN = ("--temperature", "1.5", "--top-p", "0.9", "--top-k", "50")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are words."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def answered(winnow: Winnow, folder: Path) -> Callable[..., dict[str, Any]]:
    def ask(*more: object) -> dict[str, Any]:
        arguments = ("--model", folder, "--no-chat", "--max-new-tokens", 8, "--dtype", "float32", *more)
        code, out, err = winnow("generate", PROMPT, *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return ask


@pytest.mark.parametrize("policy", ["winnow", "snapkv:observe=8", "full"])
def test_the_answer_is_that_of_a_compress_block(answered: Any, folder: Path, policy: str) -> None:
    model, tokenizer = load(str(folder), dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with wk.compress(model, policy, 0.3, task="localization", tokenizer=tokenizer) as run:
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    found = answered("--policy", policy, "--budget", 0.3, "--task", "localization")
    assert found["answer"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["kept_entries"] == run.report.kept_entries
    assert found["decode_tokens"] == 7


def test_a_seed_gives_the_same_draws(answered: Any) -> None:
    first, again, other = (answered(*DRAWN, "--seed", seed)["answer"] for seed in (1, 1, 2))
    greedy = answered()["answer"]
    assert first == again
    assert len({first, other, greedy}) == 3
    assert answered("--temperature", 1.5, "--top-k", 1)["answer"] == greedy
    assert answered("--temperature", 1.5, "--top-p", 1e-6)["answer"] == greedy


def test_chunks_keep_what_one_pass_keeps(answered: Any) -> None:
    whole, chunked = (answered("--policy", "snapkv:observe=8", *more) for more in ((), ("--prefill-chunk", 64)))
    assert chunked["kept_entries"] == whole["kept_entries"]
    assert chunked["answer"] == whole["answer"]


def test_a_decode_budget_is_told(winnow: Winnow, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = winnow("generate", PROMPT, "--model", folder, "--no-chat", "--max-new-tokens", 200, "--decode-budget", 64)
    assert code == 0, err
    _, *notes = out.splitlines()
    assert too_wide("\n".join(notes)) == []
    assert "-- decode budget 64: " in out
    assert "(the default)" in out


def test_lengths_of_layers_are_folded() -> None:
    assert summary([360] * 30) == "360 x 30"
    assert summary([10, 10, 12.5, 7]) == "10 x 2 12.5 7"
    assert summary([39, 704, 100, 253, 274, 274]) == "39 to 704 (mean 274) x 6"
    assert summary([]) == ""
