"""The layers of a compact cache: which of a model's are compressed, and which stay as the framework made them."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from winnowkv.cache.layer import CompactLayer
from winnowkv.errors import CacheError, UnsupportedModelError
from winnowkv.policies.decode_eviction import DecodeEviction


class LayerStorage(Cache):
    """One layer for each of the model's: compact ones where attention goes over everything.

    Raises UnsupportedModelError for a model without such a layer.
    """

    def __init__(self, model: PreTrainedModel, decode_budget: int | None, eviction: DecodeEviction) -> None:
        layers: list[Any] = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        # Sliding-window layers are small already and stay as the framework made them.
        layers = [CompactLayer(decode_budget, eviction) if type(layer) is DynamicLayer else layer for layer in layers]
        super().__init__(layers=layers)
        compact = [index for index, layer in enumerate(self.layers) if isinstance(layer, CompactLayer)]
        self._numbers = {index: number for number, index in enumerate(compact)}
        if not compact:
            raise UnsupportedModelError(f"{type(model).__name__} has no full-attention layer: nothing can be compressed")

    @property
    def compact_layers(self) -> list[CompactLayer]:
        """The layers whose cache is compressed, first to last."""
        return [layer for layer in self.layers if isinstance(layer, CompactLayer)]

    @property
    def sliding_layers(self) -> list[DynamicSlidingWindowLayer]:
        """The layers that slide over a window of the last tokens and stay as the framework made them."""
        return [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]

    @property
    def recurrent_layer(self) -> str | None:
        """The kind of the first layer that keeps a state and no keys (Mamba, linear attention); None if there is none."""
        return next((type(layer).__name__ for layer in self.layers if not hasattr(layer, "keys")), None)

    def layer_number(self, layer_idx: int) -> int:
        """A layer's place among the compressed layers."""
        return self._numbers[layer_idx]

    def __getstate__(self) -> Any:
        """Raise CacheError: a cache belongs to a model, which pickle would take along."""
        raise CacheError(
            "a compact cache cannot be pickled: save it with wk.save_cache(cache, model, path), or use copy.deepcopy"
        )
