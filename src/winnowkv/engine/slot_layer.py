"""One layer of compact slots: a row for each request, written in place.

With cache.py, layer.py, slots.py and attention.py the only files that know the internals of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from winnowkv.attention.hooks import SLOT_OFFSET
from winnowkv.engine.compiled import any_size
from winnowkv.types import Valid


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[rows, Hkv, columns, D]``; ``valid`` ``[rows, 1 or Hkv, columns]`` says which count.

    A sliding-window layer (``window`` tokens, None for full attention) is a ring: token ``t`` lies in column ``t % window``.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.static = False  # whether attention goes over all columns, so that no shape ever changes
        self.used = 0  # columns that attention goes over, the coming token's included
        self.even = False  # whether all of them count in every row
        self.column: int | None = None  # where the coming token of every row lies, if that is one and the same
        self._unsaid = 0  # columns, from the left, that count in every row though ``valid`` does not say so of all yet
        self.rows: Tensor  # 0, 1, 2, ...
        self.at: Tensor  # the column of each row's coming token

    @property
    def held_bytes(self) -> int:
        """Storage behind keys, values and mask."""
        if not self.is_initialized:
            return 0
        return sum(part.untyped_storage().nbytes() for part in (self.keys, self.values, self.valid))

    @property
    def column_bytes(self) -> int:
        """Most bytes of one column of one row: key, value and a flag for each KV head."""
        return self.keys.shape[1] * (1 + sum(part.shape[3] * part.itemsize for part in (self.keys, self.values)))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without a row, with the heads, sizes and dtype of these."""
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.valid = key_states.new_zeros(0, 1, 0, dtype=torch.bool)
        self.is_initialized = True

    def resize(self, rows: int, columns: int) -> None:
        """So many rows and columns; what lies in both the old and the new ones stays."""

        def resized(buffer: Tensor) -> Tensor:
            fresh = buffer.new_zeros(rows, buffer.shape[1], columns, *buffer.shape[3:])
            row, column = min(rows, buffer.shape[0]), min(columns, buffer.shape[2])
            fresh[:row, :, :column] = buffer[:row, :, :column]
            return fresh

        if self.keys.shape[0] == rows and self.keys.shape[2] == columns:
            return
        self.keys, self.values, self.valid = resized(self.keys), resized(self.values), resized(self.valid)

    def any_size(self) -> None:
        """Tell ``torch.compile`` that rows, where there are several, and columns may change."""
        for buffer in (self.keys, self.values, self.valid):
            any_size(buffer)
            if self.window is None:
                torch._dynamo.maybe_mark_dynamic(buffer, 2)
        any_size(self.rows, self.at)

    def write(self, row: int, keys: Tensor, values: Tensor, valid: Valid | None, columns: Tensor | None = None) -> None:
        """Put entries ``[1, Hkv, n, D]`` into a row, from the left or at these columns; nothing else in it counts."""
        self._say()
        heads = 1 if valid is None else valid.shape[1]
        if heads > self.valid.shape[1]:
            self.valid = self.valid.repeat(1, heads, 1)
        for buffer in (self.keys, self.values, self.valid):
            buffer[row] = 0  # what a request before it left may be no number, and that times zero is none either
        place = slice(0, keys.shape[2]) if columns is None else columns
        self.keys[row, :, place], self.values[row, :, place] = keys[0], values[0]
        self.valid[row, :, place] = True if valid is None else valid[0]

    def take(self, row: int, layer: Any, seen: int) -> None:
        """Put a cache's layer of one request, which has seen so many tokens, into a row; it is empty after."""
        if self.window is None:
            keys, values = layer.entries_in_use()
            self.write(row, keys, values, None if layer.valid is None else layer.valid[..., : layer.length])
            layer.reset()
            return
        keys, values = layer.keys[:, :, 1 - self.window :], layer.values[:, :, 1 - self.window :]
        self.write(row, keys, values, None, torch.arange(seen - keys.shape[2], seen, device=keys.device) % self.window)
        layer.keys = layer.values = None  # the framework's reset would write zeros into what others may share
        layer.is_initialized = False

    def move(self, source: int, target: int) -> None:
        """Put one row over another."""
        for buffer in (self.keys, self.values, self.valid):
            buffer[target] = buffer[source]

    def cut(self, at: Sequence[int]) -> None:
        """Let attention go no further than the longest row, whose coming tokens lie at these columns (of a ring, would)."""
        longest = at if self.window is None else [min(column, self.window - 1) for column in at]
        self.used = max(longest) + 1
        self.even = min(longest) == max(longest) and self.valid.shape[1] == 1
        same = self.even and min(at) == max(at) and not self.static
        self.column = (at[0] if self.window is None else at[0] % self.window) if same else None
        if self.column is None:
            self._say()

    def _say(self) -> None:
        """Bring ``valid`` up to date."""
        if self._unsaid:
            self.valid[: len(self.rows), :, : self._unsaid] = True
            self._unsaid = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row and return all entries in use."""
        rows = len(self.rows)
        if self.column is not None:  # a fifth of the time that indices take; nobody asks ``valid`` now
            keys, values = self.keys, self.values
            if rows < keys.shape[0]:
                keys, values = keys[:rows], values[:rows]
            keys.select(2, self.column).copy_(key_states.select(2, 0))
            values.select(2, self.column).copy_(value_states.select(2, 0))
            self._unsaid = self.used
            return keys.narrow(2, 0, self.used), values.narrow(2, 0, self.used)
        self.keys[self.rows, :, self.at] = key_states[:, :, 0]
        self.values[self.rows, :, self.at] = value_states[:, :, 0]
        self.valid[self.rows, :, self.at] = True
        if self.static:
            return self.keys[:, :, :], self.values[:, :, :]  # views: attention tags what it gets
        return self.keys[:rows, :, : self.used], self.values[:rows, :, : self.used]

    def counting(self) -> Valid | None:
        """Which of the entries in use count; None where all do."""
        if self.static:
            return self.valid
        return None if self.even else self.valid[: len(self.rows), :, : self.used]

    def get_seq_length(self) -> int:
        """Nothing: rows differ, and positions are told."""
        return 0

    def get_mask_sizes(self, queries: Any) -> tuple[int, int]:
        """Our mark; there is no mask of the framework's."""
        return 1, SLOT_OFFSET

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases
