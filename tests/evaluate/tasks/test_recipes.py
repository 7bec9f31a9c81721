"""Recipes: every recipe of the repository passes a dry run without network; errors name the recipe file."""

import json
from pathlib import Path

import pytest
import yaml

import winnowkv as wk
from support.evaluation import write_model, write_rows
from support.paths import ROOT
from winnowkv.budget import Budget
from winnowkv.evaluate.tasks.recipes import SMOLLM2_135M, Facts, read_recipe
from winnowkv.models import load as models

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = {"layers": 5, "heads": 8, "kv_heads": 2, "head_size": 8, "positions": 1024}
EVAL = {
    "claim": "c", "source": "s", "command": "eval", "tasks": ["longeval"], "policies": ["full", "snapkv:observe=8"],
    "budgets": [20, 0.5], "protocol": "official", "chat": False, "max_context": 900, "models": [{"name": "tiny", **TINY}],
}  # fmt: skip
NEEDLE = {
    "claim": "c", "source": "s", "command": "needle", "policies": ["full", "streaming"], "budgets": [64], "chat": True,
    "lengths": [300, 9000], "depths": [0.5], "haystack": "essays", "metric": "correct", "max_new_tokens": 12,
    "needles": [{"needle": "The key is under the mat.", "question": "Where is the key?", "answer": "mat"}],
    "models": [{"name": "tiny", **TINY, "positions": 10000}],
}  # fmt: skip


def write(folder: Path, recipe: dict) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_there_is_a_recipe_for_each_headline_claim():
    names = {file.stem for file in RECIPES}
    assert names >= {
        "windowkv-table1", "dynamickv-longbench", "compresskv-longbench",
        "windowkv-needle", "dynamickv-needle", "compresskv-needle",
    }  # fmt: skip
    assert [len(read_recipe(ROOT / "recipes" / f"{name}.yaml").plans) for name in
            ("windowkv-table1", "dynamickv-longbench", "compresskv-longbench")] == [2, 4, 2]  # fmt: skip


@pytest.mark.parametrize("file", [file for file in RECIPES if not file.stem.startswith("ruler")], ids=lambda file: file.stem)
def test_recipes_keep_the_papers_observation_windows(file):
    specs = [spec for plan in read_recipe(file).plans for spec in plan.asked["policies"]]
    assert len(specs) > 3
    assert not [spec for spec in specs if wk.policy(spec).uses_structure]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_of_the_repository_dry_runs(winnow, file):
    code, out, _ = winnow("eval", "--recipe", file, "--dry-run", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["claim"]
    for plan in found["plans"]:
        assert plan["rows"]
        assert {setting["policy"] for setting in plan["settings"]} == set(plan["policies"])
        full, *budgets = plan["sizes"]
        facts = plan["facts"]
        assert full["bytes"] == 4 * facts["layers"] * facts["kv_heads"] * facts["head_size"] * plan["context"]
        assert [size["entries"] for size in budgets] == [Budget.of(one).entries(plan["context"]) for one in plan["budgets"]]
        assert full["entries"] == plan["context"] <= facts["positions"]
    code, out, _ = winnow("eval", "--recipe", file, "--dry-run")
    assert code == 0
    assert all(plan["model"] in out for plan in found["plans"])


@pytest.mark.slow
def test_the_embedded_model_takes_the_settings_of_any_recipe(winnow, tmp_path):
    data = write_rows(tmp_path / "data", rows=3)
    code, out, _ = winnow(
        "eval", "--recipe", write(tmp_path, EVAL), "--model", "embedded", "--data", data, "--limit", 2, "--dry-run", "--json"
    )
    (plan,) = json.loads(out)["plans"]
    assert code == 0
    assert plan["model"] == "embedded"
    assert plan["rows"] == {"longeval_lines_200": 2}
    assert plan["context"] == 900
    assert plan["sizes"][1] == {"budget": "20", "entries": 20, "bytes": 4 * 30 * 3 * 64 * 20}
    # A needle test leaves out what its 8192 positions cannot hold.
    code, out, _ = winnow("eval", "--recipe", write(tmp_path, NEEDLE), "--model", "embedded", "--dry-run", "--json")
    (plan,) = json.loads(out)["plans"]
    assert (plan["context"], plan["rows"]) == (300, {"needles": 1})


@pytest.mark.slow
def test_the_sizes_of_the_embedded_model_are_known():
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    assert Facts.of(wk.load("embedded")[0].config) == SMOLLM2_135M


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (EVAL, {"polices": ["full"]}, "key 'polices' is unknown. Did you mean 'policies'?"),
        (EVAL, {"lengths": [100]}, "key 'lengths' is unknown"),
        (EVAL, {"budgets": None}, "budgets is None, it must be a list of numbers"),
        (EVAL, {"budgets": [0.0]}, "budget 0.0 keeps nothing"),
        (EVAL, {"budgets": [4]}, "a budget of 4 entries"),
        (EVAL, {"tasks": ["longbenhc"]}, "task 'longbenhc' is unknown. Did you mean 'longbench'?"),
        (EVAL, {"policies": ["snapvk"]}, "Did you mean 'snapkv'?"),
        (EVAL, {"protocol": "mine"}, "protocol 'mine' is unknown"),
        (EVAL, {"command": "evaluate"}, "command 'evaluate' is unknown: it is one of eval, needle"),
        (EVAL, {"max_context": 1025}, "a context of 1025 passes the 1024 positions of tiny"),
        (EVAL, {"models": [{"name": "tiny", "layers": 5}]}, "model tiny: key 'heads' is missing"),
        (EVAL, {"models": [{"name": "tiny", **TINY, "layer": 5}]}, "key 'layer' is unknown. Did you mean 'layers'?"),
        (EVAL, {"models": [{"name": "tiny", **TINY, "budgets": ["x"]}]}, "budgets is ['x'], it must be a list of numbers"),
        (NEEDLE, {"depths": [1.5]}, "depth 1.5 is outside"),
        (NEEDLE, {"metric": "bleu"}, "metric 'bleu' is unknown"),
        (NEEDLE, {"needles": [{"needle": "x"}]}, "a needle is a mapping of the texts needle, question, answer"),
        (NEEDLE, {"lengths": [9999]}, "a context of 9999 passes the 10000 positions of tiny"),
    ],
)  # fmt: skip
def test_errors_name_the_recipe_file(tmp_path, base, change, message):
    file = write(tmp_path, {**base, **change})
    with pytest.raises(wk.InputError) as error:
        read_recipe(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(wk.InputError, match="key 'tasks' is missing, it must be a list of texts"):
        read_recipe(write(tmp_path, {name: value for name, value in EVAL.items() if name != "tasks"}))


@pytest.mark.parametrize("text", ["a: [", "- a list", ""])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(wk.InputError, match=r"recipe\.yaml"):
        read_recipe(file)


def test_a_missing_file_is_named(winnow, tmp_path):
    code, _, err = winnow("eval", "--recipe", tmp_path / "none.yaml", "--dry-run")
    assert code == 2
    assert "none.yaml cannot be read" in err


def test_facts_are_compared_with_a_config_that_is_there(winnow, tmp_path):
    folder = write_model(tmp_path / "model")
    right = {**EVAL, "models": [{"name": str(folder), **TINY}]}
    code, out, _ = winnow("eval", "--recipe", write(tmp_path, right), "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["plans"][0]["compared_with_config"]
    wrong = {**EVAL, "models": [{"name": str(folder), **TINY, "kv_heads": 4}]}
    code, _, err = winnow("eval", "--recipe", write(tmp_path, wrong), "--dry-run")
    assert code == 2
    assert "has kv_heads 4, its config says 2" in err


def test_options_that_a_recipe_decides_are_refused_beside_it(winnow, tmp_path):
    code, _, err = winnow("eval", "--recipe", write(tmp_path, EVAL), "--budgets", "0.2", "--no-chat")
    assert code == 2
    assert "--budgets, --chat" in err
    code, _, err = winnow("eval", "--recipe", write(tmp_path, NEEDLE), "--workers", "2")
    assert code == 2
    assert "runs in one process" in err


@pytest.mark.slow
def test_a_recipe_of_two_models_fills_a_folder_for_each(winnow, tmp_path):
    both = [{"name": str(write_model(tmp_path / name)), **TINY} for name in ("one", "two")]
    both[1]["budgets"] = [30]
    data, file = write_rows(tmp_path / "data", rows=2), write(tmp_path, {**EVAL, "models": both})
    code, out, _ = winnow("eval", "--recipe", file, "--data", data, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert list(json.loads(out)) == [model["name"] for model in both]
    folders = sorted((tmp_path / "out").iterdir())
    budgets = [{json.loads(line)["budget"] for line in (f / "results.jsonl").read_text().splitlines()} for f in folders]
    assert budgets == [{20, 0.5}, {30}]
    # One of them alone, by its name, with its own settings: there is nothing left to do.
    code, out, err = winnow("eval", "--recipe", file, "--model", both[1]["name"], "--data", data, "--out", tmp_path / "out")
    assert code == 0
    assert "4 measurements are in" in err
    assert "report.html" in out


@pytest.mark.slow
def test_a_needle_recipe_runs_the_needle_test(winnow, tmp_path):
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    file = write(tmp_path, NEEDLE)
    code, out, err = winnow("eval", "--recipe", file, "--model", "embedded", "--out", tmp_path / "out", "--json")
    assert code == 0
    groups = json.loads(out)["embedded"]["groups"]
    assert [(group["policy"], group["length"]) for group in groups] == [("full", 300), ("streaming", 300)]
    assert "left out: [9000]" in err
    assert (tmp_path / "out" / "embedded" / "needle.png").exists()
