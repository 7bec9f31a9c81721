"""Citation, workflows, issue forms and hooks can be read, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import winnowkv
from support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(one for one in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if one.name != "config.yml")
TEXTS = [ROOT / name for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", ".github/PULL_REQUEST_TEMPLATE.md")]
MAKE_TARGETS = set(re.findall(r"(?m)^([a-z][a-z-]*):", (ROOT / "Makefile").read_text()))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_citation_is_of_this_version() -> None:
    cited = read(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == winnowkv.__version__
    assert {"message", "title", "authors"} <= set(cited)


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert first is not None
    assert first[1] == winnowkv.__version__


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_exists(path: Path) -> None:
    flow = read(path)
    assert flow["permissions"] == {"contents": "read"}
    runs = [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs
    asked = [target for run in runs for target in re.findall(r"\bmake ([a-z-]+)", run)]
    assert set(asked) <= MAKE_TARGETS
    files = [name for run in runs for name in re.findall(r"\bbash (\S+)", run)]
    assert asked or files
    assert all((ROOT / name).is_file() for name in files)


def test_only_a_tag_and_a_maintainers_switch_publish() -> None:
    publish = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["publish"]
    assert "refs/tags/" in publish["if"]
    assert "vars.PUBLISH == 'true'" in publish["if"]
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_by_distinct_names(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert all("label" in part["attributes"] for part in asked)
    names = [part["id"] for part in asked]
    assert len(set(names)) == len(names) > 0


def test_hooks_are_local_commands_of_the_development_environment() -> None:
    repos = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    lint = re.search(r"(?ms)^lint:.*?\n\n", (ROOT / "Makefile").read_text())
    assert lint is not None
    for hook in repos[0]["hooks"]:
        command = hook["entry"].split()[0]
        assert command.startswith(".venv/bin/")
        assert command.removeprefix(".venv/bin/") in lint[0]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_files_and_targets_that_a_text_names_exist(path: Path) -> None:
    text = path.read_text()
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((?!https?:)([^)#]+)", text))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= MAKE_TARGETS
