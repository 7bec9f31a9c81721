"""What is said of a model that has no calibration profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.profiles import PROFILES, random_profile
from winnowkv.calibrate.missing import GUESSES, UNUSABLE, missing_profile
from winnowkv.models.calibration import installed_file
from winnowkv.models.info import ModelInfo

SHAPE = ModelInfo("Drawn", 3, 4, 2, "abc", compressed=3)


@pytest.mark.parametrize(
    ("spec", "instead"),
    [
        ("winnow", GUESSES),
        ("winnow:lookahead=32", GUESSES),
        ("criticalkv:of=winnow", GUESSES),
        ("winnow:observe=context", None),
        ("winnow:share=0", None),
        (f"winnow:profile={PROFILES}", None),
        ("headkv", UNUSABLE),
        ("compresskv", UNUSABLE),
        ("adakv:of=compresskv", UNUSABLE),
        ("compresskv:heads=all:budgets=uniform", None),
        ("compresskv:heads=all", UNUSABLE),
        ("snapkv", None),
        ("full", None),
        ("int8", None),
    ],
)
def test_each_policy_that_wants_a_profile_is_named(spec: str, instead: str | None) -> None:
    found = missing_profile([spec], SHAPE, "m")
    assert (found and found.instead) == (None if instead is None else {spec: instead})


def test_nothing_is_missing_once_a_profile_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_PROFILE_FOLDER", str(tmp_path))
    specs = ["winnow", "headkv", "compresskv", "snapkv"]
    found = missing_profile(specs, SHAPE, "m")
    assert found is not None
    assert list(found.instead) == specs[:3]
    random_profile(SHAPE, 3).write(installed_file(SHAPE))
    assert missing_profile(specs, SHAPE, "m") is None


def test_the_commands_name_the_model_and_the_repository_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = missing_profile(["winnow", "headkv", "compresskv"], SHAPE, "my model")
    assert found is not None
    assert found.commands == (
        "winnow profile fetch 'my model' --repo OWNER/NAME",
        "winnow calibrate --model 'my model' --out profile.json && winnow profile add profile.json",
    )
    first, second, ways = found.sentences()
    assert first == f"no calibration profile of this model for winnow: {GUESSES}"
    assert second == f"no calibration profile of this model for headkv, compresskv: {UNUSABLE}"
    assert all(command in ways for command in found.commands)
    assert found.to_dict() == {"instead": dict(found.instead), "commands": list(found.commands)}
    monkeypatch.setenv("WINNOW_PROFILES", "ann/profiles")
    again = missing_profile(["winnow"], SHAPE, "m")
    assert again is not None
    assert again.commands[0] == "winnow profile fetch m"


def test_a_config_alone_is_not_calibrated() -> None:
    found = missing_profile(["winnow"], SHAPE, "shapes/config-70b.json")
    assert found is not None
    assert found.commands[1].startswith("winnow calibrate --model FOLDER ")
