"""The example of a policy in a package of its own: pip installs it, and another process finds and runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from support.paths import ROOT

EXAMPLE = ROOT / "examples" / "own_policy"
LAW = """
import warnings
import torch
import winnowkv as wk
from support.models import PROMPT, built, prompt
from support.reference import chunked, compact_logits, positions, reference_logits

warnings.simplefilter("error")
made = wk.policy("valuenorm:observe=3:norm=1")
assert type(made).__module__ == "own_policy"
assert made.spec == "valuenorm:observe=3:norm=1.0"
model, more = built("llama"), prompt(9, seed=5)
for spec in ("valuenorm:observe=3", "adakv:of=valuenorm:observe=3", "valuenorm:observe=3:quantize=int8"):
    cache = wk.CompactCache(model, spec, 20)
    found = compact_logits(model, cache, prompt(PROMPT), chunked(more, [4, 5]))
    assert sum(cache.report.kept_entries[0]) == 20 * 5
    assert all(set(range(4)) <= set(head) for kept in positions(cache) for head in kept.tolist())
    if "quantize" not in spec:
        torch.testing.assert_close(found, reference_logits(model, prompt(PROMPT), more, positions(cache)), atol=1e-5, rtol=0)
full = wk.CompactCache(model, "full", 1)
compact_logits(model, full, prompt(PROMPT), [])
cache = wk.CompactCache(model, "valuenorm:sinks=0:observe=0", 20)
compact_logits(model, cache, prompt(PROMPT), [])
for layer, kept in zip(full.compact_layers, positions(cache)):
    norms = layer.entries_in_use()[1][0].norm(dim=-1)
    for head in range(2):
        stays = norms[head][kept[head].long()].sort(descending=True).values
        torch.testing.assert_close(stays, norms[head].topk(20).values)
print("laws hold")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example as pip installs it, without network and without writing into the repository."""
    # By their metadata: looking for pip's module makes setuptools' import hook step aside in this process, for good.
    if not {"pip", "setuptools"} <= {found.name for found in distributions()}:
        pytest.skip("pip and setuptools are not installed here, so no package can be built")
    folder = tmp_path_factory.mktemp("own_policy")
    source = shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", folder / "site", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(installed: Path, *command: str) -> str:
    """Standard output of Python with the example on its path."""
    path = os.pathsep.join([str(installed), str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_command_line_lists_it(installed: Path) -> None:
    listed = json.loads(run(installed, "-c", "from winnowkv.cli import main; main()", "policies", "--json"))["policies"]
    (row,) = [row for row in listed if row["policy"] == "valuenorm"]
    assert {"sinks": 4, "observe": 8, "quantize": None, "norm": 2.0, "lookahead": 0}.items() <= row["options"].items()


@pytest.mark.slow
def test_it_keeps_the_laws(installed: Path) -> None:
    """Exact sums, sinks, equality with masked attention; alone, wrapped and quantized."""
    assert run(installed, "-c", LAW).endswith("laws hold\n")


def test_it_is_short() -> None:
    assert len((EXAMPLE / "src" / "own_policy" / "__init__.py").read_text(encoding="utf-8").splitlines()) < 60
    assert len((EXAMPLE / "README.md").read_text(encoding="utf-8").splitlines()) <= 15
