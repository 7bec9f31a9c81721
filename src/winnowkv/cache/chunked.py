"""A prompt that is read in chunks: whose queries the policy will want, and what goes between chunks where a ceiling says so.

Without a ceiling nothing goes before the last chunk: the policy hears the queries and sees the keys of the whole prompt. With
one, all layers drop to the same entries between chunks, spans of consecutive tokens that the text's own queries would attend
to from behind it; the policy then chooses from what is left as if that were the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnowkv.budget import Budget
from winnowkv.errors import InputError
from winnowkv.policies import Policy, Prompt
from winnowkv.policies.expected import Expected
from winnowkv.prompt.structure import Layout
from winnowkv.scoring.select import top_spans, with_recent, with_sinks
from winnowkv.scoring.spans import span_reduce
from winnowkv.types import Indices, Keys, Queries, Scores

SMALLEST = 64  # tokens of a chunk
WIDTH, TOP = 16, 8  # tokens of a span that goes or stays between chunks, and how many of them it is scored by


@dataclass(frozen=True)
class Cut:
    """How a prompt of ``tokens`` is cut: into chunks of ``chunk``, with at most ``ceiling`` entries a layer between them."""

    tokens: int
    chunk: int
    ceiling: int

    @property
    def sizes(self) -> list[int]:
        """Tokens of each chunk; the first takes the remainder, so that the last is whole and holds the question."""
        first = self.tokens % self.chunk
        return [*([first] if first else []), *[self.chunk] * (self.tokens // self.chunk)]

    @property
    def most(self) -> int:
        """Entries that a layer holds at most, and while the last chunk is read."""
        return min(self.tokens, self.ceiling + self.chunk)

    @property
    def note(self) -> str | None:
        """One line for the report where entries went before the policy saw them."""
        if self.most == self.tokens:
            return None
        return f"read in chunks of {self.chunk}: the policy chose from the {self.most} of {self.tokens} tokens left by then"


def cut(policy: Policy, budget: Budget, tokens: int, chunk: int, ceiling: int | float | None) -> Cut:
    """Chunks that a policy can be served with. Raises InputError for a chunk or a ceiling that is none, or too small."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < SMALLEST:
        raise InputError(f"chunk={chunk!r} is too small: give at least {SMALLEST} tokens, or leave it out")
    window = policy.window(tokens) if isinstance(policy, Expected) else policy.observe
    if chunk < min(window, tokens):
        raise InputError(
            f"chunk={chunk} is below the {window} last tokens that {policy.name} looks from: give chunk={window} or more"
        )
    if ceiling is None:
        return Cut(tokens, chunk, tokens)
    number = isinstance(ceiling, int | float) and not isinstance(ceiling, bool)
    if not number or not ceiling > 0 or (isinstance(ceiling, float) and ceiling > 1):
        raise InputError(f"ceiling={ceiling!r} must be entries (2048), or a fraction of the prompt above 0 and up to 1 (0.5)")
    entries, least = Budget(ceiling).entries(tokens), Expected.sinks + Expected.observe
    if policy.evicts:
        least = max(least, window, budget.entries(tokens) if budget.target is None else 0)
    if entries + chunk < tokens and entries < least:
        raise InputError(
            f"ceiling={ceiling} is {entries} entries of this prompt of {tokens} tokens, below the {least} that the budget "
            f"or the observation window need: give ceiling={least} or more"
        )
    return Cut(tokens, chunk, entries)


class Chunks:
    """One prompt on its way through chunks. The queries kept of a layer are few: those wanted, or 256 samples of the text.

    Only a policy that wants more queries than lie in a chunk, of a prompt that a ceiling makes shorter, has those of all
    entries kept (h2o).

    Parameters
    ----------
    policy: eviction policy, its task decided.
    middle: whose scores say what stays between chunks.
    size: how the prompt is cut.
    layers: compressed layers.

    Attributes
    ----------
    policy: whose layout is that of what is left once the last chunk is begun.
    read: tokens read with the current chunk.
    held: text positions of what every layer holds with the current chunk, ascending.
    """

    def __init__(self, policy: Policy, middle: Expected, size: Cut, layers: int) -> None:
        self.policy, self.middle, self.size = policy, middle, size
        self.exact = size.most == size.tokens
        self.held = torch.arange(0)
        self._layers = layers
        self._wanted = policy.wanted(size.tokens)
        self._needy = not isinstance(policy, Expected) and policy.reads(size.most) > size.chunk
        self.read = 0
        self._known = torch.arange(0)  # text positions whose queries are at hand: kept ones, then the chunk's
        self._queries: list[Queries | None] = [None] * layers
        self._scores: Scores | None = None
        self._begin(size.sizes[0])

    def _begin(self, tokens: int) -> None:
        chunk = torch.arange(self.read, self.read + tokens)
        self.held, self._known = torch.cat([self.held, chunk]), torch.cat([self._known, chunk])
        self.read += tokens
        if self.exact:
            self._kept = torch.isin(self._known, self._wanted).nonzero()[:, 0]
            return
        layout = getattr(self.policy, "layout", None)
        if self.last and layout is not None:
            self.policy = replace(self.policy, layout=remaining(layout, self.held))  # type: ignore[call-arg]  # it has one
        sampled = torch.linspace(0, self.read - 1, min(self.middle.samples, self.read)).long()
        kept = torch.cat([sampled, self.held]) if self._needy else sampled
        self._kept = nearest(self._known, kept).unique()

    @property
    def last(self) -> bool:
        """Whether the current chunk ends the prompt."""
        return self.read == self.size.tokens

    @property
    def drops(self) -> bool:
        """Whether something goes at the end of the current chunk."""
        return not self.last and len(self.held) > self.size.ceiling

    def hear(self, slot: int, queries: Queries, keys: Keys, scale: float) -> Queries | None:
        """Take in a layer of the current chunk: its ``queries``, and ``keys`` of all that the layer holds.

        Returns the queries that the policy wants once the chunk is the last, None before.
        """
        if self.last:
            return self._heard(slot, queries, self.policy)
        if self.drops:
            heard = self._heard(slot, queries, self.middle)
            scores = self.middle.score(slot, heard, keys, scale).mean(1, keepdim=True)
            self._scores = scores if self._scores is None else self._scores + scores.to(self._scores.device)
        self._queries[slot] = self._pick(slot, queries, self._kept)
        return None

    def _heard(self, slot: int, queries: Queries, policy: Policy) -> Queries:
        if self.exact:
            return self._pick(slot, queries, self._kept)
        wanted = policy.wanted(len(self.held))
        source = nearest(self._known, self.held[wanted])
        heard = self._pick(slot, queries, source)
        if not isinstance(policy, Expected) or policy.rotation is None:
            return heard
        # It counts among what is held, and will move them from there; what is held ends where the text ends.
        short = (self.read - len(self.held)) - (self._known[source] - wanted)
        return policy.rotation.turn(heard, short.to(heard.device))

    def _pick(self, slot: int, queries: Queries, places: Tensor) -> Queries:
        """Queries at these ascending places of what is known."""
        earlier = len(self._known) - queries.shape[2]
        old, new = places[places < earlier], places[places >= earlier] - earlier
        picked = queries[:, :, new.to(queries.device)]
        before = self._queries[slot]
        return picked if before is None else torch.cat([before[:, :, old.to(queries.device)], picked], 2)

    def end(self) -> Tensor | None:
        """The current chunk is read: which entries of every layer stay, ascending ``[n]``, None for all; the next begins."""
        if self.last:
            return None
        stays = None
        if self.drops and self._scores is not None:
            stays = staying(self._scores.cpu(), self.held, self.middle.sinks, self.size.ceiling)
            self.held = self.held[stays]
        self._scores, self._known = None, self._known[self._kept]
        self._begin(self.size.chunk)
        return stays

    def prompt(self, budget: Budget) -> Prompt:
        """What the policy is to choose from when the last chunk is read."""
        return Prompt(self.size.most, self._layers, min(budget.entries(self.size.tokens), self.size.most))

    def text(self, positions: Indices) -> Indices:
        """Text positions of positions among what is held; what is missing, -1, stays so."""
        if self.exact:
            return positions
        held = self.held.to(positions.device)
        return held[positions.long().clamp(min=0)].masked_fill(positions < 0, -1)


def nearest(known: Tensor, wanted: Tensor) -> Tensor:
    """Index of the nearest of the ascending ``known`` positions for each wanted one."""
    after = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    before = (after - 1).clamp(min=0)
    return torch.where(known[after] - wanted < wanted - known[before], after, before)


def staying(scores: Scores, held: Tensor, sinks: int, entries: int) -> Tensor:
    """Which ``entries`` of those held stay, ascending: sinks, the best spans by ``scores`` ``[1, 1, C]``, what is behind ``C``.

    A span is :data:`WIDTH` tokens of the text, as far as they are still there; the sinks are one.
    """
    context = scores.shape[-1]
    recent = len(held) - context
    owner = torch.where(held < sinks, -1, held // WIDTH)[:context].unique_consecutive(return_inverse=True)[1]
    tokens = with_sinks(scores, sinks)
    best = top_spans(span_reduce(tokens, owner, TOP), tokens, owner, entries - recent)
    return with_recent(best, len(held), recent)[0, 0]


def remaining(layout: Layout, held: Tensor) -> Layout | None:
    """The layout of what is left of a prompt, its question whole; None where the layout is another prompt's."""
    if layout.tokens != int(held[-1]) + 1:
        return None
    ends = torch.searchsorted(held, torch.tensor(layout.ends, dtype=held.dtype)).unique().tolist()
    within: Sequence[int] = [end for end in ends if 0 < end < len(held)]
    return Layout(len(held), layout.question, layout.tail, tuple(within))
