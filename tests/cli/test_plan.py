"""``winnow plan``: exact numbers from a config alone, and refusals that name numbers which work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import winnowkv as wk
from support.models import TINY, WINDOW, hybrid
from winnowkv.cli.options import token_count
from winnowkv.cli.plan import enough, read_size, size_text
from winnowkv.evaluate.tasks.recipes import SMOLLM2_135M
from winnowkv.models import load as models

Winnow = Callable[..., tuple[int, str, str]]
ENTRY = 5 * 2 * 2 * 8 * 2  # layers, keys and values, KV heads, head size, bytes of the dtype
ASKED = ("--context", 1000, "--memory", "1GiB")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny Llama's config, and nothing else."""
    LlamaConfig(num_hidden_layers=5, **TINY, dtype="float16").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def planned(winnow: Winnow, folder: Path) -> Callable[..., dict[str, Any]]:
    """The JSON of a plan of the tiny Llama."""

    def call(*arguments: object) -> dict[str, Any]:
        code, out, err = winnow("plan", "--model", folder, *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def rows(plan: dict[str, Any]) -> dict[tuple[str, object], dict[str, Any]]:
    return {(row["policy"], row["budget"]): row for row in plan["settings"]}


def test_exact_bytes_from_a_config_alone(planned: Callable[..., dict[str, Any]]) -> None:
    plan = planned(*ASKED, "--batch", 3, "--policies", "snapkv,full", "--budgets", "0.25,100")
    assert (plan["dtype"], plan["context"], plan["batch"], plan["memory_bytes"]) == ("float16", 1000, 3, 2**30)
    assert plan["token_bytes"] == ENTRY
    assert plan["weights_bytes"] == 2 * plan["parameters"]
    assert list(rows(plan)) == [("full", None), ("snapkv", 0.25), ("snapkv", 100)]
    full, quarter, _ = plan["settings"]
    assert full["kept_bytes"] == full["peak_bytes"] == 1000 * ENTRY
    assert quarter["kept_bytes"] == 250 * ENTRY
    assert quarter["peak_bytes"] == (4 * 250 + 1000) * ENTRY // 5
    assert quarter["needed_bytes"] == plan["weights_bytes"] + 2 * quarter["kept_bytes"] + quarter["peak_bytes"]
    free = 2**30 - plan["weights_bytes"]
    assert quarter["largest_batch"] == 1 + (free - quarter["peak_bytes"]) // quarter["kept_bytes"]
    assert quarter["largest_context"] == plan["positions"] == 1024
    assert quarter["fits"]


def test_a_config_file_serves_as_its_folder_does(winnow: Winnow, planned: Callable[..., dict[str, Any]], folder: Path) -> None:
    code, out, _ = winnow("plan", "--model", folder / "config.json", *ASKED, "--json")
    assert code == 0
    assert json.loads(out)["settings"] == planned(*ASKED)["settings"]


def test_all_that_evict_are_planned_unless_they_cannot_be(planned: Callable[..., dict[str, Any]]) -> None:
    plan = planned(*ASKED, "--budgets", "20")
    planned_policies = {policy for policy, _ in rows(plan)}
    assert planned_policies >= {"full", "streaming", "tova", "pyramidkv", "dynamickv"}
    # No profile of the tiny model ships with the package, and some windows are longer than 20.
    assert not planned_policies & {"headkv", "compresskv", "snapkv", "int8"}
    assert sum("headkv" in note for note in plan["notes"]) == 1
    assert sum("snapkv: a budget of 20 entries" in note for note in plan["notes"]) == 1
    wrapped = "left out: adakv, chunkkv, criticalkv, snapkv: snapkv: a budget of 20 entries"
    assert sum(note.startswith(wrapped) for note in plan["notes"]) == 1


def test_dtype_weights_and_quantization_change_the_planned_bytes(planned: Callable[..., dict[str, Any]]) -> None:
    asked = (*ASKED, "--policies", "full,streaming", "--budgets", "100")
    plain, wide = planned(*asked), planned(*asked, "--dtype", "float32")
    assert wide["weights_bytes"] == 2 * plain["weights_bytes"]
    assert [row["kept_bytes"] for row in wide["settings"]] == [2 * row["kept_bytes"] for row in plain["settings"]]
    bare = planned(*asked, "--no-weights")
    assert bare["weights_bytes"] == 0
    assert bare["settings"][0]["needed_bytes"] == plain["settings"][0]["needed_bytes"] - plain["weights_bytes"]
    few = planned(*asked, "--quantize", "int8")
    full, coded, streaming = few["settings"]
    assert (full["quantize"], coded["quantize"], streaming["quantize"]) == (None, "int8", "int8")
    assert streaming["kept_bytes"] < plain["settings"][1]["kept_bytes"]
    assert coded["kept_bytes"] < full["kept_bytes"]
    assert coded["peak_bytes"] == full["peak_bytes"]  # quantized when the prompt is read
    assert rows(planned(*asked[:-4], "--policies", "int4"))[("int4", None)]["quantize"] == "int4"


@pytest.mark.slow
def test_sliding_windows_are_counted_and_reported(winnow: Winnow, tmp_path: Path) -> None:
    hybrid().config.save_pretrained(tmp_path / "hybrid")
    asked = ("plan", "--model", tmp_path / "hybrid", "--context", 200, "--memory", "1GiB", "--dtype", "float32")
    code, out, _ = winnow(*asked, "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["compressed_layers"], plan["sliding_layers"]) == (2, 4)
    assert {row["sliding_bytes"] for row in plan["settings"]} == {4 * WINDOW * 2 * 2 * 16 * 4}
    assert plan["token_bytes"] == 2 * 2 * 2 * 16 * 4
    code, out, _ = winnow(*asked)
    assert code == 0
    assert f"2 layers are compressed; 4 keep all of a sliding window of {WINDOW} tokens" in " ".join(out.split())


def test_a_table_for_reading(winnow: Winnow, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = winnow("plan", "--model", folder, "--context", 512, "--memory", "600KiB", "--batch", 2)
    assert code == 0
    lines = out.splitlines()
    assert "2 requests of 512 tokens in 600.00 KiB" in lines[0]
    assert sum("100.0%" in line for line in lines) == 1
    twelve = [line for line in lines if line.lstrip().startswith("0.12 ")]
    assert 1 < len(twelve) < 5, "policies with the same bytes share a row"
    assert "no" in next(line for line in lines if "100.0%" in line).split()
    assert any("yes" in line.split() for line in twelve)
    assert "of weights are counted" in out
    assert "read one at a time" in " ".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "2k"), "a context of 2048 tokens passes the model's 1024 positions: give at most 1024"),
        (("--context", "0"), "--context '0' is no number of tokens"),
        (("--context", "many"), "--context 'many' is no number of tokens"),
        (("--memory", "24"), "the memory is 24 B"),
        (("--memory", "24G"), "--memory '24G' is not a size: write it as 24GiB, 24GB, 512MiB or plain bytes"),
        (("--memory", "0GiB"), "--memory '0GiB' is not a size"),
        (("--policies", "snapvk"), "Did you mean 'snapkv'?"),
        (("--policies", "snapkv:kernl=3"), "Did you mean 'kernel'?"),
        (("--policies", ","), "no policy was named"),
        (("--policies", "snapkv", "--budgets", "20"), "keep at least 32 entries"),
        (("--policies", "compresskv"), "no profile ships with the package for this model"),
        (("--policies", "int8", "--quantize", "int4"), "use full:quantize=int4"),
        (("--budgets", "1.5"), "budget 1.5 is a fraction above 1"),
        (("--quantize", "int2"), "--quantize 'int2' is unknown: it is one of none, int8, int4"),
        (("--dtype", "int8"), "--dtype 'int8' is unknown: it is one of bfloat16, float16, float32"),
        (("--model", "/no/such/model"), "model '/no/such/model' does not exist"),
    ],
)
def test_bad_values_exit_with_two_and_one_sentence(
    winnow: Winnow, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = winnow("plan", "--model", folder, *ASKED, *arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama", "hidden', "cannot be loaded"),
        ('{"hidden_size": 64}', "cannot be loaded"),
        ('{"model_type": "llama", "hidden_size": "large"}', "cannot be loaded"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "cannot be loaded"),
        ('{"model_type": "t5"}', "T5 is not a decoder-only language model"),
        ('{"model_type": "bloom", "n_layer": 1, "hidden_size": 64, "n_head": 4}', "does not go through transformers'"),
        (json.dumps({"model_type": "llama", **TINY, "quantization_config": {"quant_method": "awq"}}), "are quantized (awq)"),
    ],
)
def test_a_config_that_cannot_be_planned(winnow: Winnow, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    code, out, err = winnow("plan", "--model", file, "--context", 100, "--memory", "1GiB")
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_a_quantized_model_is_planned_without_its_weights(winnow: Winnow, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **TINY, "quantization_config": {"quant_method": "awq"}})
    )
    code, out, _ = winnow("plan", "--model", tmp_path, "--context", 100, "--memory", "1GiB", "--no-weights", "--json")
    assert code == 0
    assert json.loads(out)["weights_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "message", "ways"),
    [
        (("--memory", "10KiB", "--batch", 4), "the weights alone take", {"memory"}),
        (("--memory", "450KiB", "--policies", "full"), "one request of 1000 tokens needs", {"memory", "context"}),
        (("--memory", "650KiB", "--batch", 8), "8 requests of 1000 tokens need", {"memory", "batch", "context"}),
        (("--memory", "400KiB", "--no-weights", "--batch", 8, "--policies", "full"), "in the smallest setting (full)",
         {"memory", "batch", "context"}),
    ],
)  # fmt: skip
def test_an_impossible_request_is_refused_with_numbers_that_work(
    winnow: Winnow, folder: Path, asked: tuple[object, ...], message: str, ways: set[str]
) -> None:
    given = ("plan", "--model", folder, "--context", 1000, *asked)
    code, out, err = winnow(*given)
    assert (code, out) == (2, "")
    assert message in err
    named = dict(re.findall(r"--(memory|batch|context) ([\w.]+)", err.partition(": give ")[2]))
    assert set(named) == ways
    for option, value in named.items():  # each alone makes it possible
        code, out, err = winnow(*given, f"--{option}", value, "--json")
        assert code == 0, err
        assert any(row["fits"] for row in json.loads(out)["settings"])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("1000", 1000), ("7B", 7),
        ("2TiB", 2**41), ("3kb", 3000),
    ],
)  # fmt: skip
def test_sizes_with_units_are_read(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 10**6, 2**30 - 1, 2**30 + 1, 123456789012, 2**50 + 7])
def test_a_proposed_size_is_enough(size: int) -> None:
    assert size <= read_size(enough(size)) <= size * 1.01 + 1
    assert read_size(size_text(size)) == pytest.approx(size, rel=0.01)


def test_token_counts_with_units_are_read() -> None:
    assert [token_count(text, "--context") for text in ("32k", "4096", "1.5K", "1m")] == [32768, 4096, 1536, 2**20]
    with pytest.raises(wk.InputError, match="write it as 32768 or 32k"):
        token_count("-5", "--context")


@pytest.mark.slow
@pytest.mark.skipif(models.find_wheel() is None, reason=f"the embedded model's wheel is not installed ({models.INSTALL})")
def test_the_embedded_model_is_planned(winnow: Winnow) -> None:
    code, out, err = winnow("plan", "--context", "4k", "--memory", "1GiB", "--dtype", "bfloat16", "--json")
    plan = json.loads(out)
    assert code == 0, err
    assert (plan["parameters"], plan["positions"]) == (134_515_008, SMOLLM2_135M.positions)
    assert plan["settings"][0]["kept_bytes"] == SMOLLM2_135M.kv_bytes(4096)
    assert ("compresskv", 0.25) in rows(plan)  # its profile ships with the package


def test_help_states_the_assumptions(winnow: Winnow) -> None:
    code, out, _ = winnow("plan", "--help")
    assert code == 0
    assert "Usage" in out
    assert "prompts are read one at a time" in " ".join(out.split()).lower()
