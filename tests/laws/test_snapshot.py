"""Law 8: save, load, continue gives the same tokens; also in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import Case
from support.models import PROMPT, prompt, tiny_model
from support.reference import positions, same_positions
from winnowkv.cache.reading import greedy, prefill

GO_ON = """
import json, sys, torch, winnowkv as wk
from winnowkv.cache.reading import greedy
from transformers import AutoModelForCausalLM
folder, file, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
cache = wk.load_cache(file, model)
print(json.dumps(list(greedy(model, cache, torch.load(logits), 12))))
"""


def test_a_saved_and_loaded_cache_gives_the_same_tokens(model: PreTrainedModel, case: Case, tmp_path: Path) -> None:
    cache = wk.CompactCache(model, **case.settings)
    logits = prefill(model, prompt(PROMPT), cache)
    wk.save_cache(cache, model, tmp_path / "cache.safetensors")
    loaded = wk.load_cache(tmp_path / "cache.safetensors", model)
    assert same_positions(positions(loaded), positions(cache))
    assert loaded.report == cache.report
    assert loaded.held_bytes == cache.held_bytes
    assert list(greedy(model, loaded, logits, 12)) == list(greedy(model, cache, logits, 12))


def test_a_padded_batch_can_be_saved_in_the_middle_of_an_answer(model: PreTrainedModel, case: Case, tmp_path: Path) -> None:
    ids = prompt(PROMPT).repeat(2, 1)
    mask = torch.ones(2, PROMPT + 6, dtype=torch.long)
    mask[1, :9] = 0
    more = prompt(6, seed=3).repeat(2, 1)
    cache = wk.CompactCache(model, **case.settings)
    with torch.no_grad():
        model(ids, attention_mask=mask[:, :PROMPT], past_key_values=cache)
        model(more[:, :2], attention_mask=mask[:, : PROMPT + 2], past_key_values=cache)
        wk.save_cache(cache, model, tmp_path / "cache")
        loaded = wk.load_cache(tmp_path / "cache", model)
        expected = model(more[:, 2:], attention_mask=mask, past_key_values=cache).logits
        assert torch.equal(model(more[:, 2:], attention_mask=mask, past_key_values=loaded).logits, expected)


@pytest.mark.slow
def test_a_cache_loaded_in_a_fresh_process_gives_the_same_tokens(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "model")
    cache = wk.CompactCache(llama, "snapkv:observe=8:kernel=3", 20)
    logits = prefill(llama, prompt(PROMPT), cache)
    wk.save_cache(cache, llama, tmp_path / "cache")
    torch.save(logits, tmp_path / "logits")
    arguments = [str(tmp_path / name) for name in ("model", "cache", "logits")]
    done = subprocess.run([sys.executable, "-c", GO_ON, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(greedy(llama, cache, logits, 12))


def test_files_that_are_no_saved_cache_of_this_model_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(wk.CacheError, match="nothing was read into this cache yet"):
        wk.save_cache(wk.CompactCache(llama, "full", 1), llama, tmp_path / "nothing")
    cache = wk.CompactCache(llama, "full", 1)
    prefill(llama, prompt(20), cache)
    wk.save_cache(cache, llama, tmp_path / "cache")
    with pytest.raises(wk.CacheError, match=r"another model \(architecture LlamaForCausalLM, here Qwen2ForCausalLM\)"):
        wk.load_cache(tmp_path / "cache", tiny_model("qwen2"))
    whole = (tmp_path / "cache").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    for name in ("half", "none"):
        with pytest.raises(wk.CacheError, match=r"is not a saved cache|is damaged"):
            wk.load_cache(tmp_path / name, llama)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(wk.CacheError, match="is not a saved cache"):
        wk.load_cache(tmp_path / "other", llama)
    newer = whole.replace(b'"format":"2"', b'"format":"9"')
    (tmp_path / "newer").write_bytes(newer)
    with pytest.raises(wk.CacheError, match="format 9, this version reads 2"):
        wk.load_cache(tmp_path / "newer", llama)
