"""One prompt's way through prefill: observe, score, allocate, select; live, in chunks, or replayed from a recording.

A session lives from the first layer of a prompt to its last one. It decides what stays and tells the layers, which only hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from winnowkv.attention.projection import projection_weight
from winnowkv.cache.auto import AutoSelection
from winnowkv.cache.chunked import ChunkedPrompt, cut
from winnowkv.cache.compression import Compression, naming_row
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.reports import added, report_prefill
from winnowkv.cache.selection import PromptSelection
from winnowkv.cache.stopwatch import Stopwatch
from winnowkv.errors import CacheError, InputError
from winnowkv.models.head_group import HeadGroup
from winnowkv.policies import LayerStates
from winnowkv.report import Report
from winnowkv.types import Indices, Projection, Queries

Selections = Sequence[PromptSelection | AutoSelection]


class Recording:
    """The last ``count`` queries of every compressed layer, so that other policies can run over the same prefill."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.layers: list[tuple[Tensor, float]] = []  # queries [B, Hq, count, D] and the scale of attention

    def take(self, number: int, queries: Tensor, scale: float) -> None:
        """Add a layer's queries; those of a later chunk follow the earlier ones."""
        if number == len(self.layers):
            self.layers.append((queries[:, :, -self.count :].clone(), scale))
        else:
            together = torch.cat([self.layers[number][0], queries], 2)
            self.layers[number] = (together[:, :, -self.count :].clone(), scale)


def check_recorded(
    layers: Sequence[CompactLayer], recording: Recording | None, session: PrefillSession | None, compression: Compression
) -> None:
    """Raise CacheError unless a prefill was recorded that is whole, fresh and over."""
    whole = all(p is None for layer in layers for p in layer.positions) and layers[0].seen == layers[0].prompt
    if recording is None or session is not None or compression.policy.quantize is not None or not whole:
        raise CacheError("replay needs CompactCache(model, 'full', record=...) fresh from prefill")


class PrefillSession:
    """One prompt, or one padded batch of prompts, on its way into the compressed layers of a cache.

    Parameters
    ----------
    compression: policy, budget and tasks.
    layers: the cache's compressed layers, first to last.
    report: filled when the prompt is read.
    projections: the layers' output projections; asked once, and only if the policy needs them.

    Attributes
    ----------
    selections: what stays of each row, made when the first layer is there.
    asked: of a policy that looks, by layer: the queries ``[1, Hq, W, D]`` that it wants of each row, and attention's scale.
    """

    def __init__(
        self,
        compression: Compression,
        layers: Sequence[CompactLayer],
        report: Report,
        projections: Callable[[], Sequence[nn.Module | None]],
    ) -> None:
        self.compression, self.layers, self.report = compression, layers, report
        self.selections: list[PromptSelection | AutoSelection] = []
        self.asked: list[tuple[list[Queries], float]] = []
        self._positions: list[Tensor] = []  # of each row, where the queries stand that its policy wants
        self._projections: Sequence[nn.Module | None] | None = None
        self._ask_projections = projections
        self._chunked: ChunkedPrompt | None = None
        self.notes: list[str] = []  # for the report, beside those of the selections
        self._started, self._peak = 0.0, 0  # the most bytes held in this process
        self._compressing = Stopwatch()

    def begin(self) -> None:
        """Start the clock at the first layer's keys."""
        self.compression.check_study()
        self._started = self._started or time.perf_counter()

    def observe(self, number: int, queries: Tensor, scale: float) -> bool:
        """After a layer's attention: score it and evict what goes now. Returns whether the prompt is read.

        ``number`` counts compressed layers; ``queries`` ``[B, Hq, S, D]`` are those of this forward pass.
        """
        wanted: Tensor | None = queries
        with self._compressing.running(queries.device):
            if self._chunked is not None:
                wanted = self._chunked.take(number, queries, *self.layers[number].entries_in_use(), scale)
            if wanted is not None:
                self._compress(number, wanted, scale)
        if number < len(self.layers) - 1 or wanted is None:
            return False
        if queries.is_cuda:
            torch.cuda.synchronize(queries.device)  # else the clock stops before the work does
        self._finish(time.perf_counter() - self._started)
        return True

    def replay(self, recording: Recording, sources: Sequence[CompactLayer], prefill_seconds: float) -> None:
        """Compress what another session read, from its recorded queries and the entries of its layers."""
        self.compression.check_study()
        with self._compressing.running(sources[0].keys.device):
            for number, (source, layer) in enumerate(zip(sources, self.layers, strict=True)):
                layer.update(source.keys, source.values)
                layer.pads, layer.valid = list(source.pads), source.valid
                if number == 0:
                    self._open()
                    self._check_recorded(recording)
                self._compress(number, *recording.layers[number])
        self._finish(prefill_seconds + self._compressing.seconds)

    def begin_chunks(self, tokens: int, chunk: int | None, ceiling: int | float | None, recorded: bool, hint: int) -> list[int]:
        """Get ready to read one prompt in chunks; returns their lengths. See :meth:`CompactCache.begin_chunks`."""
        if hint and self.compression.policy.looks:
            raise InputError(
                f"{self.compression.policy.spec}: lookahead, draft and refit are for a prompt that is answered, and a hint is "
                "not: leave them out, or the hint"
            )
        asked = self.compression = replace(self.compression, hint=hint)
        prompt = asked.prompt(tokens, len(self.layers), asked.each_task(1)[0])
        sizes = cut(asked, prompt, chunk, ceiling)
        if len(sizes.lengths) == 1:
            return sizes.lengths
        chunked = ChunkedPrompt(asked, prompt, sizes)
        if recorded and not sizes.exact:
            raise CacheError(
                "record= needs all entries of the prompt: leave the ceiling out, or make the cache without record="
            )
        for layer in self.layers:
            layer.room = sizes.most
        self._chunked = chunked
        return sizes.lengths

    def end_chunk(self) -> None:
        """A chunk went through the model: evict what the ceiling no longer covers."""
        if self._chunked is None:
            return
        with self._compressing.running(self.layers[0].keys.device):
            self._note_peak()
            if (stays := self._chunked.end()) is not None:
                for layer in self.layers:
                    layer.drop(stays)

    @property
    def held(self) -> Tensor | None:
        """Text positions that the policy chooses from, ascending, if a ceiling leaves not all of them; else None."""
        return None if self._chunked is None or self._chunked.sizes.exact else self._chunked.held

    @property
    def in_chunks(self) -> bool:
        """Whether the prompt comes in chunks."""
        return self._chunked is not None

    @property
    def between_chunks(self) -> bool:
        """Whether all layers have read the chunks so far, and more will come."""
        chunked = self._chunked
        return chunked is not None and not chunked.last and all(layer.seen == chunked.read for layer in self.layers)

    def _compress(self, number: int, queries: Tensor, scale: float) -> None:
        layer = self.layers[number]
        if not self.selections:
            self._open()
        self._note_peak()
        rows = range(len(self.selections))
        asked = [self._pick(number, row, queries) for row in rows]
        if self.compression.waits:  # looking.py chooses once the last layer is read, or later
            self.asked.append(([each.clone() for each in asked], scale))
            layer.own()
            return
        changed: set[int] = set()
        for row, selection in enumerate(self.selections):
            with naming_row(row, len(self.selections)):
                changed.update(selection.observe(self.states(number, row, asked[row], scale)))
        for index in changed:
            self.keep(index)
        if number not in changed:
            layer.own()
        if layer is self.layers[-1]:
            self.store()

    def keep(self, number: int, chosen: Selections | None = None, layer: CompactLayer | None = None) -> None:
        """Evict what was not chosen from a layer, or from a copy of it; ``chosen``: for each row, the session's own if None."""
        selections = self.selections if chosen is None else chosen
        dense = len(selections) == 1 and not self.compression.policy.per_head
        kept = [self._positions_here(number, selection.kept[number], dense) for selection in selections]
        (layer or self.layers[number]).keep(kept, dense=dense and kept[0] is not None)

    def store(self) -> None:
        """What stays is decided: the hint goes, and the rest is quantized if the policy says so."""
        for layer in self.layers:
            if self.compression.hint:
                layer.take_back(self.compression.hint)
            if (stored := self.compression.policy.quantize) is not None:
                layer.quantize(stored)

    def own_positions(self, number: int, positions: Indices) -> Tensor:
        """Of the places ``[1, H, n]`` chosen among what a layer holds those of this process's heads, ``[H, n]``."""
        return own(positions[0], self._heads(number), dense=False)

    def _positions_here(self, number: int, positions: Indices | None, dense: bool) -> Tensor | None:
        """What stays of the prompt in a layer's heads that are in this process, ``[H, n]``, on the layer's device."""
        if positions is None:
            return None
        if self._chunked is not None:
            positions = self._chunked.text_positions(positions)
        return own(positions[0], self._heads(number), dense).to(self.layers[number].keys.device)

    def _pick(self, number: int, row: int, queries: Tensor) -> Queries:
        """The queries that a row's policy wants, of those of a forward pass."""
        asked = queries[row : row + 1]
        if self._chunked is not None:  # what comes out of chunks is what was asked for already
            return asked
        layer = self.layers[number]
        return pick(asked, self._positions[row] + (queries.shape[2] - (layer.length - layer.pads[row])))

    def states(self, number: int, row: int, asked: Queries, scale: float) -> LayerStates:
        """What a row's policy gets to see of a layer: the queries it ``asked`` for, and the entries of the prompt."""
        layer = self.layers[number]
        held = slice(layer.pads[row], layer.length - layer.generated)
        keys, values = layer.keys[row : row + 1, :, held], layer.values[row : row + 1, :, held]
        return LayerStates(number, asked, keys, values, scale, self._projection(number, asked), self._heads(number))

    def _heads(self, number: int) -> HeadGroup:
        """The processes that share a layer's heads."""
        return self.compression.heads.of_layer(self.layers[number].keys.shape[1], self.compression.model.kv_heads)

    def _projection(self, number: int, queries: Tensor) -> Projection | None:
        if not self.compression.policy.needs_projection:
            return None
        if self._projections is None:
            self._projections = self._ask_projections()
        weight = projection_weight(self._projections[number], number, queries.shape[1])
        return weight.to(queries.device)

    def _open(self) -> None:
        """The lengths of the prompts are known now: bind the policy to each."""
        self.selections = self._new_selections()
        self._positions = [selection.bound.query_positions() for selection in self.selections]

    def _check_recorded(self, recording: Recording) -> None:
        asked = max(selection.bound.query_span() for selection in self.selections)
        if asked > recording.count:
            name = self.compression.policy.name
            raise CacheError(f"{name} reads {asked} queries, only {recording.count} were recorded")

    def _new_selections(self) -> list[PromptSelection | AutoSelection]:
        asked, layer = self.compression, self.layers[0]
        if self._chunked is not None:
            return [self._chunked.selection]
        lengths = [layer.prompt - pad for pad in layer.pads]
        tasks = asked.each_task(len(lengths))
        made = []
        for row, (tokens, task) in enumerate(zip(lengths, tasks, strict=True)):
            with naming_row(row, len(lengths)):
                made.append(asked.selection(asked.prompt(tokens, len(self.layers), task)))
        return made

    def _note_peak(self, beside: int = 0) -> None:
        self._peak = max(self._peak, sum(layer.held_bytes for layer in self.layers) + beside)

    def fork(self, layers: Sequence[CompactLayer], report: Report) -> PrefillSession:
        """The same for forks of its layers, when it is over and what stays is not decided yet."""
        other = copy(self)
        other.layers, other.report, other.selections = layers, report, list(self.selections)
        other._compressing = self._compressing.fork()
        return other

    @contextmanager
    def compressing(self, held_bytes: int) -> Iterator[None]:
        """Count what is done inside as compression; ``held_bytes`` are held beside the layers meanwhile."""
        self._note_peak(held_bytes)
        with self._compressing.running(self.layers[0].keys.device):
            yield

    def of_all_processes(self, numbers: list[int]) -> list[int]:
        """Each number, summed over the processes that share the model's heads."""
        return added(numbers, self._all_heads(), self.layers[0].keys.device)

    def _all_heads(self) -> HeadGroup:
        return max((self._heads(number) for number in range(len(self.layers))), key=lambda group: group.size)

    def report_settled(self) -> None:
        """Fill the report anew, when what stays was decided after the prompt was read."""
        self._finish(self.report.prefill_seconds)

    def _finish(self, seconds: float) -> None:
        notes = [*self.notes, *([self._chunked.sizes.note] if self._chunked is not None else [])]
        clock = {"seconds": seconds, "compress_seconds": self._compressing.seconds}
        self.report.peak_bytes = self._peak
        report_prefill(self.report, self.layers, self.selections, self._all_heads(), notes=notes, **clock)
        for layer in self.layers:
            layer.room = 0


def own(positions: Tensor, heads: HeadGroup, dense: bool) -> Tensor:
    """Of positions ``[H, n]`` that stay in the model's heads those of this process; not ``dense``: less padding, perhaps."""
    if heads.size == 1 or len(positions) == 1:  # all heads keep the same
        return positions
    mine = heads.mine(positions, 0)
    return mine if dense else mine[:, int((mine < 0).all(0).sum()) :]


def pick(queries: Tensor, places: Tensor) -> Tensor:
    """Queries ``[1, Hq, S, D]`` at these ascending places."""
    if places.numel() and int(places[-1] - places[0]) == len(places) - 1:  # side by side: a view
        return queries[:, :, int(places[0]) : int(places[-1]) + 1]
    # Token by token, as models hand them over: half the time of picking from each head.
    return queries.transpose(1, 2).index_select(1, places.to(queries.device, non_blocking=True)).transpose(1, 2)
