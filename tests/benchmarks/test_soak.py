"""The long runs in small, and the page of what they found."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import ModuleType

import pytest

from support.paths import BENCHMARKS, ROOT


def script(name: str) -> ModuleType:
    """A script of benchmarks/soak as a module."""
    spec = importlib.util.spec_from_file_location(f"soak_{name}", BENCHMARKS / "soak" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_short_race_of_threads_finds_nothing(base: str) -> None:
    threads = script("threads")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a prompt is read without compression")
        race = threads.Race(base, seed=1)
        race.run(seconds=3, threads=4)
    assert race.faults == []
    assert {"plain", "gave up"} < set(race.counts)


@pytest.mark.slow
def test_a_race_notices_another_result() -> None:
    race = script("threads").Race("sdpa", seed=1)
    race.truth["plain", 0] = [0]
    race.compare("plain", 0, race.generate(0))
    assert len(race.faults) == 1


def test_the_page_says_what_was_recorded() -> None:
    run = script("run")
    assert (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8") == run.render()
    for part in run.parts(1.0, 0, run.DATA):
        assert (run.DATA / f"soak-{part.name}.json").exists(), f"{part.name} was not run"
