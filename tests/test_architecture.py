"""The shape of the code: short files, transformers' internals in few places, and exported names that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import winnowkv as wk
from support.paths import ROOT

SOURCE = ROOT / "src" / "winnowkv"
LONGEST_SOURCE, LONGEST_TEST = 400, 500
# What transformers may move or rename from one version to the next.
INTERNALS = (
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.integrations",
)
INTERNAL_NAMES = {"Cache", "DynamicCache", "AttentionInterface", "AttentionMaskInterface"}
MAY_USE_INTERNALS = ("attention/", "cache/", "engine/slots.py", "engine/slot_layer.py")
EXCEPTIONS = {
    "evaluate/bench/caches.py": "measures transformers' own caches, and fills them",
    "api.py": "recognizes the cache that generate() would make itself",
}


def internal_imports(source: str) -> Iterator[str]:
    """Imports of a module that reach into transformers, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(INTERNALS))
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full.startswith(INTERNALS) or (node.module == "transformers" and alias.name in INTERNAL_NAMES):
                    yield full


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_files_are_short() -> None:
    longest = dict.fromkeys(modules(), LONGEST_SOURCE)
    longest |= dict.fromkeys((ROOT / "tests").rglob("*.py"), LONGEST_TEST)
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in longest}
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > longest[path]} == {}


def test_only_a_few_modules_import_internals_of_transformers() -> None:
    found = {str(path.relative_to(SOURCE)): list(internal_imports(path.read_text(encoding="utf-8"))) for path in modules()}
    outside = {path: names for path, names in found.items() if names and not path.startswith(MAY_USE_INTERNALS)}
    assert set(outside) - set(EXCEPTIONS) == set(), outside
    assert set(EXCEPTIONS) <= set(outside), "an exception that is no longer needed"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import transformers", []),
        ("from transformers import PreTrainedModel", []),
        ("from transformers import DynamicCache", ["transformers.DynamicCache"]),
        ("def f():\n    from transformers.cache_utils import Cache as Base", ["transformers.cache_utils.Cache"]),
        ("import transformers.masking_utils as masks", ["transformers.masking_utils"]),
        ("from transformers import cache_utils", ["transformers.cache_utils"]),
        ("from winnowkv.cache import Cache", []),
    ],
)
def test_imports_of_internals_are_found(source: str, found: list[str]) -> None:
    assert list(internal_imports(source)) == found


def test_no_test_imports_another_test_or_conftest() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[-1].startswith(("test_", "conftest"))], path


def test_exported_names_are_those_with_a_home() -> None:
    assert sorted(wk.__all__) == sorted(wk._HOME_OF)
    assert len(set(wk.__all__)) == len(wk.__all__)


@pytest.mark.parametrize("name", wk.__all__)
def test_every_exported_name_can_be_imported(name: str) -> None:
    assert getattr(wk, name) is not None
    assert name in dir(wk)


def test_what_the_documents_tell_users_to_call_is_exported() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    called = {name: page.name for page in pages for name in re.findall(r"\bwk\.(\w+)", page.read_text(encoding="utf-8"))}
    assert {name: page for name, page in called.items() if name not in wk.__all__} == {}
    assert {"compress", "prefill", "CompactCache"} <= called.keys()
