"""Prompts read in chunks, and what must be the same as when they are read at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.reference import positions, same_positions
from winnowkv.cache.reading import extend, prefill

TOKENS = 200  # a chunk of 8, then three of 64
CHUNK, CEILING = 64, 80
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
APART = ("prefill_seconds", "compress_seconds", "peak_bytes")  # fields of a report that differ with chunks


def read(model: PreTrainedModel, cache: wk.CompactCache, tokens: int = TOKENS, **chunks: Any) -> Tensor:
    return prefill(model, prompt(tokens), cache, **chunks)


def assert_told(chunked: wk.CompactCache, whole: wk.CompactCache) -> None:
    """Assert equal reports but for seconds and the peak; shares of scores to float32 precision."""
    mine, theirs = (
        {name: value for name, value in cache.report.to_dict().items() if name not in APART} for cache in (chunked, whole)
    )
    assert len(theirs["kept_mass"]) == 1, "make the caches with keep_scores=True, or there is nothing to compare"
    assert mine.pop("kept_mass") == pytest.approx(theirs.pop("kept_mass"), abs=1e-5)
    assert mine == theirs


def assert_same(
    model: PreTrainedModel, chunked: wk.CompactCache, whole: wk.CompactCache, close: dict[str, float] = CLOSE
) -> None:
    """Assert that a cache read in chunks equals one read at once, now and when it decodes."""
    assert same_positions(positions(chunked), positions(whole))
    assert_told(chunked, whole)
    for mine, theirs in zip(chunked.compact_layers, whole.compact_layers, strict=True):
        assert (mine.length, mine.seen, mine.prompt, mine.pads, mine.room) == (
            theirs.length, theirs.seen, theirs.prompt, theirs.pads, 0,
        )  # fmt: skip
        torch.testing.assert_close(mine.entries_in_use(), theirs.entries_in_use(), **close)
    more = prompt(70, seed=1)
    torch.testing.assert_close(
        extend(model, chunked, more, [TOKENS]), extend(model, whole, more, [TOKENS]), rtol=1e-4, atol=1e-5
    )
