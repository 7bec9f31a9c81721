"""Configs of which no model can be made, and sizes of any kind, are refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import winnowkv as wk
from support.models import TINY
from winnowkv.cli.options import token_count
from winnowkv.memory.shape import read_shape
from winnowkv.memory.sizes import read_size
from winnowkv.models.load import load, load_config


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 0}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": -1}, {"num_hidden_layers": "5"},
        {"num_hidden_layers": None}, {"num_attention_heads": 0}, {"num_attention_heads": -8}, {"hidden_size": "wide"},
        {"hidden_size": 10**17}, {"num_key_value_heads": 3}, {"num_key_value_heads": 0},
        {"vocab_size": -4}, {"vocab_size": 2**62}, {"rope_parameters": 5}, {"rope_parameters": {"rope_type": "none"}},
        {"hidden_act": "none"}, {"rms_norm_eps": "x"}, {"head_dim": 0}, {"model_type": "none"}, {"model_type": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_which_no_model_can_be_made_is_refused_or_planned(tmp_path: Path, change: dict[str, Any]) -> None:
    config = LlamaConfig(num_hidden_layers=2, **TINY).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    said = ""
    try:
        read_shape(load_config(str(tmp_path)), 2)  # some releases take what others refuse
    except wk.WinnowError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 700


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}", "null", "[]"])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for read in (load_config, load):
        with pytest.raises(wk.ModelNotFoundError, match="cannot be loaded") as refused:
            read(str(tmp_path))
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 700


def test_sizes_of_any_length_are_refused() -> None:
    for text in ("9" * 5000, "9" * 5000 + "GiB", "1." + "9" * 5000, "1e9", "nan", ""):
        with pytest.raises(wk.InputError, match="is not a size"):
            read_size(text)
        with pytest.raises(wk.InputError, match="is no number of tokens"):
            token_count(text, "--context")
    with pytest.raises(wk.InputError, match="is not a size"):
        read_size(10**6000)
    assert read_size(24 * 10**9) == 24 * 10**9
