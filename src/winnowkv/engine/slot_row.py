"""What one row of compact slots needs and has read, and the decode budget that it may have."""

from __future__ import annotations

from dataclasses import dataclass

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.generated import DECODE_BLOCK
from winnowkv.policies.decode_eviction import DecodeEviction

COLUMN_BLOCK = 64  # columns added when a request has filled its room


@dataclass(frozen=True)
class DecodeLimit:
    """A decode budget in slots, as :class:`~winnowkv.cache.layer.CompactLayer` holds it.

    ``budget``: entries of the tokens after the prompt that an eviction leaves, per layer and KV head; ``eviction``: which.
    """

    budget: int
    eviction: DecodeEviction

    @classmethod
    def of(cls, cache: CompactCache) -> DecodeLimit | None:
        """A cache's, None if it has no decode budget."""
        return None if cache.decode_budget is None else cls(cache.decode_budget, cache.compact_layers[0].decode_eviction)

    @property
    def observe(self) -> int:
        """Most queries that a row keeps, by which the next block is chosen."""
        return self.eviction.observe

    @property
    def most(self) -> int:
        """Entries at which a block goes: a step's new entry is attended to before, so that it needs a column, too."""
        return self.budget + DECODE_BLOCK

    def columns(self, held: int, room: int) -> int:
        """Columns for tokens after the prompt, of which ``held`` are there and ``room`` more may come.

        A cache that got its budget late may hold more than a block above it: until its first step, which evicts.
        """
        return min(held + room, max(self.most, held + 1))

    def after(self, held: int, tokens: int) -> int:
        """Entries that are held of the tokens after the prompt when so many more were read one by one."""
        first = max(self.most - held, 1)  # tokens until the first block goes
        return held + tokens if tokens < first else self.budget + (tokens - first) % DECODE_BLOCK


@dataclass
class SlotRow:
    """One request in slots.

    Attributes
    ----------
    entries: of each full-attention layer, those that stay as long as the request has its row.
    room: columns for the tokens after them. held: how many of these are in use.
    seen: tokens read before it was placed. generated: tokens read since.
    limit: its decode budget, None if it has none. observe: most queries that it keeps. heard: newest queries at hand.
    """

    entries: list[int]
    room: int
    seen: int = 0
    generated: int = 0
    held: int = 0
    limit: DecodeLimit | None = None
    observe: int = 0
    heard: int = 0

    @classmethod
    def of(cls, cache: CompactCache, room: int) -> SlotRow:
        """The row of a cache whose prompt was read, for ``room`` more tokens."""
        layers, limit = cache.compact_layers, DecodeLimit.of(cache)
        first, lengths = layers[0], [layer.length for layer in layers]
        seen = first.seen - first.pads[0]
        if limit is None:
            return cls(lengths, room, seen)
        held, observe = first.generated, limit.observe
        row = cls([n - held for n in lengths], limit.columns(held, room), seen, held=held, limit=limit, observe=observe)
        row.heard = 0 if first.queries is None else min(first.queries.shape[2], observe)
        return row

    @property
    def columns(self) -> list[int]:
        """Of each full-attention layer."""
        return [entries + self.room for entries in self.entries]

    @property
    def hears(self) -> bool:
        """Whether the next token's query is among those that the next eviction looks at."""
        return self.limit is not None and self.held + 1 > self.limit.most - self.observe

    @property
    def query_column(self) -> int:
        """Where the next token's query goes: its queries are a ring."""
        return self.heard % self.observe if self.hears else 0

    @property
    def query_columns(self) -> list[int]:
        """Where its newest queries lie, oldest first."""
        return [at % self.observe for at in range(max(self.heard - self.observe, 0), self.heard)]

    def grow(self) -> None:
        """Give it room for more tokens, or for as many as its limit holds."""
        self.room += COLUMN_BLOCK
        if self.limit is not None:
            self.room = min(self.room, max(self.limit.most, self.held + 1))

    def advance(self) -> bool:
        """A token was read; True if it completes a block, which has to go."""
        self.heard = self.heard + 1 if self.hears else 0
        self.generated, self.held = self.generated + 1, self.held + 1
        return self.limit is not None and self.held >= self.limit.most

    def evicted(self) -> None:
        """The entries after the prompt's were evicted down to the budget."""
        assert self.limit is not None
        self.held, self.heard, self.room = self.limit.budget, 0, min(self.room, self.limit.most)
