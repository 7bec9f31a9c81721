"""Fixtures: tiny random models, one case for every way a built-in policy may work, the command line, outside data."""

from __future__ import annotations

import atexit
import copy
import gc
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if os.environ.get("WINNOW_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do

import pytest
import torch
from transformers import PreTrainedModel

from support.cases import CASES, EVICTING, QUANTIZED, Case
from support.hub import TOKEN, StubHub, stub_hub
from support.models import built
from support.paths import ROOT
from support.profiles import PROFILES, write_profiles

torch.set_num_threads(1)  # the models are so small that handing work to threads costs more than the work

# What takes long by itself: real models, plans of the command line, Ray, lm-evaluation-harness, Chromium, garbage collection.
SLOW_FIXTURES = {"browser", "done", "embedded", "gemma", "loaded", "no_collector", "planned", "workers"}
# One case of each policy, and of each storage, that the fast run takes from the grids.
FAST_CASES = [next(case for case in CASES if case.name == name) for name in dict.fromkeys(case.name for case in CASES)]
FAST_CASES += QUANTIZED[:3]


def is_slow(item: pytest.Item) -> bool:
    """Whether a test is marked slow, needs something slow, or runs a second model family or a second case of a policy."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if item.get_closest_marker("slow") or fixtures & SLOW_FIXTURES:
        return True
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if given.get("model") == "qwen2":
        return True
    cases = [value for value in given.values() if isinstance(value, Case)]
    return bool(cases and fixtures & {"llama", "model", "sliding"} and cases[0] not in FAST_CASES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test ``slow`` or ``fast``."""
    for item in items:
        item.add_marker("slow" if is_slow(item) else "fast")


def pytest_collection_finish() -> None:
    """Leave thousands of collected tests out of garbage collection: tests that collect took five times as long with them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give them back: some libraries report what is left at exit."""
    gc.unfreeze()


if "PYTEST_XDIST_WORKER" not in os.environ:  # one of several test processes: the first one made the folder, and removes it
    atexit.register(shutil.rmtree, PROFILES, ignore_errors=True)
    write_profiles()


@pytest.fixture
def llama() -> PreTrainedModel:
    return copy.deepcopy(built("llama"))


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each tiny model in turn, a fresh copy: what one test changes cannot reach the next."""
    return copy.deepcopy(built(request.param))


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Each policy case in turn."""
    return request.param


@pytest.fixture(params=QUANTIZED, ids=str)
def quantized(request: pytest.FixtureRequest) -> Case:
    """Each case that stores what it keeps in fewer bits."""
    return request.param


@pytest.fixture(params=EVICTING, ids=str)
def evicting(request: pytest.FixtureRequest) -> Case:
    """Each case that evicts something."""
    return request.param


@pytest.fixture
def winnow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, standard output, standard error."""
    from winnowkv.cli import main

    def call(*arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A Hub on loopback in the place of the real one, with its owner's token; what waits between two tries does not."""
    from huggingface_hub import close_session, constants

    with stub_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{running.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield running
        close_session()


def outside(variable: str, folder: str) -> Path:
    """A folder that is not part of the repository: the variable's, or the one beside the checkout; skips if absent."""
    path = Path(os.environ.get(variable) or ROOT.parent / "shared" / folder)
    if not path.is_dir():
        pytest.skip(f"{path} does not exist; point {variable} at the folder to run this test")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return outside("WINNOW_DATA", "data")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return outside("WINNOW_GOLDEN", "golden")
