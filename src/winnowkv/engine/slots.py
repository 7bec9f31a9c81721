"""Compact slots: the caches of several requests side by side, in place; one forward pass is one decode step of all.

No tensor is concatenated or gathered while tokens are generated: a new entry is written into its column, and flags of the
columns make the mask. Knows the internals of transformers (its ``Cache``), as do slot_layer.py, cache/ and attention/.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from winnowkv.attention.hooks import Observer, tag_states
from winnowkv.attention.routing import acquire, release_later
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.looking import check_chosen
from winnowkv.cache.other_layers import shares_keys
from winnowkv.cache.reading import prefill
from winnowkv.engine.compiled import any_size, compiled
from winnowkv.engine.cuda_graphs import Recorded
from winnowkv.engine.slot_layer import SlotLayer
from winnowkv.engine.slot_row import COLUMN_BLOCK, SlotRow
from winnowkv.errors import CacheError, UnsupportedModelError
from winnowkv.models.devices import input_device
from winnowkv.models.head_group import HeadGroup
from winnowkv.models.info import ModelInfo, cache_argument, chunk_of_attention, shares_keys_in_cache
from winnowkv.types import Padding, Valid

MIN_GRAPH_COLUMNS = 128  # fewest columns of a graph that serves one shape only; see bucket()
GRAPH_COLUMN_STEP = 16  # columns of a graph that serves any shape are a multiple of this: whole vectors


class Slots(Cache):
    """The compact caches of several requests side by side; one forward pass is one decode step of all of them.

    While this object lives the model's attention goes through ours. Not thread-safe.

    Parameters
    ----------
    model: the model of all caches that will be placed.
    compile: run the step through ``torch.compile``, on a GPU recorded as a CUDA graph. On the CPU two graphs serve all
        sizes; elsewhere rows and columns, equally many for all full-attention layers, come from short lists, so that few
        graphs serve all. If the model cannot be compiled one warning names the cause, and steps are eager from then on.
    like: a cache of the model that a prompt was read into, whose layers show heads, sizes and dtype. Without one, two
        tokens are read to see them.

    Attributes
    ----------
    rows: requests placed now. positions: tokens that each has seen. device: where the model takes tokens.

    Raises
    ------
    UnsupportedModelError
        For a model that compact caches cannot serve, or with layers of another kind.
    """

    def __init__(self, model: PreTrainedModel, *, compile: bool = False, like: CompactCache | None = None) -> None:
        weakref.finalize(self, release_later, acquire(model)).atexit = False
        if like is None:  # config fields differ from model to model
            like = CompactCache(model, "full", 1)
            prefill(model, torch.zeros(1, 2, dtype=torch.long, device=input_device(model)), like)
        supported, given = [*like.compact_layers, *like.sliding_layers], list[Any](like.layers)
        while shares_keys(given[-1]):
            given.pop()
        if (chunk := chunk_of_attention(model.config)) is not None:
            raise UnsupportedModelError(
                f"slots serve full attention and sliding windows, layers of {type(model).__name__} attend in chunks of {chunk}"
            )
        for index, layer in enumerate(given):
            if layer not in supported:
                raise UnsupportedModelError(
                    f"slots serve full attention and sliding windows, layer {index} is a {type(layer).__name__}"
                )
        heads = HeadGroup.of(model).count(ModelInfo.of(model).heads)
        self._each = [SlotLayer(getattr(layer, "sliding_window", None), heads) for layer in given]
        super().__init__(layers=list(self._each))
        for mine, theirs in zip(self._each, given, strict=True):
            mine.lazy_initialization(theirs.keys, theirs.values)
        self.model = model
        self._static = compile  # whether steps go over whole buffers; stays so if compiling fails
        self._full = sum(layer.sliding_window is None for layer in self._each)
        self._requests: list[SlotRow] = []
        self._listening = False  # whether layers keep the queries of this step
        self.device = input_device(model)
        # Of each device that layers are on: a layer writes with indices that are where it is. The last line is for queries.
        self._new_columns = {
            home: torch.zeros(len(self.layers) + 1, 0, dtype=torch.long, device=home)
            for home in (self.device, *(layer.keys.device for layer in self._each))
        }
        self._compiled = compiled(model) if compile else None
        if compile and shares_keys_in_cache(model.config):  # a graph does not know keys again that came out of a dictionary
            cause = "its layers share keys by way of the cache in this release of transformers"
            warnings.warn(f"{type(model).__name__} cannot be compiled ({cause}): decode steps are eager", stacklevel=2)
            self._compiled = None
        self._recorded = Recorded() if compile and self.device.type == "cuda" else None
        # On the CPU a graph of one row and one of several serve any sizes, as fast; a CUDA graph is of one shape.
        self._flexible = compile and self.device.type == "cpu"

    @property
    def rows(self) -> int:
        """Requests placed now."""
        return len(self._requests)

    @property
    def positions(self) -> list[int]:
        """Tokens that each request has seen."""
        return [request.seen + request.generated for request in self._requests]

    @property
    def held_bytes(self) -> int:
        """Storage of all buffers."""
        return sum(layer.held_bytes for layer in self._each)

    @property
    def held(self) -> list[int]:
        """Entries of the tokens after its prompt that each request with a decode budget holds, of those since placed else."""
        return [request.held for request in self._requests]

    def bytes_with(self, entries: Sequence[int], room: int, rows: int = 1, observe: int = 0) -> int:
        """Bytes with so many more rows, each of ``entries`` of each full-attention layer, and ``room`` for new tokens.

        ``observe``: queries that they keep, if they have a decode budget (:class:`~winnowkv.engine.slot_row.DecodeLimit`).
        """
        return self._bytes([*self._requests, *[SlotRow(list(entries), room, observe=observe)] * rows])

    def bytes_alone(self, entries: Sequence[int], room: int, rows: int = 1, observe: int = 0) -> int:
        """Bytes of these rows alone."""
        return self._bytes([SlotRow(list(entries), room, observe=observe)] * rows)

    def _bytes(self, requests: Sequence[SlotRow]) -> int:
        observe = most_observed(requests)
        return sum(
            rows * (columns * layer.column_bytes + observe * layer.query_bytes)
            for layer, (rows, columns) in zip(self._each, self._shapes(requests), strict=True)
        )

    def place(self, cache: CompactCache, room: int, rows: int = 1) -> None:
        """Move a request whose prompt was read into new last rows, layer by layer; the cache is empty afterwards.

        ``rows``: how many that decode on their own from here; each gets its own copy of the entries. A cache's decode budget
        holds for each of them: whatever ``room`` is, they have columns for ``decode_budget + DECODE_BLOCK`` entries of tokens
        after the prompt at most, those that the cache holds already included.
        Raises CacheError for a cache of another model, of several rows, or that has not evicted yet.
        """
        self.place_all([cache], room, rows)

    def place_all(self, caches: Sequence[CompactCache], room: int, rows: int = 1) -> None:
        """The same for several, for which buffers grow only once; if one is refused none is taken."""
        for cache in caches:
            self.check(cache)
        first = self.rows
        for cache in caches:
            self._requests += [SlotRow.of(cache, room) for _ in range(rows)]
        self._resize()
        for index, mine in enumerate(self._each):
            for at, cache in enumerate(caches):
                row = first + at * rows
                mine.take(range(row, row + rows), cache.layers[index], self._requests[row].seen, self._requests[row].heard)
        self._set_indices()

    def clear(self) -> None:
        """Drop all rows and free their storage, whatever state a failed step left them in."""
        self._requests = []
        if self._recorded is not None:
            self._recorded = Recorded()  # a graph may hold memory of its own
        self.trim()

    def check(self, cache: CompactCache) -> None:
        """Raise CacheError for a cache that :meth:`place` does not take."""
        rows = len(cache.compact_layers[0].pads)
        if cache.model is not self.model:
            raise CacheError("the cache belongs to another model than these slots")
        if rows != 1:
            raise CacheError(f"a slot takes one request, the cache has {rows} rows: read prompts one by one")
        check_chosen(cache, "placed in a slot")

    def drop(self, row: int) -> None:
        """Free a row at once; the last row moves into its place."""
        last = self.rows - 1
        if row != last:
            for layer in self._each:
                layer.move(last, row)
            self._requests[row] = self._requests[last]
        self._requests.pop()
        if self._requests:
            self._resize_queries()
            self._set_indices()
        else:
            self.trim()

    def trim(self) -> None:
        """Free the storage of rows and columns that no request needs."""
        self._resize()
        self._set_indices()

    def _resize(self) -> None:
        for layer, shape in zip(self._each, self._shapes(self._requests), strict=True):
            layer.resize(*shape)
        self._resize_queries()

    def _resize_queries(self) -> None:
        """Queries are held while a row has a decode budget, and no longer."""
        observe = most_observed(self._requests)
        for layer in self._each:
            layer.resize_queries(layer.keys.shape[0], observe)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read each row's newest token ``[rows]``; returns the logits of the next ones, ``[rows, vocabulary]``."""
        full = [request for request in self._requests if request.held == request.room]
        for request in full:
            request.grow()
        if full:
            self.trim()
        self._prepare()
        logits = self._run(tokens)[: self.rows]
        for row, request in enumerate(self._requests):
            if request.advance():
                self._evict(row, request)
        return logits

    def _evict(self, row: int, request: SlotRow) -> None:
        """A block of a row's entries goes, after all layers have attended to them; its columns are used again."""
        limit = request.limit
        assert limit is not None
        full = (layer for layer in self._each if layer.sliding_window is None)
        for layer, begin in zip(full, request.entries, strict=True):
            layer.evict(row, begin, begin + request.held, limit.eviction, request.query_columns, limit.budget)
        request.evicted()

    def warm_up(self, rows: int, entries: int, room: int, observe: int = 0) -> float:
        """Compile the steps of up to ``rows`` requests of ``entries`` and ``room`` new tokens; returns the seconds it took.

        ``observe``: queries that they keep; steps in which a row has a decode budget are graphs of their own.
        Raises CacheError while requests are placed.
        """
        if self._requests:
            raise CacheError(f"{self.rows} requests are placed: warm up before the first, or after the last has ended")
        begin = time.perf_counter()
        for size in self.graph_rows(rows):
            self._requests = [SlotRow([entries] * self._full, room, entries, observe=observe) for _ in range(size)]
            self.trim()
            self.step(torch.zeros(size, dtype=torch.long, device=self.device))
        self._requests = []
        self.trim()
        return time.perf_counter() - begin

    def graph_rows(self, rows: int) -> list[int]:
        """Row counts, ascending, whose graphs serve 1 to ``rows`` requests that have equally many columns."""
        return sorted({1, rows} if self._flexible else {row_bucket(count) for count in range(1, rows + 1)})

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; the keys returned carry a tag by which attention finds this object."""
        keys, values = self._each[layer_idx].update(key_states, value_states)
        return tag_states(keys, values, self, layer_idx)

    def valid_entries(self, layer_idx: int, padding: Padding | None, added: int) -> Valid | None:
        """Which entries of a layer count, ``[rows, 1 or Hkv, columns]``; None if all do. Called before attention."""
        return self._each[layer_idx].counting()

    def shared(self, layer_idx: int, by: int) -> None:
        """Nothing to do: columns are not changed after they are written."""

    def observer(self, layer_idx: int) -> Observer | None:
        """A full-attention layer keeps the newest queries of rows with a decode budget; nothing else is observed."""
        layer = self._each[layer_idx]
        return layer.hear if self._listening and layer.queries is not None else None

    def _shapes(self, requests: Sequence[SlotRow]) -> list[tuple[int, int]]:
        """Rows and columns of each layer's buffers."""
        rows, widths = len(requests), [request.columns for request in requests]
        columns = [max((width[layer] for width in widths), default=0) for layer in range(self._full)]
        if self._flexible:
            columns = [-(-count // GRAPH_COLUMN_STEP) * GRAPH_COLUMN_STEP for count in columns]
        elif self._static:
            rows, columns = row_bucket(rows), [bucket(max(columns))] * self._full
        each = iter(columns)
        return [(rows, next(each) if layer.sliding_window is None else layer.sliding_window) for layer in self._each]

    @property
    def _buffer_rows(self) -> int:
        """Rows that new entries are written to at once, those of a compiled step that hold no request included."""
        return self._new_columns[self.device].shape[1]

    def _set_indices(self) -> None:
        """Give the layers the tensors that say where new entries go; compiled steps need the same ones each time."""
        rows = self._each[0].keys.shape[0] if self._static else self.rows
        if self._buffer_rows != rows:
            numbers = {home: torch.arange(rows, device=home) for home in self._new_columns}
            self._new_columns = {home: held.new_zeros(len(self._each) + 1, rows) for home, held in self._new_columns.items()}
            for index, layer in enumerate(self._each):
                home = layer.keys.device
                layer.rows, layer.new_columns = numbers[home], self._new_columns[home][index]
                layer.query_columns = self._new_columns[home][-1]
        if self._flexible:
            for layer in self._each:
                layer.any_size()

    def _prepare(self) -> None:
        """Work out where each row's new entry and query go, and write it to the layers' indices if one reads them."""
        # A compiled step keeps queries whenever they are held at all, so that few graphs serve all steps.
        self._listening = any(request.observe if self._static else request.hears for request in self._requests)
        columns, compact, positions, indexed = [], 0, self.positions, self._static or self._listening
        for layer in self._each:
            if layer.sliding_window is None:
                new = at = [request.entries[compact] + request.held for request in self._requests]
                compact += 1
            else:
                new, at = positions, [seen % layer.sliding_window for seen in positions]
            if not self._static:
                indexed |= layer.plan_step(new)
            columns.append(at)
        columns.append([request.query_column for request in self._requests])
        if indexed:
            unused = self._buffer_rows - self.rows  # rows of a compiled step that hold no request
            wanted = torch.tensor([at + [0] * unused for at in columns])
            for held in self._new_columns.values():
                held.copy_(wanted, non_blocking=True)

    def _run(self, tokens: Tensor) -> Tensor:
        """One forward pass, compiled if that works."""
        unused = self._buffer_rows - self.rows
        positions = torch.tensor([*self.positions, *[0] * unused]).to(tokens.device, non_blocking=True)
        inputs = {"input_ids": torch.nn.functional.pad(tokens, (0, unused))[:, None], "position_ids": positions[:, None]}
        if self._flexible:
            any_size(*inputs.values())
        if (compiled := self._compiled) is not None:
            try:
                step = partial(self._forward, compiled)
                return step(**inputs) if self._recorded is None else self._recorded(step, self._addresses(), inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                cause = str(error).strip().splitlines()[0]
                warnings.warn(f"{type(self.model).__name__} cannot be compiled ({cause}): decode steps are eager", stacklevel=3)
                self._compiled = None
        return self._forward(self.model, **inputs)

    def _forward(self, model: Callable[..., Any], **inputs: Tensor) -> Tensor:
        logits: Tensor = model(**inputs, **cache_argument(self.model, self), use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    def _addresses(self) -> Hashable:
        """Addresses and shapes of all buffers, for which a recorded step is valid."""
        buffers = (part for layer in self._each for part in layer.buffers)
        indices = (*self._new_columns.values(), self._each[0].rows)
        return tuple((part.data_ptr(), part.shape) for part in (*indices, *buffers))


def most_observed(requests: Sequence[SlotRow]) -> int:
    """Queries that are kept of each row: as many as the one that keeps the most."""
    return max((request.observe for request in requests), default=0)


def bucket(columns: int) -> int:
    """The smallest of 128, 192, 256, 320, ... 512, 640, ... 1024, 1280, ... that is not smaller; 0 for 0."""
    if columns <= MIN_GRAPH_COLUMNS:
        return MIN_GRAPH_COLUMNS if columns else 0
    step = max(COLUMN_BLOCK, 1 << (columns - 1).bit_length() - 3)  # a quarter of the power of two below
    return -(-columns // step) * step


def row_bucket(rows: int) -> int:
    """The smallest of 1, 2, 4, 8, 12, 16, 24, 32, 48, ... that is not smaller; 0 for 0."""
    if not rows:
        return 0
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power > 8 and rows <= power * 3 // 4 else power
