"""Drafts of several requests, decoded together in slots of their own, only to hear their queries.

A draft goes on from a compact copy of a request's cache with the most likely tokens, which are thrown away; the request's own
cache is held whole meanwhile (:mod:`winnowkv.cache.looking`). Steps are eager: drafts come and go, and queries are taken out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.attention.hooks import Observer
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.looking import Heard, compact_copy
from winnowkv.cache.session import Selections
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import drop_ended


class Draft:
    """One draft: a row of the slots of drafts.

    Parameters
    ----------
    cache: held whole, from whose compact copy the draft is decoded. newest: its latest token, which is read first.
    """

    def __init__(self, cache: CompactCache, newest: int) -> None:
        assert cache.looking is not None
        self.cache, self.newest = cache, newest
        self.wanted = cache.looking.policy.draft
        self.heard = Heard(len(cache.compact_layers))

    @property
    def over(self) -> bool:
        """Whether all its tokens were read."""
        return self.heard.tokens >= self.wanted


class DraftSlots(Slots):
    """Slots that show each row's queries to the draft in it; ``rows_of``: the drafts, in the order of the rows."""

    def __init__(self, model: PreTrainedModel, like: CompactCache, rows_of: Sequence[Draft]) -> None:
        super().__init__(model, like=like)
        self._rows_of = rows_of
        full = [index for index, layer in enumerate(self._each) if layer.sliding_window is None]
        self._numbers = {index: number for number, index in enumerate(full)}

    def observer(self, layer_idx: int) -> Observer | None:
        """Compressed layers' queries are heard."""
        number = self._numbers.get(layer_idx)
        return None if number is None else partial(self._hear, number)

    def _hear(self, number: int, queries: Tensor, scale: float) -> None:
        for row, draft in enumerate(self._rows_of):
            # A copy: a part of what all rows share would keep the whole of it.
            draft.heard.take(number, queries[row : row + 1].clone() if len(self._rows_of) > 1 else queries)


class Drafts:
    """All drafts that run now. Not thread-safe: belongs to who has the scheduler's turn."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._slots: DraftSlots | None = None  # made with the first draft
        self.running: list[Draft] = []

    @property
    def held_bytes(self) -> int:
        """Storage of the compact copies and of the queries heard."""
        copies = 0 if self._slots is None else self._slots.held_bytes
        return copies + sum(draft.heard.held_bytes for draft in self.running)

    def bytes_with(self, columns: Sequence[int]) -> int:
        """Storage of the compact copies with one more, of so many columns of each compressed layer, if there are any now."""
        return 0 if self._slots is None else self._slots.bytes_with(columns, 0)

    def begin(self, cache: CompactCache, chosen: Selections, newest: int) -> Draft:
        """Begin a draft from what was chosen of a cache, with its latest token. The cache stays as it is."""
        assert cache.looking is not None
        begin = time.perf_counter()
        copied = compact_copy(cache, chosen)
        draft = Draft(cache, newest)
        if self._slots is None:
            self._slots = DraftSlots(self._model, copied, self.running)
        try:
            self._slots.place(copied, draft.wanted)
        except BaseException:
            if self._slots.rows > len(self.running):
                self._slots.drop(len(self.running))  # the others go on
            raise
        self.running.append(draft)
        cache.report.draft_seconds += time.perf_counter() - begin
        return draft

    @torch.no_grad()
    def step(self) -> list[Draft]:
        """Read the newest token of each draft and take the most likely one after it; returns those that are over."""
        if not self.running or self._slots is None:
            return []
        begin = time.perf_counter()
        newest = torch.tensor([draft.newest for draft in self.running], device=self._slots.device)
        likeliest = self._slots.step(newest).argmax(-1).tolist()
        seconds = time.perf_counter() - begin
        for draft, token in zip(self.running, likeliest, strict=True):
            draft.newest = token
            draft.cache.report.draft_seconds += seconds
        over = [draft for draft in self.running if draft.over]
        for draft in over:
            draft.cache.report.draft_tokens += draft.wanted
        self.drop(lambda draft: draft.over)
        return over

    def drop(self, ended: Callable[[Draft], bool]) -> None:
        """Free the rows of drafts that are over or not wanted any more."""
        if self._slots is not None and any(map(ended, self.running)):
            drop_ended(self._slots, self.running, ended)
            self._slots.trim()  # what a draft claimed is another one's now

    def clear(self) -> None:
        """Drop all drafts and the slots, whatever state a failed step left them in."""
        self.running, self._slots = [], None
