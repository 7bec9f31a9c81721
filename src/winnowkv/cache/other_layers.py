"""Layers of a cache that are not compressed: sliding windows, states, and layers that share another one's keys."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from winnowkv.attention.hooks import SLOT_OFFSET
from winnowkv.cache.layer import CompactLayer
from winnowkv.errors import CacheError

SLIDING_SLACK = 2  # a sliding layer's view is copied out of storage that is larger than so many times itself


class RowsLayer(CacheLayerMixin):
    """What a model is told of a layer whose rows are requests of different lengths: positions are passed, no mask is made."""

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None  # read by transformers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is stored here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise CacheError: each request's own cache stores."""
        raise CacheError("rows are stored in their own caches")

    def get_seq_length(self) -> int:
        """0: rows differ in length."""
        return 0

    def get_mask_sizes(self, queries: Any) -> tuple[int, int]:
        """The offset by which the mask socket recognizes such rows: it makes no mask for them."""
        return 1, SLOT_OFFSET

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases


def shares_keys(layer: Any) -> bool:
    """Whether a layer of a cache that was read into keeps nothing: its attention, if it has any, reads another layer's keys."""
    return getattr(layer, "keys", layer) is None


def fork_layer(layer: Any) -> Any:
    """A layer of any kind that goes on by itself."""
    if isinstance(layer, CompactLayer):
        return layer.fork()
    # A sliding window is replaced with each token, never written to; what other layers do is not known.
    return copy(layer) if isinstance(layer, DynamicSlidingWindowLayer) else deepcopy(layer)


def shared_layer(layer: Any) -> Any:
    """A layer that goes on from where a recorded prefill left this one. Raises CacheError for kinds that cannot."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return copy(layer)
    if shares_keys(layer):
        return type(layer)()
    raise CacheError(f"replay works on full attention and sliding windows, not on a {type(layer).__name__}")


def free_slid(layer: Any) -> None:
    """Copy a sliding window that is a view of the last tokens, which would keep the whole prompt in memory."""
    if layer.keys.untyped_storage().nbytes() > SLIDING_SLACK * layer.keys.nbytes:
        # One token more than the window does no harm.
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def check_windows(layers: Sequence[DynamicSlidingWindowLayer], back: int) -> None:
    """Raise CacheError if a sliding window has lost what would come back into it when so many tokens are taken back."""
    for layer in layers:
        held: Tensor = layer.keys  # type: ignore[assignment]  # typed as missing until the first update
        if held.shape[2] - back < min(layer.get_seq_length() - back, layer.sliding_window - 1):
            raise CacheError(
                f"cannot crop {back} tokens: a layer's window of {layer.sliding_window} tokens has slid on and lost what "
                "stood before them; replay the recorded prompt, or read it again"
            )
