"""Two processes that share a model's heads keep together what one process keeps, and say the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import winnowkv as wk
from support.auto import profile_file
from support.cases import CASES, EVICTING, QUANTIZED
from support.looking import looking
from support.models import built
from support.processes import PROCESSES, heads_kept, in_processes, outcome
from winnowkv.models.curve import Curve

KV_HEADS = 2
LOOKING = "lookahead=2:draft=2:refit=true"  # decided before the last of the few tokens
EVERY = [*CASES, *QUANTIZED]
STORAGE = ("held_bytes", "peak_bytes")  # of a report


@pytest.mark.slow
def test_processes_that_share_heads_keep_what_one_process_keeps(tmp_path: Path) -> None:
    """Every case and every way with one model; a few cases with another one, whose projections have biases."""
    models = {"llama": built("llama"), "qwen2": built("qwen2")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    ways = {str(case): {"settings": case.settings} for case in [*EVERY, *(looking(each, LOOKING) for each in EVICTING[::3])]}
    every = {"qwen2": dict(list(ways.items())[1::9]), "llama": {**ways, **other_ways(models["llama"], tmp_path)}}
    shared = in_processes(tmp_path, {name: list(jobs.values()) for name, jobs in every.items()})
    assert len(shared) == PROCESSES
    for name, model in models.items():
        for (way, job), *each in zip(every[name].items(), *(said[name] for said in shared), strict=True):
            check(f"{name}: {way}", wk.policy(job["settings"]["policy"]).per_head, [outcome(model, job)], each)


def other_ways(model: PreTrainedModel, folder: Path) -> dict[str, dict[str, Any]]:
    """A job for each other way of a prompt."""
    snapkv, adakv, winnow = "snapkv:observe=4:kernel=3", "adakv:of=snapkv:observe=4", "winnow:observe=4:samples=16:least=4"
    auto = f"auto:0.6:{profile_file(model, folder, Curve(((0.0, 0.0), (1.0, 1.0)), 9))}"
    chunks = {"chunk": 64, "ceiling": 80}
    return {
        "chunks": {"settings": {"policy": winnow, "budget": 20}, "tokens": 200, "read": {"chunk": 64}},
        "ceiling": {"settings": {"policy": winnow, "budget": 20}, "tokens": 200, "read": chunks},
        "ceiling and projections": {"settings": {"policy": "defensivekv", "budget": 40}, "tokens": 200, "read": chunks},
        "batch": {"settings": {"policy": winnow, "budget": 0.4}, "rows": [72, 57, 44]},
        "batch of heads that differ": {"settings": {"policy": adakv, "budget": 0.4}, "rows": [72, 57]},
        "protected": {"settings": {"policy": winnow, "budget": 30, "keep": [[3, 9], [40, 44]]}},
        "protected, heads that differ": {"settings": {"policy": adakv, "budget": 30, "keep": [[3, 9]]}},
        "auto": {"settings": {"policy": adakv, "budget": auto, "keep_scores": True}},
        "explained": {"settings": {"policy": winnow, "budget": 20, "keep_scores": True}},
        "decode budget": {"settings": {"policy": snapkv, "budget": 20, "decode_budget": 64}, "new": 130},
        "replay": {"settings": {"policy": "full", "budget": 1, "record": 72}, "replayed": {"policy": winnow, "budget": 20}},
    }


def check(case: str, ragged: bool, alone: list[dict[str, Any]], shared: list[dict[str, Any]]) -> None:
    """Assert that one process and several, of which each has some heads, keep, report and say the same."""
    assert heads_kept(shared, KV_HEADS) == heads_kept(alone, KV_HEADS), case
    for one in shared:
        assert (one["tokens"], one["why"]) == (alone[0]["tokens"], alone[0]["why"]), case
    mine, *theirs = ({**one["report"], "held": sum(each["held"] for each in made)} for made in (alone, shared) for one in made)
    for told in theirs:
        storage = [(told.pop(name), mine[name]) for name in STORAGE]
        # Heads that keep fewer entries than the longest are padded to the longest of their process only.
        assert all(here <= there if ragged else here == there for here, there in storage), case
        assert told["held"] <= mine["held"] if ragged else told["held"] == mine["held"], case
        assert {**mine, **told} == {**mine, "held": told["held"]}, case
