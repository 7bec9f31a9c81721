"""Left-padded batches of prompts, and a model's logits over a cache of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import DEVICE

BATCH_LENGTHS = (72, 57, 44)


def padded(rows: list[Tensor], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts ``[1, n]`` as one left-padded batch, and its 2D mask."""
    width = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), width), filler, device=DEVICE)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[1] :] = row[0]
        mask[i, width - row.shape[1] :] = 1
    return ids, mask


@torch.no_grad()
def batch_logits(
    model: PreTrainedModel, cache: wk.CompactCache, ids: Tensor, mask: Tensor, more: Tensor, *, tell: bool = True
) -> Tensor:
    """Logits of the last prompt token and of ``more`` (two tokens at once, then one), ``[B, 4, vocabulary]``."""
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = [model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1:]]
    for chunk in more.split([2, 1], dim=1):
        added = chunk.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), added)], dim=1)
        options = {"attention_mask": mask} if tell else {}
        places = places[:, -1:] + torch.arange(1, added + 1, device=DEVICE)
        logits.append(model(input_ids=chunk, position_ids=places, past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)


def valid_columns(layer: Any, row: int, head: int) -> Tensor:
    """Columns of a layer that a row's KV head really holds."""
    if layer.valid is None:
        return torch.arange(layer.length, device=DEVICE)
    return layer.valid[row, head % layer.valid.shape[1], : layer.length].nonzero()[:, 0]
