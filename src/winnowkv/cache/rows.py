"""One forward pass of several caches, each a row: what a model computes of tokens is computed once for all, attention of each.

Nothing is copied or padded: every row attends to the entries of its own cache, as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from winnowkv.attention.hooks import Observer, tag_states
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.other_layers import RowsLayer, shares_keys
from winnowkv.models.info import cache_argument
from winnowkv.types import Keys, Padding, Queries, Valid, Values

Entries = tuple[Keys, Values, Valid | None]


class CacheRows(Cache):
    """The caches of several requests for one forward pass, which reads one token of each. ``caches``: of one row each."""

    def __init__(self, caches: Sequence[CompactCache]) -> None:
        given = list[Any](caches[0].layers)
        while shares_keys(given[-1]):
            given.pop()
        super().__init__(layers=[RowsLayer(getattr(layer, "sliding_window", None)) for layer in given])
        self._caches = caches
        self._compressed = [isinstance(layer, CompactLayer) for layer in given]
        self._entries: dict[int, list[Entries]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store each row's new key and value ``[B, Hkv, 1, D]`` in its cache; what is returned stands for all entries."""
        self._entries[layer_idx] = []
        for row, cache in enumerate(self._caches):
            mine = slice(row, row + 1)
            keys, values = cache.update(key_states[mine], value_states[mine], layer_idx, *args, **kwargs)
            valid = cache.valid_entries(layer_idx, None, 1) if self._compressed[layer_idx] else None
            self._entries[layer_idx].append((keys, values, valid))
        return tag_states(key_states[:], value_states[:], self, layer_idx)

    def row_entries(self, layer_idx: int) -> list[Entries]:
        """What each row attends to: keys and values ``[1, Hkv, n, D]`` and which of them count, None if all do."""
        return self._entries[layer_idx]

    def valid_entries(self, layer_idx: int, padding: Padding | None, added: int) -> Valid | None:
        """None: each row knows its own."""
        return None

    def shared(self, layer_idx: int, by: int) -> None:
        """Layer ``by`` attends to this layer's entries, too."""
        for cache in self._caches:
            cache.shared(layer_idx, by)

    def observer(self, layer_idx: int) -> Observer | None:
        """Each row's queries are shown to its cache."""
        return partial(self._observe, layer_idx) if self._compressed[layer_idx] else None

    def _observe(self, layer_idx: int, queries: Queries, scale: float) -> None:
        for row, cache in enumerate(self._caches):
            cache.observe(layer_idx, queries[row : row + 1].clone(), scale)  # a part would keep the whole of it


@torch.no_grad()
def read_rows(model: PreTrainedModel, caches: Sequence[CompactCache], tokens: Sequence[int], device: torch.device) -> Tensor:
    """Read one token into each cache, in one forward pass; returns the logits of the next ones ``[B, vocabulary]``."""
    ids = torch.tensor([[token] for token in tokens], device=device)
    logits: Tensor
    if len(caches) == 1:
        logits = model(input_ids=ids, **cache_argument(model, caches[0]), use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]
    places = torch.tensor([[cache.compact_layers[0].seen] for cache in caches], device=device)
    rows = CacheRows(caches)
    logits = model(input_ids=ids, position_ids=places, **cache_argument(model, rows), use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]
