"""A full cache that calls a watcher at every layer's attention, without attention maps and without eager attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.types import Keys, Queries

# layer (of the compressible ones, from 0), newest queries [1, Hq, q, D], keys [1, Hkv, K, D], values [1, Hkv, K, D], scale
Watcher = Callable[[int, Queries, Keys, Tensor, float], None]


class ProbedCache(CompactCache):
    """Keeps everything; after each layer's attention calls ``watch`` with its queries, keys and values."""

    def __init__(self, model: PreTrainedModel, watch: Watcher) -> None:
        super().__init__(model, "full", 1)
        self._watch = watch

    def observe(self, layer_idx: int, queries: Tensor, scale: float) -> None:
        """Observe as every cache does, then call the watcher."""
        super().observe(layer_idx, queries, scale)
        number = self.layer_number(layer_idx)
        layer = self.compact_layers[number]
        self._watch(number, queries, layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length], scale)
