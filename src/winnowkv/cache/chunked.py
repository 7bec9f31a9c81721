"""A prompt that is read in chunks: whose queries the policy will want, and what goes between chunks under a ceiling.

Without a ceiling nothing goes before the last chunk: the policy gets the queries and keys of the whole prompt. With one, all
layers drop to the same entries between chunks, by the policy's :meth:`~winnowkv.policies.Policy.chunk_eviction`; it then
chooses from what is left as if that were the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from winnowkv.budget import Budget
from winnowkv.cache.compression import Compression
from winnowkv.errors import InputError
from winnowkv.policies import LayerStates, PromptInfo
from winnowkv.policies.parts import Scorer
from winnowkv.policies.protected import competing, rest
from winnowkv.prompt.structure import remaining
from winnowkv.types import Indices, Keys, Queries, Scores, Values

SMALLEST_CHUNK = 64  # tokens


@dataclass(frozen=True)
class ChunkSizes:
    """How a prompt of ``tokens`` is cut: into chunks of ``chunk``, with at most ``ceiling`` entries a layer between them.

    ``hint``: tokens of the last chunk, if that is to be another one.
    """

    tokens: int
    chunk: int
    ceiling: int
    hint: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each chunk; the first takes the remainder, so that the last is whole and holds the question."""
        text = self.tokens - self.hint
        first = text % self.chunk
        return [*([first] if first else []), *[self.chunk] * (text // self.chunk), *([self.hint] if self.hint else [])]

    @property
    def held(self) -> list[int]:
        """Entries that a layer holds while each chunk is read."""
        return list(accumulate(self.lengths, lambda held, chunk: min(held, self.ceiling) + chunk))

    @property
    def most(self) -> int:
        """Entries that a layer holds at most."""
        return max(self.held)

    @property
    def left(self) -> int:
        """Entries that a layer holds while the last chunk is read: what the policy chooses from."""
        return self.held[-1]

    @property
    def exact(self) -> bool:
        """Whether nothing goes before the policy has seen it."""
        return self.left == self.tokens

    @property
    def note(self) -> str | None:
        """One line for the report if entries went before the policy saw them."""
        if self.exact:
            return None
        return f"read in chunks of {self.chunk}: the policy chose from the {self.left} of {self.tokens} tokens left by then"


def cut(compression: Compression, prompt: PromptInfo, chunk: int | None, ceiling: int | float | None) -> ChunkSizes:
    """Chunks that a policy can be served with; ``chunk`` None for the whole text at once, before a hint.

    Raises InputError for a chunk or a ceiling that is none, or too small, BudgetError for a budget below what always stays.
    """
    policy, tokens, hint = compression.policy, prompt.tokens, compression.hint
    if chunk is None:
        policy.check_prompt(rest(policy, prompt))
        return ChunkSizes(tokens, tokens - hint, tokens, hint)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < SMALLEST_CHUNK:
        raise InputError(f"chunk={chunk!r} is too small: give at least {SMALLEST_CHUNK} tokens, or leave it out")
    others = rest(policy, prompt)
    policy.check_prompt(others)
    window = policy.parts(compression.model, prompt).selector.window
    if not hint and chunk < min(window, tokens):
        raise InputError(
            f"chunk={chunk} is below the {window} last tokens that {policy.name} looks from: give chunk={window} or more"
        )
    if ceiling is None:
        return ChunkSizes(tokens, chunk, tokens, hint)
    number = isinstance(ceiling, int | float) and not isinstance(ceiling, bool)
    if not number or not ceiling > 0 or (isinstance(ceiling, float) and ceiling > 1):
        raise InputError(f"ceiling={ceiling!r} must be entries (2048), or a fraction of the prompt above 0 and up to 1 (0.5)")
    entries, least = Budget(ceiling).entries(tokens), compression.chunk_eviction().least
    if policy.evicts:
        least = max(least, window, others.budget if compression.budget.target is None else 0)
    least += tokens - others.tokens
    if entries + max(chunk, hint) < tokens and entries < least:
        raise InputError(
            f"ceiling={ceiling} is {entries} entries of this prompt of {tokens} tokens, below the {least} that the budget "
            f"or the observation window need: give ceiling={least} or more"
        )
    return ChunkSizes(tokens, chunk, entries, hint)


class ChunkedPrompt:
    """One prompt on its way through chunks. The queries kept of a layer are few: those wanted, or samples of the text.

    Only a policy that wants more queries than lie in a chunk, of a prompt that a ceiling makes shorter, has those of all
    entries kept (h2o).

    Parameters
    ----------
    compression: policy and budget. prompt: the whole one. sizes: how it is cut.

    Attributes
    ----------
    read: tokens read with the current chunk.
    held: text positions of what every layer holds with the current chunk, ascending.
    selection: what stays of the prompt, or of what a ceiling left of it; final once the last chunk is begun.
    """

    def __init__(self, compression: Compression, prompt: PromptInfo, sizes: ChunkSizes) -> None:
        self.sizes, self.read = sizes, 0
        self.held = torch.arange(0)
        self._compression, self._prompt = compression, prompt
        self._eviction = compression.chunk_eviction()
        self._known = torch.arange(0)  # text positions whose queries are at hand: kept ones, then the chunk's
        self._queries: list[Queries | None] = [None] * prompt.layers
        self._scores: Scores | None = None
        # Bound to what the policy will choose from at the end: it says whose queries are wanted.
        self.selection = compression.selection(self.remaining_prompt())
        bound = self.selection.bound
        self._wanted = bound.query_positions()
        self._keeps_all = not bound.parts.scorer.nearby_queries and bound.query_span() > sizes.lengths[-1]
        self._coming = list(sizes.lengths)
        self._begin()

    def _begin(self) -> None:
        tokens = self._coming.pop(0)
        chunk = torch.arange(self.read, self.read + tokens)
        self.held, self._known = torch.cat([self.held, chunk]), torch.cat([self._known, chunk])
        self.read += tokens
        if self.sizes.exact:
            self._kept = torch.isin(self._known, self._wanted).nonzero()[:, 0]
            return
        if self.last:  # what is left is known now, and with it where its question and sentences are
            self.selection = self._compression.selection(self.remaining_prompt())
            self._wanted = self.selection.bound.query_positions()
        sampled = torch.linspace(0, self.read - 1, min(self._eviction.samples, self.read)).long()
        kept = torch.cat([sampled, self.held]) if self._keeps_all else sampled
        self._kept = nearest(self._known, kept).unique()

    @property
    def last(self) -> bool:
        """Whether the current chunk ends the prompt."""
        return self.read == self.sizes.tokens

    @property
    def drops(self) -> bool:
        """Whether something goes at the end of the current chunk."""
        return not self.last and len(self.held) > self.sizes.ceiling

    def take(self, layer: int, queries: Queries, keys: Keys, values: Values, scale: float) -> Queries | None:
        """Take in a layer of the current chunk: its ``queries``, and ``keys`` and ``values`` of all that the layer holds.

        Returns the queries that the policy wants once the chunk is the last, None before.
        """
        if self.last:
            return self._asked(layer, queries, self.selection.bound.parts.scorer, self._wanted)
        if self.drops:
            scorer = self._eviction.scorer(len(self.held))
            asked = self._asked(layer, queries, scorer, scorer.query_positions())
            heads = self._compression.heads.of_layer(keys.shape[1], self._compression.model.kv_heads)
            states = LayerStates(layer, asked, keys, values, scale, heads=heads)
            scores = scorer.score_all(states).mean(1, keepdim=True)
            self._scores = scores if self._scores is None else self._scores + scores.to(self._scores.device)
        self._queries[layer] = self._pick(layer, queries, self._kept)
        return None

    def _asked(self, layer: int, queries: Queries, scorer: Scorer, wanted: Tensor) -> Queries:
        """The queries at these positions among what is held, or those nearest to them in the text."""
        if self.sizes.exact:
            return self._pick(layer, queries, self._kept)
        source = nearest(self._known, self.held[wanted])
        asked = self._pick(layer, queries, source)
        # The scorer counts among what is held, and will move them from there; what is held ends where the text ends.
        short = (self.read - len(self.held)) - (self._known[source] - wanted)
        return scorer.move(asked, short.to(asked.device))

    def _pick(self, layer: int, queries: Queries, places: Tensor) -> Queries:
        """Queries at these ascending places of what is known."""
        earlier = len(self._known) - queries.shape[2]
        old, new = places[places < earlier], places[places >= earlier] - earlier
        picked = queries[:, :, new.to(queries.device)]
        before = self._queries[layer]
        return picked if before is None else torch.cat([before[:, :, old.to(queries.device)], picked], 2)

    def end(self) -> Tensor | None:
        """The current chunk is read: which entries of every layer stay, ascending ``[n]``, None for all; the next begins."""
        if self.last:
            return None
        stays = None
        if self.drops and self._scores is not None:
            stays = self._stays(self._scores.cpu())
            self.held = self.held[stays]
        self._scores, self._known = None, self._known[self._kept]
        self._begin()
        return stays

    def _stays(self, scores: Scores) -> Tensor:
        """Which entries stay between chunks by their ``scores`` ``[1, 1, C]``: protected ones, the best of the others."""
        free = torch.isin(self.held, competing(self._prompt.keep, self._prompt.tokens, self._compression.policy.sinks))
        places, protected = free.nonzero()[:, 0], (~free).nonzero()[:, 0]
        scored = places[places < scores.shape[-1]]
        best = self._eviction.select(scores[..., scored], self.held[places], self.sizes.ceiling - len(protected))
        return torch.cat([places[best], protected]).sort().values

    def remaining_prompt(self) -> PromptInfo:
        """What the policy is to choose from when the last chunk is read."""
        budget = min(self._prompt.budget, self.sizes.left)
        structure = self._prompt.task.structure
        if not self.sizes.exact and structure is not None:
            structure = remaining(structure, self.held) if self.last else None
        task = replace(self._prompt.task, structure=structure)
        keep = self._prompt.keep
        if not self.sizes.exact:  # a protected span is whole, wherever it stands among what is held
            keep = tuple((self._place(start), self._place(end)) for start, end in keep) if self.last else ()
        return replace(self._prompt, tokens=self.sizes.left, budget=budget, task=task, keep=keep)

    def _place(self, position: int) -> int:
        """How many of the tokens held stand before this position of the text."""
        return int(torch.searchsorted(self.held, position))

    def text_positions(self, positions: Indices) -> Indices:
        """Text positions of positions among what is held; what is missing, -1, stays so."""
        if self.sizes.exact:
            return positions
        held = self.held.to(positions.device)
        return held[positions.long().clamp(min=0)].masked_fill(positions < 0, -1)


def nearest(known: Tensor, wanted: Tensor) -> Tensor:
    """Index of the nearest of the ascending ``known`` positions for each wanted one."""
    after = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    before = (after - 1).clamp(min=0)
    return torch.where(known[after] - wanted < wanted - known[before], after, before)
