"""docs/support.md says what is: it is rendered from its records, and a sample of the records is tried again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import pytest
import transformers

from support.cells import CELLS, outcome
from support.families import FAMILIES
from support.matrix import PAGE, recorded, render, run

SAMPLE = [
    "Llama", "Qwen2-MoE", "Gemma 2", "Gemma 3n text", "Gemma 4 text, shared KV", "gpt-oss", "DeepSeek-V3", "Jamba", "LLaVA",
    "GPT-J",
]  # fmt: skip
RECORDS = {record["transformers"]: record["families"] for record in recorded()}


def test_the_page_is_rendered_from_its_records() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(recorded()), "run: make support"


def test_every_cell_of_every_release_works_or_is_refused_by_name() -> None:
    assert len(RECORDS) >= 2
    for release, families in RECORDS.items():
        assert list(families) == list(FAMILIES), f"{release}: run make support"
        for name, cells in families.items():
            assert list(cells) in ([], list(CELLS)), f"{release}, {name}: run make support"
            assert not [result for result in cells.values() if result.startswith("FAILS")], f"{release}, {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_what_happens_now(name: str) -> None:
    if transformers.__version__ not in RECORDS:
        pytest.skip(f"docs/data has no record of transformers {transformers.__version__}; make support makes one")
    # What compiling takes, two families pay.
    cells = [cell for cell in CELLS if cell != "compile" or name in ("Llama", "Gemma 3n text")]
    family, record = FAMILIES[name], RECORDS[transformers.__version__][name]
    now = {cell: outcome(family, cell) for cell in cells} if family.exists else {}
    assert now == {cell: result for cell, result in record.items() if cell in cells}


def hang(name: str, cells: Sequence[str], pipe: Connection) -> None:
    pipe.send((cells[0], "works"))
    if name == "Llama":
        os._exit(3)
    time.sleep(60)


def test_a_family_that_hangs_or_dies_is_shown_as_such() -> None:
    results = run(["Llama", "Mistral"], ["equal", "block"], workers=2, seconds=1, child=hang)
    assert results == {
        "Llama": {"equal": "works", "block": "FAILS: the process ended with 3"},
        "Mistral": {"equal": "works", "block": "FAILS: no answer within 1 seconds"},
    }
