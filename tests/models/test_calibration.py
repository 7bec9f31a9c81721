"""Calibration profiles: files that are refused, and the errors of policies that read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, prompt
from support.profiles import PROFILES, random_profile
from support.reference import compact_logits
from winnowkv.models.calibration import choose_heads, find_profile
from winnowkv.models.info import ModelInfo

SHAPE = ModelInfo("Drawn", 3, 4, 2, "abc")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    file = tmp_path / "p.json"
    random_profile(SHAPE, 3).write(file)
    return file


def test_a_profile_comes_back_as_it_was(written: Path) -> None:
    assert wk.read_profile(written) == random_profile(SHAPE, 3)


def test_a_truncated_file_is_refused(written: Path) -> None:
    written.write_text(written.read_text()[:-40])
    with pytest.raises(wk.ProfileError, match="cut off"):
        wk.read_profile(written)


def test_a_newer_schema_is_refused(written: Path) -> None:
    written.write_text(json.dumps({**json.loads(written.read_text()), "schema": 2}))
    with pytest.raises(wk.ProfileError, match="schema 2, this version reads up to 1"):
        wk.read_profile(written)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"errors": [0.5, 0.5]}, "2 layers x 4 heads"),
        ({"semantic": [[0.1] * 4] * 2 + [[0.1] * 3]}, "3 layers x 4 heads"),
        ({"traditional": [[-0.1] * 4] * 3}, "negative"),
        ({"errors": ["x", 1, 2]}, "cannot be used"),
        ({"model_info": {"heads": 4}}, "cannot be used"),
    ],
)
def test_broken_tables_are_refused(written: Path, change: dict, says: str) -> None:
    written.write_text(json.dumps({**json.loads(written.read_text()), **change}))
    with pytest.raises(wk.ProfileError, match=says):
        wk.read_profile(written)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": "1"}'])
def test_json_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(wk.ProfileError, match="names no schema"):
        wk.read_profile(tmp_path / "p.json")


def test_a_missing_key_and_a_missing_file_are_named(written: Path, tmp_path: Path) -> None:
    data = json.loads(written.read_text())
    del data["errors"]
    written.write_text(json.dumps(data))
    with pytest.raises(wk.ProfileError, match="lacks 'errors'"):
        wk.read_profile(written)
    with pytest.raises(wk.ProfileError, match="winnow calibrate"):
        wk.read_profile(tmp_path / "none.json")


def test_another_model_is_named(written: Path, llama: PreTrainedModel) -> None:
    with pytest.raises(wk.ProfileError, match="architecture Drawn, not LlamaForCausalLM"):
        wk.CompactCache(llama, f"compresskv:profile={written}")
    with pytest.raises(wk.ProfileError, match="heads 4, not 8"):
        find_profile(str(written), ModelInfo("Drawn", 3, 8, 2, "abc"))


def test_an_unknown_model_has_no_packaged_profile(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(wk.ProfileError, match="no profile ships"), wk.compress(llama, "headkv", 20):
        pass
    with pytest.raises(wk.ProfileError, match="holds no profile of"):
        wk.CompactCache(llama, f"compresskv:profile={tmp_path}")


def test_the_embedded_models_profile_ships() -> None:
    shape = ModelInfo("LlamaForCausalLM", 30, 9, 3, "90836ae8b7801ca0")
    profile = find_profile(None, shape)
    assert len(profile.semantic) == 30
    assert profile.about["answered"] >= 8
    assert sum(profile.errors) == pytest.approx(1)
    # Retrieval heads are few: the best is far above the middle one.
    scores = sorted(score for row in profile.semantic for score in row)
    assert scores[-1] > 20 * scores[len(scores) // 2]


def test_more_heads_than_the_model_has_are_refused(llama: PreTrainedModel) -> None:
    for spec in (f"compresskv:heads_per_layer=9:profile={PROFILES}", "compresskv:heads=random:9:budgets=uniform"):
        with pytest.raises(wk.PolicyError, match=r"9 heads a layer are asked for, the model has 8"):
            wk.CompactCache(llama, spec)


@pytest.mark.parametrize("heads", ["srh2", "random", "random:0", "none"])
def test_unknown_values_of_heads_are_refused(heads: str) -> None:
    with pytest.raises(wk.PolicyError, match="srh, traditional, all or random:k"):
        wk.policy("compresskv", heads=heads)


def test_heads_are_chosen_by_score_or_drawn_by_seed() -> None:
    profile = random_profile(SHAPE, 3)
    row = profile.semantic[1]
    assert choose_heads("srh", profile, 1, 2, 4, 0) == sorted(range(4), key=lambda h: -row[h])[:2]
    assert choose_heads("traditional", profile, 1, 4, 4, 0) == profile.ranking(1, "traditional")
    assert choose_heads("all", None, 0, 1, 4, 0) == [0, 1, 2, 3]
    drawn = choose_heads("random:3", None, 0, 1, 4, 0)
    assert len(set(drawn)) == 3
    assert drawn == choose_heads("random:3", None, 0, 1, 4, 0)
    assert len({tuple(choose_heads("random:3", None, layer, 1, 16, 0)) for layer in range(6)}) > 1
    assert profile.top_heads(1)[0] == max(
        ((layer, h) for layer in range(3) for h in range(4)), key=lambda at: profile.semantic[at[0]][at[1]]
    )


def test_error_aware_budgets_lie_between_their_bounds(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, f"compresskv:observe=4:least=8:most=1.5:profile={PROFILES}", 20)
    compact_logits(llama, cache, prompt(PROMPT), [])
    entries = cache.report.kept_entries[0]
    assert sum(entries) == 100
    assert min(entries) >= 8
    assert max(entries) <= 30
    assert len(set(entries)) > 1
