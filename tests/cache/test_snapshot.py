"""Saved caches: damage and forgeries are refused in one sentence, files are written whole or not at all."""

from __future__ import annotations

import json
import os
import random
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import winnowkv as wk
from support.models import DEVICE, PROMPT, TINY, hybrid, prompt
from support.paths import BENCHMARKS
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.snapshot import load_document

DAMAGE = runpy.run_path(str(BENCHMARKS / "soak" / "damage.py"))
SPEC = "snapkv:observe=8:kernel=3"


def written(model: PreTrainedModel, path: Path, **asked: Any) -> tuple[wk.CompactCache, torch.Tensor]:
    """A cache that is saved at ``path``, and the logits of its prompt's last token."""
    cache = wk.CompactCache(model, SPEC, 20)
    logits = prefill(model, prompt(PROMPT), cache)
    wk.save_cache(cache, model, path, **asked)
    return cache, logits


def refusal(path: Path, model: PreTrainedModel) -> str:
    """What is said of a file that is refused, in one line."""
    with pytest.raises(wk.CacheError) as refused:
        wk.load_cache(path, model)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    return str(refused.value)


def test_every_flipped_bit_and_every_cut_is_noticed(llama: PreTrainedModel, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    written(llama, file, tokens=prompt(PROMPT)[0].tolist())
    data, draw = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(0, header, 29), *(draw.randrange(header, len(data)) for _ in range(60))]:
        broken = bytearray(data)
        broken[place] ^= 1 << draw.randrange(8)
        file.write_bytes(broken)
        refusal(file, llama)
    for end in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1):
        file.write_bytes(data[:end])
        refusal(file, llama)
    file.write_bytes(data + b"\0")
    assert "is damaged, its content does not have the digest" in refusal(file, llama)


def edited(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """A saved cache whose table and header are changed, with a digest that is right again."""
    table, body = DAMAGE["opened"](data)
    header = json.loads(table["__metadata__"]["winnowkv"])
    change(table, header)
    table["__metadata__"]["winnowkv"] = json.dumps(header)
    return DAMAGE["reseal"](table, body)


def of_every_layer(**values: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Change these lengths of all layers by so much, or to a value that is far off."""

    def change(_: dict[str, Any], header: dict[str, Any]) -> None:
        for layer in header["layers"]:
            layer.update({name: value if abs(value) > 99 else layer[name] + value for name, value in values.items()})

    return change


def exchange(first: str, second: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Two tensors have each other's name."""

    def change(table: dict[str, Any], _: dict[str, Any]) -> None:
        table[first], table[second] = table[second], table[first]

    return change


FORGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "shorter": (of_every_layer(length=-1), "20 entries, 19 are held"),
    "shorter, in one layer": (lambda _, header: header["layers"][2].update(length=19), "20 entries, 19 are held"),
    "negative": (lambda _, header: header["layers"][0].update(length=-5), "greater than or equal to 0"),
    "endless": (of_every_layer(seen=10**12, prompt=10**12), "less than 2147483648"),
    "longer": (of_every_layer(seen=1, prompt=1), "72 token ids, the cache has seen 73"),
    "further": (of_every_layer(seen=1), "20 entries, 19 are held"),
    "far": (of_every_layer(seen=10**9, prompt=10**9), "report's prompt_tokens are not those"),
    "not a number": (lambda _, header: header["layers"][0].update(length="20"), "valid integer"),
    "missing": (lambda _, header: header["layers"][0].pop("pads"), "lacks 'layers"),
    "too much": (lambda _, header: header.update(more=1), "not permitted"),
    "fewer layers": (lambda _, header: header["layers"].pop(), "4 layers, the model has 5"),
    "other layers": (lambda _, header: header["layers"].reverse() or header["layers"][0].update(kind="empty"), "not permitted"),
    "keys and values": (exchange("0.keys", "0.values"), "order of their names"),
    "two layers": (exchange("0.keys", "1.keys"), "order of their names"),
    "dtype": (lambda table, _: table["0.keys"].update(dtype="I32"), "tensor 0.keys is I32"),
    "shape": (lambda table, _: table["0.keys"].update(shape=[1, 2, 8, 20]), "tensor 0.keys is F32"),
    "no tensor": (lambda table, _: table.pop("0.keys"), "tensor 0.keys is missing"),
    "a tensor more": (lambda table, _: table.update(mine=dict(table["0.keys"])), "tensor 'mine' is one too many"),
    "offsets": (lambda table, _: table["0.keys"].update(data_offsets=[0, 1]), "order of their names|is not a saved cache"),
    "rows": (lambda _, header: [part.update(pads=[0, 0]) for part in header["layers"]], "padding of"),
    "padding": (lambda _, header: [part.update(pads=[PROMPT]) for part in header["layers"]], "padding of"),
    "dropped": (of_every_layer(dropped=1, seen=1), "without a decode budget"),
    "stored": (lambda _, header: header["report"].update(quantize="int8"), "quantized entries"),
    "report": (lambda _, header: header["report"].update(kept_bytes=1), "report's kept_bytes"),
    "report's rows": (lambda _, header: header["report"].update(kept_entries=[]), "counts other rows"),
    "token ids": (lambda _, header: header.update(tokens=PROMPT - 1), "token ids, the cache has seen"),
    "decode budget": (lambda _, header: header.update(decode_budget=3), "greater than or equal to 64"),
    "nested": (lambda _, header: header.update(model={"a": {"b": json.loads("[" * 90 + "]" * 90)}}), "levels deep"),
}  # fmt: skip
WITHOUT_TOKENS = ("far", "further")


@pytest.mark.parametrize("name", FORGED)
def test_a_header_that_does_not_fit_is_refused_though_its_digest_is_right(
    llama: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "cache"
    written(llama, file, **({} if name in WITHOUT_TOKENS else {"tokens": prompt(PROMPT)[0].tolist()}))
    change, words = FORGED[name]
    file.write_bytes(edited(file.read_bytes(), change))
    with pytest.raises(wk.CacheError, match=words):
        wk.load_cache(file, llama)


@pytest.mark.parametrize("order", [[0, 2, 1], [-1, 0, 1], [0, 1, 1], [0, 1, PROMPT]])
def test_positions_that_no_prompt_has_are_refused(llama: PreTrainedModel, tmp_path: Path, order: list[int]) -> None:
    cache = wk.CompactCache(llama, SPEC, 20)
    prefill(llama, prompt(PROMPT), cache)
    held = cache.compact_layers[1].positions[0]
    assert held is not None
    held[0, torch.arange(3) if PROMPT not in order else torch.arange(-3, 0)] = torch.tensor(order, dtype=torch.int32)
    wk.save_cache(cache, llama, tmp_path / "cache")
    with pytest.raises(wk.CacheError, match=r"layer 1: (positions|.*entries held)"):
        wk.load_cache(tmp_path / "cache", llama)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 20000.0, "rope_type": "default"},
        {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0},
        {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0},
        {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_model_that_rotates_otherwise_is_refused(tmp_path: Path, rope: dict[str, Any]) -> None:
    default = {"rope_theta": 10000.0, "rope_type": "default"}
    one, other = (
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, rope_parameters=dict(each), **TINY)).eval().to(DEVICE)
        for each in (default, rope)
    )
    written(one, tmp_path / "cache")
    wk.load_cache(tmp_path / "cache", one)
    assert "in another way" in (said := refusal(tmp_path / "cache", other)) or "rotated by other angles" in said


def test_caches_of_models_with_sliding_windows_go_on_as_they_were(tmp_path: Path) -> None:
    model = hybrid()
    for more in (0, 3, 40):
        cache = wk.CompactCache(model, SPEC, 20, decode_budget=None)
        ids = prompt(10 + more, seed=more)
        prefill(model, ids, cache)
        wk.save_cache(cache, model, tmp_path / "cache", tokens=ids[0].tolist(), overwrite=True)
        loaded, tokens = load_document(tmp_path / "cache", model)
        assert tokens == ids[0].tolist()
        after = prompt(30, seed=7)
        for part in after.split(10, 1):
            expected = extend(model, cache, part, [cache.get_seq_length()])
            assert torch.equal(extend(model, loaded, part, [loaded.get_seq_length()]), expected)


def test_another_window_is_refused(tmp_path: Path) -> None:
    model = hybrid()
    written(model, tmp_path / "cache")
    wider = hybrid()
    wider.config.sliding_window = 32
    assert "a window of 16 after" in refusal(tmp_path / "cache", wider)


def test_token_ids_are_saved_checked_and_given_back(llama: PreTrainedModel, tmp_path: Path) -> None:
    ids = prompt(PROMPT)[0].tolist()
    cache, logits = written(llama, tmp_path / "cache", tokens=ids)
    loaded, tokens = load_document(tmp_path / "cache", llama)
    assert tokens == ids
    assert list(greedy(llama, loaded, logits, 8)) == list(greedy(llama, wk.load_cache(tmp_path / "cache", llama), logits, 8))
    for wrong, words in ((ids[1:], "holds 71 token ids, the cache has seen 72"), ([*ids[1:], 128], "from 0 to 127"),
                         ([*ids[1:], -1], "from 0 to 127"), ([*ids[1:], True], "holds True")):  # fmt: skip
        with pytest.raises(wk.CacheError, match=words):
            wk.save_cache(cache, llama, tmp_path / "other", tokens=wrong)
    wk.save_cache(cache, llama, tmp_path / "plain")
    with pytest.raises(wk.CacheError, match="holds no token ids"):
        load_document(tmp_path / "plain", llama)
    batch = wk.CompactCache(llama, SPEC, 20)
    prefill(llama, prompt(PROMPT).repeat(2, 1), batch)
    with pytest.raises(wk.CacheError, match="for one prompt, this cache holds 2 rows"):
        wk.save_cache(batch, llama, tmp_path / "other", tokens=ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "plain"]


def test_a_file_is_overwritten_only_if_asked(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, _ = written(llama, tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    with pytest.raises(wk.CacheError, match="exists already: give another path, or overwrite=True"):
        wk.save_cache(cache, llama, tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before
    os.chmod(tmp_path / "cache", 0o640)
    wk.save_cache(cache, llama, tmp_path / "cache", overwrite=True)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to("cache")
    wk.save_cache(cache, llama, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    wk.load_cache(tmp_path / "link", llama)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "link"]


def test_only_regular_files_are_written_and_read(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, _ = written(llama, tmp_path / "cache")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link"):  # no device: where this fails it would be replaced
        with pytest.raises(wk.CacheError, match="is not a regular file"):
            wk.save_cache(cache, llama, path, overwrite=True)
        assert "no regular file" in refusal(path, llama)
    assert (tmp_path / "pipe").is_fifo()
    for path in (tmp_path / "none" / "cache", tmp_path / "cache" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(wk.CacheError, match=r"cannot be written|No such file"):
            wk.save_cache(cache, llama, path)
        refusal(path, llama)
    for path in ("a\0b", "\udcff\0"):
        with pytest.raises(wk.CacheError):
            wk.save_cache(cache, llama, path)
        with pytest.raises(wk.CacheError):
            wk.load_cache(path, llama)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, _ = written(llama, tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for name in ("cache", "new"):
            with pytest.raises(wk.CacheError, match="cannot be written"):
                wk.save_cache(cache, llama, tmp_path / name, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "cache").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_cannot_be_saved_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, _ = written(llama, tmp_path / "cache")
    with pytest.raises(wk.CacheError, match="belongs to another model"):
        wk.save_cache(cache, hybrid(), tmp_path / "other")
    cache.report.kept_mass = [float("nan")]
    with pytest.raises(wk.CacheError, match="a value that is not a number"):
        wk.save_cache(cache, llama, tmp_path / "other")


def test_files_of_an_older_version_are_told_apart(llama: PreTrainedModel, tmp_path: Path) -> None:
    save_file({"0.keys": torch.zeros(1)}, tmp_path / "old", metadata={"winnowkv": '{"format": 1}'})
    assert "was written by an older version" in refusal(tmp_path / "old", llama)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_old_file(llama: PreTrainedModel, tmp_path: Path) -> None:
    written(llama, tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    program = (
        "import os, sys, pathlib\nfrom winnowkv.errors import CacheError\nfrom winnowkv.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1]), CacheError) as scratch:\n    scratch.write_text('half')\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "cache")], check=False).returncode == 9
    assert (tmp_path / "cache").read_bytes() == before
