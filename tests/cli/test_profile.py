"""``winnow profile``: published, fetched, installed, listed and removed, against a Hub on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import winnowkv as wk
from support.hub import TOKEN, StubHub
from support.models import hybrid, tiny_model
from support.profiles import random_profile
from support.terminal import blocks, too_wide
from support.tokenizers import byte_tokenizer
from winnowkv.models.curve import Curve

Winnow = Callable[..., tuple[int, str, str]]
REPO = "ann/profiles"
SHIPPED = "smollm2-135m-instruct"
ABOUT = {"date": "2026-11-29", "seed": 3, "prompts": 10, "answered": 9, "dtype": "float32"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def profile() -> wk.CalibrationProfile:
    made = random_profile(wk.ModelInfo.of(tiny_model("llama")), 5)
    return replace(made, model="ann/tiny", about=ABOUT, curves={"snapkv": Curve(((0.0, 0.1), (1.0, 1.0)), 9)})


@pytest.fixture
def file(profile: wk.CalibrationProfile, tmp_path: Path) -> Path:
    profile.write(tmp_path / "p.json")
    return tmp_path / "p.json"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINNOW_PROFILE_FOLDER", str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_what_one_user_publishes_another_uses_without_naming_it(
    winnow: Winnow, hub: StubHub, file: Path, folder: Path, installed: Path, profile: wk.CalibrationProfile
) -> None:
    model = tiny_model("llama")
    assert wk.policy("winnow").read_profile(wk.ModelInfo.of(model)) is None
    code, out, err = winnow("profile", "publish", file, REPO)
    assert code == 0, err
    address, *notes = out.splitlines()
    assert (
        address
        == f"{hub.endpoint}/{REPO}/blob/main/winnowkv/{profile.model_info.architecture}-{profile.model_info.config}.json"
    )
    assert f"winnow profile fetch ann/tiny --repo {REPO}" in " ".join(notes)
    assert "does not say where the weights came from, versions of the packages, the command" in " ".join(
        " ".join(notes).split()
    )
    code, out, err = winnow("profile", "fetch", folder, "--repo", REPO)
    assert code == 0, err
    path, said = Path(out.splitlines()[0]), " ".join(out.split())
    assert path.parent == installed
    assert "compresskv, headkv, winnow use it from now on" in said
    assert "curves for --budget auto:0.95: snapkv" in said
    assert TOKEN not in out + err
    for spec in ("winnow", "compresskv", "headkv"):
        wk.CompactCache(model, f"{spec}:observe=4", 20)
    assert wk.policy("winnow").read_profile(wk.ModelInfo.of(model)) == profile
    wk.CompactCache(model, "snapkv:observe=4", "auto:0.9")


def test_json_of_what_was_published_and_fetched(
    winnow: Winnow, hub: StubHub, file: Path, folder: Path, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = winnow("profile", "publish", file, REPO, "--name", "ann/other", "--message", "a note", "--private", "--json")
    done = json.loads(out)
    assert {name: done[name] for name in ("repo", "model", "created", "changed")} == {
        "repo": REPO, "model": "ann/other", "created": True, "changed": True,
    }  # fmt: skip
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].messages[-1] == "a note"
    monkeypatch.setenv("WINNOW_PROFILES", REPO)
    out_file = tmp_path / "kept.json"
    code, out, _ = winnow("profile", "fetch", folder, "--out", out_file, "--revision", done["commit"], "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["path"], found["installed"], found["commit"]) == (str(out_file), False, done["commit"])
    assert found["policies"] == ["compresskv", "headkv", "winnow"]
    assert wk.read_profile(out_file).about["fetched"]["commit"] == done["commit"]
    assert not installed.exists()
    _, out, _ = winnow("profile", "fetch", folder, "--out", out_file)
    assert f"use it: --policy compresskv:profile={out_file}" in " ".join(out.split())


def test_installed_profiles_are_listed_shown_and_removed(
    winnow: Winnow, file: Path, installed: Path, profile: wk.CalibrationProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = winnow("profile", "add", file)
    assert code == 0
    path = Path(out.splitlines()[0])
    (installed / "damaged.json").write_text("{")
    code, out, _ = winnow("profile", "list")
    assert code == 0
    assert too_wide(out.partition("-- ")[0]) == []  # paths below the table are as long as they are
    assert [row.split()[:2] for row in blocks(out)[0].rows] == [[path.stem, "installed"], [SHIPPED, "shipped"]]
    assert f"profile {installed / 'damaged.json'} is cut off" in " ".join(out.split()).replace("- ", "-")
    _, out, _ = winnow("profile", "list", "--json")
    found = json.loads(out)
    mine, shipped = found["profiles"]
    assert {name: mine[name] for name in ("file", "installed", "model", "date", "seed", "answered", "prompts", "curves")} == {
        "file": path.stem, "installed": True, "model": "ann/tiny", "date": "2026-11-29", "seed": 3, "answered": 9,
        "prompts": 10, "curves": {"snapkv": 9},
    }  # fmt: skip
    assert mine["heads"] == 5 * profile.model_info.heads
    assert (shipped["file"], shipped["installed"], shipped["model"]) == (SHIPPED, False, "embedded")
    assert [one["path"] for one in found["damaged"]] == [str(installed / "damaged.json")]
    for name in (path.stem, path.name, path, "ann/tiny"):
        code, out, _ = winnow("profile", "show", name)
        assert code == 0
        assert f"profile of ann/tiny: {path}" in out
        assert "snapkv (9 prompts)" in out
    _, out, _ = winnow("profile", "show", SHIPPED, "--json")
    shown = json.loads(out)
    assert shown["strongest"][0]["score"] == max(max(row) for row in wk.read_profile(Path(shown["path"])).semantic)
    for name in ("ann/tiny", "damaged"):
        assert winnow("profile", "rm", name)[0] == 0
    assert list(installed.iterdir()) == []
    code, _, err = winnow("profile", "rm", SHIPPED)
    assert (code, "no installed profile is called" in err) == (2, True)


def test_nothing_is_asked_of_the_hub_for_what_is_refused(
    winnow: Winnow, hub: StubHub, file: Path, folder: Path, profile: wk.CalibrationProfile, tmp_path: Path
) -> None:
    replace(profile, model=str(tmp_path)).write(tmp_path / "local.json")
    (tmp_path / "broken.json").write_text(file.read_text()[:-9])
    cases = [
        (["publish", tmp_path / "broken.json", REPO], "is cut off or broken"),
        (["publish", tmp_path / "none.json", REPO], "cannot be read"),
        (["publish", tmp_path / "local.json", REPO], "a place on your machine: say what others call it, --name HUB_ID"),
        (["publish", file, "profiles"], "'profiles' is no repository id: write it as OWNER/NAME"),
        (["fetch", folder], "no repository is named: give --repo OWNER/NAME, or set WINNOW_PROFILES to it"),
        (["fetch", folder, "--repo", "a b"], "'a b' is no repository id"),
        (["fetch", folder, "--repo", REPO, "--out", tmp_path], "is a folder"),
        (["fetch", tmp_path / "none", "--repo", REPO], "does not exist"),
        (["show", "none"], "no profile is called 'none', and no file is there"),
        (["add", tmp_path / "broken.json"], "is cut off or broken"),
    ]
    for arguments, why in cases:
        code, out, err = winnow("profile", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("winnow: ")
        assert why in " ".join(err.split())
    assert hub.asked == []


def test_errors_of_the_hub_exit_with_2_and_install_nothing(
    winnow: Winnow, hub: StubHub, folder: Path, installed: Path, profile: wk.CalibrationProfile
) -> None:
    asked = ("profile", "fetch", folder, "--repo", REPO)
    code, out, err = winnow(*asked)
    assert (code, out) == (2, "")
    assert err.startswith(f"winnow: {REPO} is not at {hub.endpoint}")
    hub.status = 403
    assert "answered 403" in winnow(*asked)[2]
    assert not installed.exists()
    assert TOKEN not in err


@pytest.mark.slow
def test_the_endpoint_is_the_environments(hub: StubHub, file: Path, tmp_path: Path) -> None:
    """As a user calls it: a process of its own, HF_ENDPOINT and HF_TOKEN from the environment."""
    done = subprocess.run(
        [sys.executable, "-c", "from winnowkv.cli import main; main()", "profile", "publish", file, REPO],
        env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.endpoint}/{REPO}/blob/main/winnowkv/LlamaForCausalLM-")
    assert TOKEN not in done.stdout + done.stderr
    assert REPO in hub.repositories


def test_no_model_is_loaded_with_a_profile_from_the_hub(hub: StubHub, folder: Path, file: Path, winnow: Winnow) -> None:
    winnow("profile", "publish", file, REPO)
    hub.asked.clear()
    wk.CompactCache(tiny_model("llama"), "winnow", 60)
    code, out, _ = winnow("plan", "--model", folder, "--context", 200, "--memory", "1GiB", "--policies", "winnow", "--json")
    assert (code, hub.asked) == (0, [])
    assert "winnow" in json.loads(out)["missing_profile"]["instead"]


def test_plan_names_what_is_missing_and_how_to_get_it(
    winnow: Winnow, file: Path, folder: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("plan", "--model", folder, "--context", 200, "--memory", "1GiB", "--budgets", 60)
    _, out, _ = winnow(*asked)
    told = " ".join(out.split())
    assert "no calibration profile of this model for winnow: retrieval heads are guessed" in told
    assert "for compresskv, headkv: it cannot be used" in told
    assert f"winnow profile fetch {folder} --repo OWNER/NAME" in told.replace("- ", "-")
    peaks = {}
    for there in (False, True):
        if there:
            winnow("profile", "add", file)
        _, out, _ = winnow(*asked, "--policies", "winnow,snapkv", "--json")
        plan = json.loads(out)
        peaks[there] = next(row["peak_bytes"] for row in plan["settings"] if row["policy"] == "winnow")
        lacking = plan["missing_profile"]
        assert (lacking is None) == there
        assert there or list(lacking["instead"]) == ["winnow"]
    assert peaks[True] < peaks[False]  # as the sentence says


@pytest.mark.slow
def test_audit_says_before_it_measures_and_afterwards_what_is_missing(winnow: Winnow, installed: Path, tmp_path: Path) -> None:
    words = byte_tokenizer(bos=True)
    hybrid(len(words)).save_pretrained(tmp_path / "small")
    words.save_pretrained(tmp_path / "small")
    (tmp_path / "prompt.txt").write_text("Once upon a time there was " * 9)
    asked = ("audit", "--model", tmp_path / "small", "--no-chat", "--prompts", tmp_path / "prompt.txt", "--budgets", 80,
             "--max-new-tokens", 3, "--out", tmp_path / "out", "--json")  # fmt: skip
    code, out, err = winnow(*asked, "--policies", "winnow,snapkv:observe=8")
    assert code == 0, err
    summary = json.loads(out)
    assert list(summary["missing_profile"]["instead"]) == ["winnow"]
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "no calibration profile of this model for winnow" in " ".join(err.split())
    code, _, err = winnow(*asked, "--policies", "winnow,headkv")
    assert code == 2
    assert "winnow profile fetch M --repo OWNER/NAME" in " ".join(err.split())
