"""Calibration profiles: files that are refused, and the errors of policies that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, hybrid, prompt
from support.profiles import PROFILES, random_profile
from support.reference import compact_logits
from winnowkv.models.calibration import choose_heads, find_profile, installed_file, known_profile
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
        ({"semantic": None}, "field semantic: input should be a valid"),
        ({"errors": [True, 0.1, 0.1]}, r"field errors \[0\]: input should be a valid number, not True"),
        ({"errors": ["0.5", 0.1, 0.1]}, r"field errors \[0\]"),
        ({"errors": [1e300, 0.1, 0.1]}, "negative, above"),
        ({"model_info": {**SHAPE.to_dict(), "kv_heads": 0}}, "4 query heads cannot share 0 KV heads"),
        ({"model_info": {**SHAPE.to_dict(), "kv_heads": 3}}, "4 query heads cannot share 3 KV heads"),
        ({"model_info": None}, "field model_info"),
        ({"about": []}, "field about"),
        ({"curves": None}, "field curves"),
        ({"curves": {"snapkv": {"points": [], "prompts": 9}}}, "must ascend"),
        ({"curves": {"snapkv": {"points": [[0.1, 0.2, 0.3]], "prompts": 9}}}, "field curves snapkv points"),
        ({"curves": {"snapkv": {"points": [[0.1, 0.2]], "prompts": 0}}}, "a curve of 0 prompts"),
        ({"curves": {"snapkv": {"points": [[0.1, 0.2]], "prompts": 1.5}}}, "field curves snapkv prompts"),
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "[" * 100_000, "levels deep"),
        (lambda text: text.replace('"schema": 1', f'"schema": {"9" * 5000}'), "more digits"),
        (lambda text: text.replace('"schema": 1', '"schema": true'), "names no schema"),
        (lambda text: text.replace('"schema": 1', '"schema": 1, "schema": 1'), "key 'schema' stands twice"),
        (lambda text: text.replace('"model": "tiny"', '"model": "\\ud800"'), "half a character"),
        (lambda text: text.replace('"about": {}', '"about": {"seed": NaN}'), "nan is not a finite number"),
        (lambda text: text + "x", "not JSON"),
        (lambda text: "", "cut off"),
    ],
)
def test_files_that_hold_no_plain_data_are_refused(written: Path, change: Callable[[str], str], says: str) -> None:
    written.write_text(change(written.read_text()))
    with pytest.raises(wk.ProfileError, match=says) as refused:
        wk.read_profile(written)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_paths_that_no_file_has_are_refused(llama: PreTrainedModel) -> None:
    for path in ("x" * 300, "a\0b", "\udcff"):
        for ask in (f"compresskv:profile={path}", f"headkv:profile={path}"):
            with pytest.raises(wk.ProfileError, match="cannot be read"):
                wk.CompactCache(llama, ask, 20)
        with pytest.raises(wk.ProfileError, match="cannot be read"):
            wk.CompactCache(llama, "snapkv", f"auto:0.9:{path}")


def test_a_profile_of_other_layers_is_refused_before_a_prompt_is_read(llama: PreTrainedModel, tmp_path: Path) -> None:
    for model, layers, right in ((llama, 3, 5), (hybrid(), 6, 2)):
        info = ModelInfo.of(model)
        assert info.compressed == right
        random_profile(info, layers).write(tmp_path / "p.json")
        random_profile(info, right).write(tmp_path / "right.json")
        for spec in ("compresskv:observe=4", "headkv:observe=4", "winnow:observe=4"):
            with pytest.raises(wk.ProfileError, match=rf"holds {layers} layers, {right} of the model's are compressed"):
                wk.CompactCache(model, f"{spec}:profile={tmp_path / 'p.json'}", 20)
            wk.CompactCache(model, f"{spec}:profile={tmp_path / 'right.json'}", 20)
    (tmp_path / "right.json").unlink()
    with pytest.raises(wk.ProfileError, match="holds 6 layers, 2 of the model's"):
        wk.CompactCache(model, f"headkv:profile={tmp_path}", 20)


def test_a_profile_is_written_whole_or_not_at_all(written: Path) -> None:
    for path in (written.parent, written / "below", written.parent / "none" / "p.json"):
        with pytest.raises(wk.ProfileError, match=r"cannot be written|is not a regular file"):
            random_profile(SHAPE, 3).write(path)
    assert [path.name for path in written.parent.iterdir()] == ["p.json"]


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


EMBEDDED = ModelInfo("LlamaForCausalLM", 30, 9, 3, "90836ae8b7801ca0")


def test_a_users_profile_is_found_before_the_one_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_PROFILE_FOLDER", str(tmp_path))
    shipped = known_profile(EMBEDDED)
    assert shipped is not None
    assert known_profile(SHAPE) is None
    for shape, layers in ((EMBEDDED, 30), (SHAPE, 3)):
        mine = random_profile(shape, layers, seed=5)
        mine.write(installed_file(shape))
        assert known_profile(shape) == find_profile(None, shape) == mine != shipped
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Drawn-abc.json", "LlamaForCausalLM-90836ae8b7801ca0.json"]
    installed_file(EMBEDDED).unlink()
    assert known_profile(EMBEDDED) == shipped


def test_a_users_profile_that_is_broken_is_refused_and_not_guessed_around(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINNOW_PROFILE_FOLDER", str(tmp_path))
    file = installed_file(ModelInfo.of(llama))
    other = random_profile(SHAPE, 3).to_json()
    for text, says in (("{", "is cut off or broken"), (other, "of another model .'tiny'.: remove")):
        file.write_text(text)
        for spec in ("winnow", "compresskv", "headkv"):
            with pytest.raises(wk.ProfileError, match=says) as refused:
                wk.CompactCache(llama, spec, 60)
            assert str(file) in str(refused.value)
    # Equal sizes, but other layers are compressed: it serves another model of this class, so that here there is none.
    random_profile(ModelInfo.of(llama), 3).write(file)
    assert known_profile(ModelInfo.of(llama)) is None


@pytest.mark.parametrize(("architecture", "config"), [("../x", "abc"), ("Drawn", ""), ("", "a"), ("Drawn", "a/b"), (".", ".")])
def test_a_file_is_named_by_plain_words_only(architecture: str, config: str) -> None:
    shape = ModelInfo(architecture, 3, 4, 2, config)
    with pytest.raises(wk.ProfileError, match="neither the name of a model's class nor a hash"):
        installed_file(shape)
    assert known_profile(shape) is None


def test_without_a_variable_the_users_data_directory_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WINNOW_PROFILE_FOLDER")
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / name)
    assert installed_file(SHAPE) == tmp_path / "winnowkv" / "profiles" / "Drawn-abc.json"


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
