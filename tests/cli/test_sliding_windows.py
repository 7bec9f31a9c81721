"""Commands on a model with sliding-window layers beside full ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from support.models import hybrid
from support.tokenizers import byte_tokenizer
from winnowkv.cache.reading import prefill
from winnowkv.calibrate import run as calibration
from winnowkv.calibrate.card import unsaid
from winnowkv.calibrate.probe import ProbedCache
from winnowkv.models.calibration import read_profile

pytestmark = pytest.mark.slow

COMMANDS = {
    "needle": ("--lengths", 700, "--depths", 0.5, "--max-new-tokens", 6),
    "audit": ("--max-new-tokens", 6),
    "eval": ("--tasks", "longeval"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hybrid model with a tokenizer of bytes that puts a BOS in front."""
    path, words = tmp_path_factory.mktemp("model"), byte_tokenizer(bos=True)
    hybrid(len(words)).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    """What the commands read."""
    path = tmp_path_factory.mktemp("inputs")
    texts = ["Once upon a time there was " * 9, "A list: " + ", ".join(map(str, range(60))), "Hi"]
    (path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (path / "longeval").mkdir()
    rows = [{"prompt": text, "expected_number": 7} for text in texts[:2]]
    (path / "longeval" / "lines_200.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"needle": (), "audit": ("--prompts", path / "prompts.jsonl"), "eval": ("--data", path)}


@pytest.mark.parametrize("command", COMMANDS)
def test_needle_audit_and_eval_run(
    command: str,
    folder: Path,
    inputs: dict[str, tuple[object, ...]],
    winnow: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    code, out, err = winnow(
        command, "--model", folder, "--no-chat", "--policies", "full,snapkv:observe=8,streaming,adakv:of=snapkv:observe=8",
        "--budgets", "0.2,200", *COMMANDS[command], *inputs[command], "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err + out
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {(line["policy"], line["budget"]) for line in lines} >= {("streaming", 0.2), ("adakv:of=snapkv:observe=8", 200)}
    for line in lines:
        # A prompt of two letters holds no observation window; nothing else may fail.
        assert line["failed"] is None or (line["prompt_tokens"] < 5 and line["policy"] != "full"), line
        if command == "audit" and line["policy"] == "full":
            assert (line["agreement"], line["exact_match"], line["first_divergence"]) == (1, True, None)


def test_calibration_measures_the_layers_that_are_compressed(
    folder: Path, winnow: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A random model answers nothing, so its answers are replaced by the right ones."""

    @torch.no_grad()
    def told(made: Any, model: PreTrainedModel, watch: Any, limit: int, stop: set[int]) -> list[int]:
        cache = ProbedCache(model, watch)
        prefill(model, torch.tensor([made.ids]), cache)
        tokens = made.ids[slice(*made.span)]
        for token in tokens:
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        return tokens

    monkeypatch.setattr(calibration, "answer", told)
    profile = tmp_path / "profile.json"
    code, out, err = winnow(
        "calibrate", "--model", folder, "--no-chat", "--count", 9, "--lengths", 700, "--depths", 0.5, "--out", profile
    )  # fmt: skip
    assert code == 0, err + out
    made = read_profile(profile)
    assert (len(made.errors), len(made.semantic), made.model_info.layers) == (2, 2, 6)
    assert made.errors[0] != made.errors[1]
    ways = f"use it: winnow profile add {profile}; share it: winnow profile publish {profile} OWNER/NAME"
    assert " ".join(out.split()).endswith(ways)
    about, words = made.about, ("--model", folder.name, "--count", "9", "--lengths", "700", "--depths", "0.5", "--seed", "0")
    assert about["command"] == " ".join(("winnow", "calibrate", *words, "--error-entries", "32", "--no-chat"))
    assert (about["prompts"], about["answered"], about["seed"], unsaid(made)) == (9, 9, 0, [])
    code, out, err = winnow(
        "needle", "--model", folder, "--no-chat", "--policies", f"compresskv:profile={profile}", "--budgets", 0.2,
        "--lengths", 700, "--depths", 0.5, "--max-new-tokens", 3, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err + out
