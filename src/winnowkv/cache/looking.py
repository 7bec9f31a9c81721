"""Lookahead: a prompt is held whole until its answer has begun, and the answer's own queries choose what stays.

``prompt read -> lookahead from the whole cache -> choose -> (draft from a compact copy -> choose again) -> evict, refit``

The lookahead's tokens are real output, exactly the full cache's. A draft's tokens are thrown away: only their queries count.
What stays is chosen as late as it can be, when the first token after the lookahead comes: an answer that ends before evicts
nothing, and tokens that were taken back (assisted decoding) are not heard.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnowkv.attention.generate import PassWatch, given_cache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.other_layers import fork_layer
from winnowkv.cache.session import PrefillSession, Selections
from winnowkv.errors import CacheError
from winnowkv.models.info import cache_argument
from winnowkv.policies import LayerStates, PromptInfo
from winnowkv.scoring.refit import refit_values
from winnowkv.types import Queries

if TYPE_CHECKING:
    from winnowkv.cache.cache import CompactCache

# Of the inputs of a forward pass: what a draft sets itself, and what grows by one with each token.
GIVEN = ("use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict", "labels")
PLACES = ("position_ids", "cache_position")


class Heard:
    """Queries of tokens after a prompt, layer by layer ``[B, Hq, k, D]``."""

    def __init__(self, layers: int) -> None:
        self._layers: list[list[Queries]] = [[] for _ in range(layers)]

    def take(self, number: int, queries: Queries) -> None:
        """Add a layer's queries of one forward pass."""
        self._layers[number].append(queries.detach())

    @property
    def tokens(self) -> int:
        """How many tokens the last layer has heard."""
        return sum(part.shape[2] for part in self._layers[-1])

    def of(self, number: int, most: int | None = None) -> Queries | None:
        """A layer's queries, of the first ``most`` tokens; None if there are none."""
        parts = self._layers[number]
        return torch.cat(parts, 2)[:, :, :most] if parts and most != 0 else None

    def crop(self, tokens: int) -> None:
        """Forget the last tokens."""
        self._layers = [[torch.cat(parts, 2)[:, :, :-tokens]] if parts else [] for parts in self._layers]

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self._layers = [[part.index_select(0, rows.to(part.device)) for part in parts] for parts in self._layers]

    def fork(self) -> Heard:
        """The same queries; what either hears later is its own."""
        other = Heard(0)
        other._layers = [list(parts) for parts in self._layers]
        return other

    @property
    def held_bytes(self) -> int:
        """Bytes of all queries."""
        return sum(part.nbytes for parts in self._layers for part in parts)


class Looking:
    """A prompt, or a batch of them, that was read and is held whole until its answer's first tokens are there.

    Parameters
    ----------
    session: of the prompt, over; what it asked of each layer is taken over.
    """

    def __init__(self, session: PrefillSession) -> None:
        self.session, self.policy = session, session.compression.policy
        self.heard = Heard(len(session.layers))
        self._asked, session.asked = session.asked, []
        session.report.notes.append(
            "the prompt is held whole until its answer has begun: an answer that ends before, within "
            f"lookahead={self.policy.lookahead}, evicts nothing"
        )  # until something is chosen: the report is filled anew then
        self.watch: PassWatch | None = None  # tells the inputs of the next forward pass, for a draft
        self._prompts: list[PromptInfo] = [selection.bound.prompt for selection in session.selections]

    def fork(self, cache: CompactCache) -> Looking:
        """The same for a cache whose layers are forks of this one's."""
        other, session = copy(self), self.session.fork(cache.compact_layers, cache.report)
        other.session, other.heard, other.watch = session, self.heard.fork(), None
        return other

    def close(self) -> None:
        """Nothing is waited for any more."""
        if self.watch is not None:
            self.watch.close()

    @property
    def ready(self) -> bool:
        """Whether enough was heard to choose."""
        return self.heard.tokens >= self.policy.lookahead

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        numbers = rows.tolist()
        self.heard.select_rows(rows)
        self._prompts = [self._prompts[row] for row in numbers]
        self._asked = [([queries[row] for row in numbers], scale) for queries, scale in self._asked]

    @property
    def held_bytes(self) -> int:
        """Bytes of the queries that are kept until something is chosen."""
        return self.heard.held_bytes + sum(each.nbytes for queries, _ in self._asked for each in queries)

    @property
    def evicts(self) -> bool:
        """Whether anything of a row can go."""
        return any(selection.bound.evicts for selection in self.session.selections)

    def drafts_from(self, chosen: Selections) -> bool:
        """Whether the policy drafts from what was chosen: not if everything stays."""
        return bool(self.policy.draft) and any(kept is not None for one in chosen for kept in one.kept)

    def choose(self, drafted: Heard | None = None) -> Selections:
        """What stays of each row by the policy's own queries, those heard so far, and those of a draft."""
        with self.session.compressing(self.held_bytes):
            return self._choose(drafted)

    def _choose(self, drafted: Heard | None) -> Selections:
        chosen = []
        for row, prompt in enumerate(self._prompts):
            selection = self.session.compression.selection(prompt)
            for number in range(len(self._asked)):
                selection.observe(self._states(number, row, drafted))
            chosen.append(selection)
        return chosen

    def _states(self, number: int, row: int, drafted: Heard | None) -> LayerStates:
        queries, scale = self._asked[number]
        states = self.session.states(number, row, queries[row], scale)
        spoken = self.heard.of(number, self.policy.lookahead)
        parts = [part for part in (spoken, None if drafted is None else drafted.of(number)) if part is not None]
        if not parts:
            return states
        heard = torch.cat([part[row : row + 1].to(states.keys.device) for part in parts], 2)
        return replace(states, heard=heard, weight=self.policy.heard)

    def settle(self, chosen: Selections, drafted: Heard | None = None) -> None:
        """Evict all that was not chosen, layer by layer, and refit and quantize what stays if the policy says so."""
        session, refitted = self.session, 0
        session.selections = list(chosen)
        changed = {at for one in chosen for at, kept in enumerate(one.kept) if kept is not None}
        for number, layer in enumerate(session.layers):
            if number not in changed:
                continue
            values = self._refitted(number, chosen, drafted) if self.policy.refit else None
            session.keep(number)
            if values is not None:
                layer.replace_values([row for row, _ in values])
                refitted += sum(used for _, used in values)
        session.store()
        if self.policy.refit:
            heads = sum(layer.keys.shape[1] for layer in session.layers) * len(chosen)
            refitted, heads = session.of_all_processes([refitted, heads])
            session.report.refitted = refitted / heads
            if not refitted:
                session.notes.append("refit changed no value: no query that was held out comes closer to the full cache by it")

    def _refitted(self, number: int, chosen: Selections, drafted: Heard | None) -> list[tuple[Tensor | None, int]]:
        """Of each row the values ``[Hkv, n, D]`` that take the place of those kept, and in how many heads they differ."""
        found: list[tuple[Tensor | None, int]] = []
        for row, selection in enumerate(chosen):
            kept = selection.kept[number]
            if kept is None:
                found.append((None, 0))
                continue
            states = self._states(number, row, drafted)
            own = selection.bound.parts.scorer.answer_queries(states)
            mine = self.session.own_positions(number, kept)
            values, used = refit_values(own, states.heard, states.keys, states.values, mine, states.scale, states.weight)
            found.append((values, int(used.sum())))
        return found


def decide(cache: CompactCache, inputs: Mapping[str, Any] | None = None) -> None:
    """Choose what stays of a cache whose prompt is still held whole, draft if the policy says so, and evict the rest.

    ``inputs``: those of the forward pass that comes next, from which a draft goes on; without them there is no draft.
    """
    looking = cache.looking
    if looking is None:
        return
    report, chosen, drafted = looking.session.report, looking.choose(), None
    if inputs is not None and looking.drafts_from(chosen):
        for _ in range(looking.policy.rounds):
            begin = time.perf_counter()
            trial = compact_copy(cache, chosen)
            drafted = draft(trial, inputs, looking.policy.draft)
            report.draft_tokens += looking.policy.draft
            report.draft_seconds += time.perf_counter() - begin
            chosen = looking.choose(drafted)
    settle(cache, chosen, drafted)


def settle(cache: CompactCache, chosen: Selections, drafted: Heard | None = None) -> None:
    """Evict all that was not chosen of a cache that is held whole; it only holds from here on."""
    looking = cache.looking
    assert looking is not None
    with looking.session.compressing(looking.held_bytes):
        looking.settle(chosen, drafted)
    cache.settled(looking)


def check_chosen(cache: CompactCache, what: str) -> None:
    """Raise CacheError for a cache whose prompt is held whole still, and so cannot be ``what`` yet."""
    if cache.looking is not None:
        spec, lacking = cache.looking.policy.spec, cache.looking.policy.lookahead - cache.looking.heard.tokens
        raise CacheError(
            f"the cache of {spec} holds its whole prompt until {max(lacking, 0) + 1} more tokens of its answer come, and "
            f"cannot be {what} before: read them into it first, or leave lookahead and draft out of the policy"
        )


def fork_looking(cache: CompactCache) -> CompactCache:
    """A cache that looks by itself from where this one stands; storage is shared until either reads more.

    For choices that go on from one prompt: each hears its own tokens. The report is a copy.
    """
    looking, asked = cache.looking, cache.compression
    if looking is None:
        raise CacheError("nothing is left to choose in this cache")
    settings: dict[str, Any] = {"task": asked.tasks, "decode_budget": cache.decode_budget, "keep": asked.keep}
    other = type(cache)(cache.model, asked.policy, asked.budget, hold=False, **settings)
    other.resume(deepcopy(cache.report))
    for index, layer in enumerate(cache.layers):
        other.layers[index] = fork_layer(layer)
    other.looking = looking.fork(other)
    return other


def compact_copy(cache: CompactCache, chosen: Selections) -> CompactCache:
    """A cache that holds only what was chosen, and hears the queries of what is read into it; ``cache`` stays as it is."""
    looking = cache.looking
    if looking is None:
        raise CacheError("nothing is left to choose in this cache")
    other = type(cache)(cache.model, "full", 1, hold=False)
    other.resume(other.report)
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CompactLayer):
            other.layers[index] = fork_layer(layer)
            continue
        number, mine = cache.layer_number(index), copy(layer)
        mine.pads, mine.positions = list(mine.pads), list(mine.positions)
        other.layers[index] = mine
        looking.session.keep(number, chosen, mine)  # copies what stays
    other.heard = Heard(len(cache.compact_layers))
    return other


@torch.no_grad()
def draft(trial: CompactCache, inputs: Mapping[str, Any], tokens: int) -> Heard:
    """Read the inputs of a forward pass and go on with the most likely tokens, ``tokens`` in all; the queries heard."""
    model, heard = trial.model, trial.heard
    assert heard is not None
    mine = cache_argument(model, trial)
    given = {name: value for name, value in inputs.items() if name not in (*GIVEN, given_cache(dict(inputs))[0])}
    logits = model(**given, **mine, use_cache=True, logits_to_keep=1).logits[:, -1]
    places = {name: inputs[name][..., -1:] for name in PLACES if isinstance(inputs.get(name), Tensor)}
    mask = inputs.get("attention_mask")
    while heard.tokens < tokens:
        newest = logits.argmax(-1, keepdim=True)
        places = {name: value + 1 for name, value in places.items()}
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model(
            input_ids=newest.to(mask.device if mask is not None else newest.device),
            attention_mask=mask, **places, **mine, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
    return heard
