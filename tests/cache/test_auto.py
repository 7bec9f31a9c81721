"""``budget="auto"``: the budget that a prompt's scores ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import winnowkv as wk
from support.auto import SPECS, profile_file, read
from support.models import PROMPT, prompt
from support.reference import positions, same_positions
from winnowkv.cache.reading import prefill
from winnowkv.models.curve import Curve


@pytest.mark.parametrize("spec", SPECS)
def test_auto_keeps_the_fewest_entries_that_keep_the_mass(model: Any, spec: str, tmp_path: Path) -> None:
    """With a straight curve the kept share of the scores is the target, and the result that of the budget in numbers."""
    path = profile_file(model, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    chosen = read(model, spec, f"auto:0.8:{path}")
    assert 0.8 <= chosen.report.kept_mass[0] < 1
    entries = round(sum(chosen.report.kept_entries[0]) / len(chosen.layers))
    same = read(model, spec, entries)
    assert same_positions(positions(chosen), positions(same))
    assert same.report.kept_mass == chosen.report.kept_mass
    less = read(model, spec, max(int(entries / 1.1) - 1, 8))
    assert less.report.kept_mass[0] < chosen.report.kept_mass[0]


def test_a_budget_of_few_entries_is_found(llama: Any, tmp_path: Path) -> None:
    """Of about 33 entries and fewer, two budgets side by side are further apart than the search is precise."""
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    chosen = read(llama, "adakv:of=snapkv:observe=4", f"auto:0.6:{path}")
    assert chosen.report.kept_mass[0] >= 0.6
    entries = int(chosen.report.kept_entries[0][0])
    assert read(llama, "adakv:of=snapkv:observe=4", entries - 1).report.kept_mass[0] < 0.6


def test_a_recorded_prompt_chooses_the_same(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    live = read(llama, SPECS[0], f"auto:0.7:{path}")
    recorded = wk.CompactCache(llama, "full", 1, record=PROMPT)
    prefill(llama, prompt(PROMPT), recorded)
    again = recorded.replay(SPECS[0], f"auto:0.7:{path}")
    assert same_positions(positions(live), positions(again))


def test_each_row_of_a_batch_chooses_its_own_budget(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    ids = torch.cat([prompt(PROMPT, 1), prompt(PROMPT, 2)])
    cache = wk.CompactCache(llama, "snapkv:observe=4", f"auto:0.75:{path}")
    prefill(llama, ids, cache)
    alone = []
    for row in ids:
        one = wk.CompactCache(llama, "snapkv:observe=4", f"auto:0.75:{path}")
        prefill(llama, row[None], one)
        alone.append(one.report.kept_entries[0])
    assert cache.report.kept_entries == alone


def test_a_target_that_eviction_cannot_reach_keeps_everything(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.5, 0.5),), 9))
    cache = read(llama, SPECS[0], f"auto:0.9:{path}")
    assert cache.report.kept_bytes == cache.report.full_bytes
    assert "everything is kept" in cache.report.notes[0]


def test_a_short_prompt_is_kept_whole(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    cache = wk.CompactCache(llama, "snapkv", f"auto:0.5:{path}")
    prefill(llama, prompt(20), cache)
    assert cache.report.kept_bytes == cache.report.full_bytes


def test_a_profile_without_a_curve_is_refused_with_the_command_that_measures_one(llama: Any, tmp_path: Path) -> None:
    path = profile_file(llama, tmp_path, None)
    with pytest.raises(wk.ProfileError, match="winnow audit --prompts FILE --policies snapkv --curves"):
        wk.CompactCache(llama, "snapkv", f"auto:0.9:{path}")
