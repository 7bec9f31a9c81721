"""Hearing a study: the text read again, what the model writes about it, and the queries of both, reduced as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from winnowkv.attention.projection import attention_blocks, output_projections, projection_weight
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.other_layers import fork_layer
from winnowkv.models.devices import input_device
from winnowkv.models.info import cache_argument
from winnowkv.prompt.chat import rest_of_turn, text_ending
from winnowkv.scoring.study import Contribution, Studied, projected_lengths
from winnowkv.types import Queries

if TYPE_CHECKING:
    from winnowkv.cache.cache import CompactCache

Source = Literal["again", "summary", "facts", "questions"]
AGAIN = "Repeat the previous context:"
AGAIN_FROM = "Repeat the part of the previous context that follows after the words: {}"
WRITE: dict[Source, str] = {
    "summary": "Write a summary of the text.",
    "facts": "List all facts in the text: names, numbers, dates, places.",
    "questions": "List the questions that the text answers.",
}
QUOTED_TOKENS = 8  # of the chunk before, which the instruction to repeat the next one quotes
Progress = Callable[[int, int], None]  # called with the tokens done and those in all


class Ear:
    """Hears a study's queries in place of :class:`~winnowkv.cache.looking.Heard`, and reduces them, source by source.

    Parameters
    ----------
    layers: that hold the text. scales: of their attention. context: the text's tokens.
    """

    def __init__(self, layers: Sequence[CompactLayer], scales: Sequence[float], context: int) -> None:
        self._layers, self._scales, self.context = layers, scales, context
        self.found: dict[str, list[Studied]] = {}
        self.kept: dict[str, list[list[Queries]]] = {}  # by source and layer a few queries as they are, to refit values
        self.tokens = -1  # not ready: nothing is chosen before the study is over
        self._source, self._every = "", 0
        self.share: Callable[[int, int], Contribution] | None = None  # of a layer with so many query heads

    def listen(self, source: str, every: int = 0) -> None:
        """What comes next is of this source, of none if that is empty; keep one query in ``every`` as it is, none if 0."""
        self._source, self._every = source, every

    def take(self, number: int, queries: Queries) -> None:
        """Add a layer's queries of one forward pass."""
        if not self._source:
            return
        keys = self._layers[number].entries_in_use()[0]
        asked = queries.detach()
        if self._source not in self.found:
            self.found[self._source] = []
        of_layers = self.found[self._source]
        if number == len(of_layers):
            of_layers.append(Studied(queries.shape[1], keys.shape[1], self.context, keys.device))
        share = None if self.share is None else self.share(number, queries.shape[1])
        of_layers[number].add(asked, keys, self._scales[number], share)
        if self._every:
            kept = self.kept.setdefault(self._source, [[] for _ in self._layers])
            kept[number].append(asked[:, :, :: self._every].clone())

    def sample(self, number: int) -> Queries | None:
        """The queries of a layer that were kept as they are, None if none were."""
        parts = [part for layers in self.kept.values() for part in layers[number]]
        return torch.cat(parts, 2) if parts else None

    def only(self, sources: Sequence[str]) -> Ear:
        """What was heard from these sources, as if no others had been."""
        other = Ear(self._layers, self._scales, self.context)
        other.found = {source: self.found[source] for source in sources if source in self.found}
        other.kept = {source: self.kept[source] for source in sources if source in self.kept}
        return other

    @property
    def held_bytes(self) -> int:
        """Bytes of sums, maxima and kept queries."""
        sums = sum(each.held_bytes for layers in self.found.values() for each in layers)
        return sums + sum(part.nbytes for layers in self.kept.values() for parts in layers for part in parts)


def again_ids(
    tokenizer: Any, ids: Sequence[int], begin: int, chunk: int, *, chat: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """For each chunk of a text, ``ids[begin:]``, the instruction to repeat it, and the chunk."""
    ending = text_ending(tokenizer, ids, chat=chat)
    for at in range(begin, len(ids), chunk):
        said = AGAIN
        if at > begin:
            said = AGAIN_FROM.format(tokenizer.decode(list(ids[max(at - QUOTED_TOKENS, begin) : at])).strip())
        yield rest_of_turn(tokenizer, ending, said, chat=chat), list(ids[at : at + chunk])


@contextmanager
def taken_back(cache: CompactCache) -> Iterator[None]:
    """What is read into a cache inside is gone afterwards, whatever happened."""
    before = cache.compact_layers[0].seen
    others = {index: layer for index, layer in enumerate(cache.layers) if not isinstance(layer, CompactLayer)}
    for index, layer in others.items():
        cache.layers[index] = fork_layer(layer)
    try:
        yield
    finally:
        for layer in cache.compact_layers:
            if layer.is_initialized and layer.seen > before:
                layer.crop(before - layer.seen)
        for index, layer in others.items():
            cache.layers[index] = layer


@torch.no_grad()
def read_again(
    model: Any, cache: CompactCache, ear: Ear, instruction: Sequence[int], chunk: Sequence[int], every: int = 0
) -> None:
    """Read an instruction and a chunk of the text after it, and take both back."""
    with taken_back(cache):
        ear.listen("again", every)
        inputs = torch.tensor([[*instruction, *chunk]], device=input_device(model))
        model(input_ids=inputs, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        ear.listen("")


@torch.no_grad()
def write_about(
    model: Any,
    cache: CompactCache,
    ear: Ear,
    source: str,
    instruction: Sequence[int],
    tokens: int,
    ends: frozenset[int],
    every: int = 0,
) -> Iterator[int]:
    """Read an instruction, let the model write at most so many tokens, the most likely ones, one by one, and take all back."""
    mine = cache_argument(model, cache)
    with taken_back(cache):
        inputs = torch.tensor([list(instruction)], device=input_device(model))
        logits = model(input_ids=inputs, **mine, use_cache=True, logits_to_keep=1).logits[:, -1]
        ear.listen(source, every)
        for _ in range(tokens):
            token = int(logits.argmax(-1))
            if token in ends:
                break
            yield token
            inputs = torch.tensor([[token]], device=inputs.device)
            logits = model(input_ids=inputs, **mine, use_cache=True, logits_to_keep=1).logits[:, -1]
        ear.listen("")


class Teller:
    """Counts what a study has read, and tells how far it is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.read = 0
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, tokens: int, besides: int = 0) -> None:
        """So many tokens more, and others that :meth:`Study.cost` does not count."""
        self._done, self.read = self._done + tokens, self.read + tokens + besides
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def weighing(cache: CompactCache, ear: Ear) -> Iterator[None]:
    """Inside, attention counts by what it adds to the query's hidden state, as in KVzip+ (arXiv 2601.07891).

    The hidden state is what goes into the attention block. Raises UnsupportedModelError if its projection cannot be read.
    """
    model = cache.model
    numbers = {cache.layer_number(i): i for i, one in enumerate(cache.layers) if isinstance(one, CompactLayer)}
    projections, streams = output_projections(model), dict[int, Tensor]()
    lengths: dict[int, Tensor] = {}
    context = cache.compact_layers[0].prompt

    def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden = given["hidden_states"] if "hidden_states" in given else args[0]
        streams[module.layer_idx] = hidden[0].detach().float().norm(dim=-1)  # type: ignore[index]

    def share(number: int, heads: int) -> Contribution:
        if number not in lengths:
            layer, projection = cache.compact_layers[number], projections.get(numbers[number])
            values = layer.values[:, :, :context]
            lengths[number] = projected_lengths(values, projection_weight(projection, number, heads).to(values.device))
        return Contribution(lengths[number], streams.pop(numbers[number]))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for _, block, _ in attention_blocks(model)]
    ear.share = share
    try:
        yield
    finally:
        ear.share = None
        for hook in hooks:
            hook.remove()
