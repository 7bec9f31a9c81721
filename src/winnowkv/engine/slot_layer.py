"""One layer of compact slots: a row for each request, written in place.

Knows the internals of transformers (its cache layers), as do slots.py, cache/ and attention/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from winnowkv.cache.other_layers import RowsLayer
from winnowkv.engine.compiled import any_size
from winnowkv.policies.decode_eviction import DecodeEviction
from winnowkv.types import Queries, Valid


class Span(NamedTuple):
    """What an eager step of one layer attends to; worked out once a step, because update and mask both need it.

    Attributes
    ----------
    columns: from the left, the new token's included: those that the longest row uses.
    even: whether all of these count in every row, so that attention needs no mask.
    new: the column of the new token, if it is the same in every row and the rows are even; None otherwise. A copy into one
        column takes a fifth of the time that indices take.
    """

    columns: int
    even: bool
    new: int | None


class SlotLayer(RowsLayer):
    """Keys and values of one layer, ``[rows, Hkv, columns, D]``; ``valid`` ``[rows, 1 or Hkv, columns]`` says which count.

    A sliding-window layer (of ``sliding_window`` tokens; None for full attention) is a ring: token ``t`` lies in column
    ``t % sliding_window``. ``query_heads``: of the attention that reads it.

    Attributes
    ----------
    rows, new_columns: row numbers 0, 1, 2, ... and the column of each row's new token: indices to write with. Set by
        the slots, which fill the same tensors before each step, because CUDA graphs read from fixed addresses.
    queries: the newest queries of each row, ``[rows, Hq, W, D]``, each row's a ring of its own length; None while no row has
        a decode budget. query_columns: where each row's next one goes, an index like ``new_columns``.
    scale: of attention, once a query was heard.
    span: what an eager step attends to. None if the step is compiled: attention then goes over all rows and columns, so
        that shapes stay the same, and nothing else here changes from step to step.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    rows: Tensor
    new_columns: Tensor
    query_columns: Tensor

    def __init__(self, sliding_window: int | None, query_heads: int) -> None:
        super().__init__(sliding_window)
        self._query_heads = query_heads
        self.queries: Tensor | None = None
        self.scale: float | None = None
        self.span: Span | None = None
        # A step of even rows does not read ``valid``, so it does not write it either: this many columns, from the left, count
        # in every row and have to be flagged before ``valid`` is read or changed.
        self._unflagged = 0
        self._gaps = False  # whether a row has columns that do not count between those that do: its mask hid them

    @property
    def held_bytes(self) -> int:
        """Storage of keys, values, flags, and queries."""
        if not self.is_initialized:
            return 0
        return sum(part.untyped_storage().nbytes() for part in self.buffers)

    @property
    def buffers(self) -> list[Tensor]:
        """Keys, values, flags, and queries if there are any."""
        return [self.keys, self.values, self.valid, *([] if self.queries is None else [self.queries])]

    @property
    def column_bytes(self) -> int:
        """Most bytes of one column of one row: a key, a value and a flag for each KV head."""
        return self.keys.shape[1] * (1 + sum(part.shape[3] * part.itemsize for part in (self.keys, self.values)))

    @property
    def query_bytes(self) -> int:
        """Bytes of one query of one row, all heads; 0 in a sliding-window layer, which keeps none."""
        return 0 if self.sliding_window is not None else self._query_heads * self.keys.shape[3] * self.keys.itemsize

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without rows, with the heads, sizes and dtype of these keys and values."""
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.valid = key_states.new_zeros(0, 1, 0, dtype=torch.bool)
        self.is_initialized = True

    def resize(self, rows: int, columns: int) -> None:
        """Change to this many rows and columns; entries that lie in the old and the new ones stay."""

        def resized(buffer: Tensor) -> Tensor:
            fresh = buffer.new_zeros(rows, buffer.shape[1], columns, *buffer.shape[3:])
            row, column = min(rows, buffer.shape[0]), min(columns, buffer.shape[2])
            fresh[:row, :, :column] = buffer[:row, :, :column]
            return fresh

        if self.keys.shape[0] == rows and self.keys.shape[2] == columns:
            return
        self.keys, self.values, self.valid = resized(self.keys), resized(self.values), resized(self.valid)
        self._gaps = self._gaps and rows > 0

    def resize_queries(self, rows: int, observe: int) -> None:
        """Have room for the last ``observe`` queries of this many rows, none in a sliding-window layer; those held stay."""
        held = self.queries
        if self.sliding_window is not None or not rows * observe:
            self.queries = None
        elif held is None or (held.shape[0], held.shape[2]) != (rows, observe):
            self.queries = self.keys.new_zeros(rows, self._query_heads, observe, self.keys.shape[3])
            if held is not None:
                row, column = min(rows, held.shape[0]), min(observe, held.shape[2])
                self.queries[:row, :, :column] = held[:row, :, :column]

    def any_size(self) -> None:
        """Tell ``torch.compile`` that rows, if there are several, and columns (of queries, too) may change."""
        for buffer in self.buffers:
            any_size(buffer)
            if self.sliding_window is None:
                torch._dynamo.maybe_mark_dynamic(buffer, 2)
        any_size(self.rows, self.new_columns, self.query_columns)

    def write(self, row: int, keys: Tensor, values: Tensor, valid: Valid | None, columns: Tensor | None = None) -> None:
        """Put entries ``[1, Hkv, n, D]`` into a row, from the left or at these columns; no other column of it counts."""
        self._write_flags()
        heads = 1 if valid is None else valid.shape[1]
        self._gaps = self._gaps or (valid is not None and not bool(valid.all()))
        if heads > self.valid.shape[1]:
            self.valid = self.valid.repeat(1, heads, 1)
        for buffer in (self.keys, self.values, self.valid):
            buffer[row] = 0  # an earlier request may have left NaN, and NaN times a weight of zero is NaN
        place = slice(0, keys.shape[2]) if columns is None else columns
        self.keys[row, :, place], self.values[row, :, place] = keys[0], values[0]
        self.valid[row, :, place] = True if valid is None else valid[0]

    def take(self, rows: Sequence[int], layer: Any, seen: int, heard: int = 0) -> None:
        """Move a cache's layer of one request, which has ``seen`` so many tokens, into rows; the layer is empty afterwards.

        ``heard``: how many of the newest queries that it holds are taken over.
        """
        if self.sliding_window is None:
            keys, values = layer.entries_in_use()
            for row in rows:
                self.write(row, keys, values, None if layer.valid is None else layer.valid[..., : layer.length])
            if self.queries is not None and heard:
                self.queries[rows[0] : rows[-1] + 1, :, :heard] = layer.queries[:, :, -heard:]
            layer.reset()
            return
        keys, values = layer.keys[:, :, 1 - self.sliding_window :], layer.values[:, :, 1 - self.sliding_window :]
        tokens = torch.arange(seen - keys.shape[2], seen, device=keys.device)
        for row in rows:
            self.write(row, keys, values, None, tokens % self.sliding_window)
        layer.keys = layer.values = None  # transformers' reset would write zeros into storage that others may share
        layer.is_initialized = False

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for buffer in self.buffers:
            buffer[target] = buffer[source]

    def plan_step(self, new: Sequence[int]) -> bool:
        """Set ``span`` for an eager step; True if the step writes with ``new_columns``.

        ``new``: each row's new column in a full-attention layer, each row's new position in a sliding-window layer.
        """
        window = self.sliding_window
        last = new if window is None else [min(position, window - 1) for position in new]
        even = min(last) == max(last) and self.valid.shape[1] == 1 and not self._gaps
        same = even and min(new) == max(new)
        column = new[0] if window is None else new[0] % window
        self.span = Span(max(last) + 1, even, column if same else None)
        if not same:
            self._write_flags()
        return not same

    def _write_flags(self) -> None:
        if self._unflagged:
            self.valid[: len(self.rows), :, : self._unflagged] = True
            self._unflagged = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row, ``[rows, Hkv, 1, D]``; returns keys and values of all columns that attention goes over."""
        rows, span = len(self.rows), self.span
        if span is not None and span.new is not None:
            keys, values = self.keys, self.values
            if rows < keys.shape[0]:
                keys, values = keys[:rows], values[:rows]
            keys.select(2, span.new).copy_(key_states.select(2, 0))
            values.select(2, span.new).copy_(value_states.select(2, 0))
            self._unflagged = span.columns
            return keys.narrow(2, 0, span.columns), values.narrow(2, 0, span.columns)
        self.keys[self.rows, :, self.new_columns] = key_states[:, :, 0]
        self.values[self.rows, :, self.new_columns] = value_states[:, :, 0]
        self.valid[self.rows, :, self.new_columns] = True
        if span is None:
            return self.keys[:, :, :], self.values[:, :, :]  # views, because attention's tag is set on what it gets
        return self.keys[:rows, :, : span.columns], self.values[:rows, :, : span.columns]

    def counting(self) -> Valid | None:
        """Which of the columns that attention goes over count, ``[rows, 1 or Hkv, columns]``; None if all do."""
        if self.span is None:
            return self.valid
        return None if self.span.even else self.valid[: len(self.rows), :, : self.span.columns]

    def hear(self, queries: Queries, scale: float) -> None:
        """After attention: keep each row's query, ``[rows, Hq, 1, D]``."""
        assert self.queries is not None
        self.queries[self.rows, :, self.query_columns] = queries[:, :, 0].to(self.queries.dtype)
        self.scale = scale

    def evict(self, row: int, begin: int, end: int, eviction: DecodeEviction, heard: Sequence[int], budget: int) -> None:
        """Of a row's entries in columns ``begin`` to ``end``, all of tokens after its prompt, keep ``budget``, from the left.

        ``heard``: where the row's newest queries lie, oldest first. Columns that become free do not count.
        """
        assert self.queries is not None
        assert self.scale is not None
        self._write_flags()
        one, place = slice(row, row + 1), slice(begin, end)
        queries = self.queries[one].index_select(2, torch.tensor(heard, device=self.queries.device))
        keys, values, valid = self.keys[one, :, place], self.values[one, :, place], self.valid[one, :, place]
        whole = bool(valid.all())  # not if the cache's attention mask hid some
        stays = eviction.select(queries, keys, values, self.scale, None if whole else valid, budget)
        if not whole and self.valid.shape[1] == 1:  # each head has its own of those that were hidden
            self.valid = self.valid.repeat(1, stays.shape[1], 1)
            valid = self.valid[one, :, place]
        for states in (keys, values):
            states[:, :, :budget] = states.gather(2, stays[..., None].expand(-1, -1, -1, states.shape[3]))
        valid[..., :budget] = True if whole else valid.gather(2, stays)
        valid[..., budget:] = False
