"""Bad values are refused before any weights are read, by every command; what the config alone can tell is, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import winnowkv as wk
from support.evaluation import write_model, write_rows
from winnowkv.cli import loading
from winnowkv.cli.options import device_of, model_name
from winnowkv.models import load as models

Winnow = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 1024 positions, and files to ask about."""
    made = tmp_path_factory.mktemp("files")
    write_model(made / "model")
    write_rows(made / "data")
    (made / "a file").write_text("some words")
    (made / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w1 w2 w{n}"}) + "\n" for n in range(3)))
    (made / "other").mkdir()
    (made / "other" / "config.yaml").write_text("model: another\ncommand: another\nprotocol: official\n")
    (made / "bad profile").write_text('{"schema": 1')
    return made


@pytest.fixture
def asking(winnow: Winnow, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Winnow:
    """The command line where weights must not be read; ``MODEL`` and ``FILES`` stand for the model and the folder."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    for name in ("load", "load_random"):
        monkeypatch.setattr(models, name, load)
    monkeypatch.chdir(folder)

    def ask(*arguments: str) -> tuple[int, str, str]:
        return winnow(*(text.replace("FILES", str(folder)).replace("MODEL", str(folder / "model")) for text in arguments))

    return ask


GENERATE = ("generate", "w1 w2", "--model", "MODEL")
NEEDLE = ("needle", "--model", "MODEL", "--lengths", "600")
AUDIT = ("audit", "--model", "MODEL", "--prompts", "FILES/prompts.jsonl", "--out", "FILES/out")
EVAL = ("eval", "--model", "MODEL", "--tasks", "longeval", "--data", "FILES/data", "--out", "FILES/out")
BENCH = ("bench", "--model", "MODEL", "--contexts", "300", "--serve-context", "300", "--out", "FILES/out")
CALIBRATE = ("calibrate", "--model", "MODEL", "--out", "FILES/p.json", "--lengths", "600")
PLAN = ("plan", "--model", "MODEL", "--context", "200", "--memory", "1GiB")
MEASURING = {"needle": NEEDLE, "audit": AUDIT, "eval": EVAL, "bench": BENCH}
# What every command that compares policies refuses.
SHARED = [
    (("--policies", "snapvk"), "Did you mean 'snapkv'"),
    (("--policies", "snapkv:kernel=4"), "kernel=4 must be odd"),
    (("--policies", "compresskv:profile=FILES/none.json"), "none.json cannot be read"),
    (("--policies", "compresskv:profile=FILES/bad profile"), "bad profile is cut off or broken: not JSON"),
    (("--policies", "compresskv"), "no profile ships with the package for this model"),
    (("--budgets", "0"), "budget 0 keeps nothing"),
    (("--budgets", "many"), "budget 'many' is not a number"),
    (("--budgets", "auto:0.9:FILES/none.json"), "none.json cannot be read"),
    (("--out", "FILES/a file"), "is a file"),
    (("--out", "FILES/other"), "holds results of another run"),
    (("--model", "FILES/none"), "does not exist"),
]
CASES = [(f"{command} {' '.join(more)}", (*base, *more), message)
         for command, base in MEASURING.items() for more, message in SHARED]  # fmt: skip
CASES += [
    (" ".join((base[0], *more)), (*base, *more), message)
    for base, more, message in [
        (GENERATE, ("--policy", "snapvk"), "Did you mean 'snapkv'"),
        (GENERATE, ("--policy", "compresskv:profile=FILES/none.json"), "none.json cannot be read"),
        (GENERATE, ("--policy", "compresskv"), "no profile ships with the package for this model"),
        (GENERATE, ("--budget", "1.5"), "budget 1.5 is a fraction above 1"),
        (GENERATE, ("--budget", "auto:0.9"), "no profile ships with the package for this model"),
        (GENERATE, ("--decode-budget", "3"), "decode budget 3 is below 64"),
        (GENERATE, ("--prefill-chunk", "8"), "--prefill-chunk 8 is too small: give at least 64"),
        (GENERATE, ("--task", "poetry"), "task 'poetry' is unknown"),
        (GENERATE, ("--device", "tpu"), "--device 'tpu' is unknown"),
        (GENERATE, ("--dtype", "int8"), "--dtype 'int8' is unknown"),
        (GENERATE, ("--top-p", "0"), "top_p=0.0 must be above 0"),
        (GENERATE, ("--top-k", "-1"), "top_k=-1 must be a whole number"),
        (GENERATE, ("--temperature", "-1"), "temperature"),
        (GENERATE, ("--temperature", "nan"), "temperature=nan must be a finite number"),
        (GENERATE, ("--seed", "-1"), "seed=-1 must be a whole number"),
        (GENERATE, ("--max-new-tokens", "0"), "--max-new-tokens"),
        (GENERATE, ("--model", "./none"), "does not exist"),
        (("generate", "--model", "MODEL"), ("-f", "FILES/none.txt"), "none.txt cannot be read"),
        (NEEDLE, ("--task", "poetry"), "task 'poetry' is unknown"),
        (NEEDLE, ("--depths", "1.5"), "--depths: 1.5 is outside 0"),
        (NEEDLE, ("--lengths", "0"), "--lengths: 0 is too short"),
        (NEEDLE, ("--lengths", "1020"), "passes the model's 1024 positions: ask for at most 1000"),
        (NEEDLE, ("--budgets", "20", "--policies", "snapkv"), "keep at least 32 entries"),
        (NEEDLE, ("--metric", "luck"), "metric 'luck' is unknown"),
        (NEEDLE, ("--variant", "two"), "variant 'two' is unknown"),
        (NEEDLE, ("--needles", "FILES/none"), "cannot be read"),
        (NEEDLE, ("--haystack", "FILES/none"), "cannot be read"),
        (NEEDLE, ("--profile", "FILES/none", "--policies", "headkv"), "cannot be read"),
        (AUDIT, ("--prompts", "FILES/none.jsonl"), "cannot be read"),
        (AUDIT, ("--tasks", "longbenhc"), "Did you mean 'longbench'"),
        (AUDIT, ("--max-new-tokens", "1024"), "leave no room for a prompt"),
        (AUDIT, ("--curves", "FILES/c.json", "--policies", "snapkv"), "3 prompts make no curve: give at least 8"),
        (AUDIT, ("--curves", "FILES/none/c.json"), "none does not exist"),
        (AUDIT, ("--curves", "FILES/other"), "is a folder"),
        (EVAL, ("--workers", "2", "--policies", "compresskv"), "no profile ships with the package for this model"),
        (EVAL, ("--dry-run", "--policies", "headkv:profile=FILES/none"), "none cannot be read"),
        (EVAL, ("--tasks", "longevil"), "Did you mean 'longeval'"),
        (EVAL, ("--protocol", "mine"), "protocol 'mine' is unknown"),
        (EVAL, ("--data", "FILES/none"), "none"),
        (EVAL, ("--recipe", "FILES/none.yaml"), "--tasks: "),
        (BENCH, ("--contexts", "2k"), "positions"),
        (BENCH, ("--batches", "0"), "batch is 0"),
        (BENCH, ("--kv-memory", "lots"), "is not a size"),
        (BENCH, ("--new-tokens", "1"), "new_tokens is 1"),
        (CALIBRATE, ("--out", "FILES/other"), "is a folder"),
        (CALIBRATE, ("--out", "FILES/a file/p.json"), "winnow: "),
        (CALIBRATE, ("--count", "4"), "4 prompts are too few for reliable scores"),
        (CALIBRATE, ("--depths", "-1"), "--depths: -1.0 is outside 0"),
        (CALIBRATE, ("--lengths", "10"), "fits in the small cache of 32"),
        (CALIBRATE, ("--lengths", "1000"), "passes the model's 1024 positions"),
        (CALIBRATE, ("--model", "FILES/none"), "does not exist"),
        (PLAN, ("--dtype", "int8"), "--dtype 'int8' is unknown"),
        (PLAN, ("--policies", "snapvk"), "Did you mean 'snapkv'"),
        (PLAN, ("--model", "FILES/none"), "does not exist"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_value_is_refused_before_weights_are_read(asking: Winnow, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = asking(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("winnow: ")]) == 1 or "Usage" in err


@pytest.mark.parametrize("base", [GENERATE, *MEASURING.values(), CALIBRATE], ids=lambda base: base[0])
def test_good_values_do_reach_the_weights(asking: Winnow, base: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError, match="weights were read"):
        asking(*base)


def test_missing_packages_are_told_before_weights_are_read(asking: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "matplotlib" else object())
    for base in (NEEDLE, BENCH, (*CALIBRATE, "--show")):
        code, _, err = asking(*base)
        assert code == 2
        assert "needs the package matplotlib, which is not installed: pip install 'winnowkv[demo]'" in err


def test_a_model_that_only_its_weights_describe_is_checked_when_it_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(loading, "without_weights", lambda name: None)
    model, _ = loading.load_model(str(folder / "model"), seen.append, dtype="float16", device="cpu")
    assert seen == [model]
    assert model.dtype == torch.float16


def test_the_model_without_weights_has_the_same_facts(folder: Path) -> None:
    seen: list[Any] = []
    model, _ = loading.load_model(str(folder / "model"), seen.append)
    assert seen[1] is model
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}
    assert wk.ModelInfo.of(seen[0]) == wk.ModelInfo.of(model)


def test_names_of_models_and_devices() -> None:
    assert model_name("embedded") == "embedded"
    assert model_name("org/model") == "org/model"
    for name in ("./none", "a/b/c", "~/none", ""):
        with pytest.raises(wk.ModelNotFoundError, match="does not exist"):
            model_name(name)
    assert device_of("cpu") == "cpu"
    for name, reason in (
        ("cpu:1", "is not there"),
        ("cuda:x", "is unknown"),
        (f"cuda:{torch.cuda.device_count()}", "not there"),
    ):
        with pytest.raises(wk.InputError, match=reason):
            device_of(name)
