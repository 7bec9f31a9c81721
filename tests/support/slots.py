"""Requests for slots: the logits of each alone, and of all together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import DEVICE, prompt
from winnowkv.cache.reading import extend, prefill
from winnowkv.engine.slots import Slots

LENGTHS = (72, 19, 46, 60)
STEPS = (9, 14, 3, 11)  # further tokens of each request
ROOM = 6  # less than most of them: buffers grow


def read(model: PreTrainedModel, row: int, settings: dict[str, object]) -> wk.CompactCache:
    cache = wk.CompactCache(model, **settings)
    prefill(model, prompt(LENGTHS[row], seed=row), cache)
    return cache


def more(row: int) -> Tensor:
    """The further tokens of a request, ``[1, n]``."""
    return prompt(STEPS[row], seed=20 + row)


def alone(model: PreTrainedModel, row: int, settings: dict[str, object]) -> Tensor:
    """The logits of each of a request's further tokens, ``[n, vocabulary]``: one row, the cache it was read into."""
    cache = read(model, row, settings)
    steps = [extend(model, cache, more(row)[:, at : at + 1], [LENGTHS[row] + at])[0] for at in range(STEPS[row])]
    return torch.cat(steps)


def together(model: PreTrainedModel, slots: Slots, settings: dict[str, object], rows: int) -> list[Tensor]:
    """The same with up to ``rows`` requests at a time: one is placed whenever one has ended."""
    waiting, active = list(range(len(LENGTHS))), list[int]()
    logits: list[list[Tensor]] = [[] for _ in LENGTHS]
    while waiting or active:
        if waiting and len(active) < rows:
            active.append(waiting.pop(0))
            slots.place(read(model, active[-1], settings), ROOM)
        tokens = torch.tensor([int(more(row)[0, len(logits[row])]) for row in active], device=DEVICE)
        for row, line in zip(active, slots.step(tokens), strict=True):
            logits[row].append(line)
        for at in reversed(range(len(active))):
            if len(logits[active[at]]) == STEPS[active[at]]:
                slots.drop(at)
                active[at] = active[-1]
                active.pop()
    return [torch.stack(lines) for lines in logits]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        assert mine.argmax(-1).tolist() == theirs.argmax(-1).tolist()
