"""A full cache that lets a watcher see every layer's attention as it happens: no attention maps, no eager model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.types import Keys, Queries

# slot, newest queries [1, Hq, q, D], keys [1, Hkv, K, D], values [1, Hkv, K, D], scale
Watcher = Callable[[int, Queries, Keys, Tensor, float], None]


class ProbedCache(CompactCache):
    """Keeps everything; after each layer's attention calls ``watch`` with its queries, keys and values.

    ``slot`` counts the compressible layers from 0.
    """

    def __init__(self, model: PreTrainedModel, watch: Watcher) -> None:
        super().__init__(model, "full", 1)
        self._watch = watch

    def observe(self, layer_idx: int, queries: Tensor, scale: float) -> None:
        """Count as every cache does, then let the watcher look."""
        super().observe(layer_idx, queries, scale)
        slot = self.slot(layer_idx)
        layer = self.compact_layers[slot]
        self._watch(slot, queries, layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length], scale)
