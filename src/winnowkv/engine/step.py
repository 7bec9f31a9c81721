"""Decode steps of rows in slots, shared by engine and evaluation, and greedy answers from many caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from winnowkv.cache.cache import CompactCache
from winnowkv.engine.sampling import Logprob, Sampler, Sampling, choose
from winnowkv.engine.slot_row import COLUMN_BLOCK
from winnowkv.engine.slots import Slots

GREEDY = Sampling()
Row = TypeVar("Row")


def advance(slots: Slots, samplers: Sequence[Sampler]) -> list[tuple[int, Logprob | None] | None]:
    """One decode step of all rows: each row's next token, chosen by its sampler, as :func:`choose` returns it."""
    newest = torch.tensor([sampler.tokens[-1] for sampler in samplers], device=slots.device)
    return choose(slots.step(newest), samplers)


def drop_ended(slots: Slots, rows: list[Row], ended: Callable[[Row], bool]) -> None:
    """Free the slots of rows that have ended. ``rows`` are in the order of the slots, and stay so."""
    for at in reversed(range(len(rows))):
        if ended(rows[at]):
            slots.drop(at)
            rows[at] = rows[-1]
            rows.pop()


@torch.no_grad()
def greedy_rows(
    caches: Sequence[CompactCache],
    logits: Tensor,
    limit: int,
    done: Callable[[list[int]], bool],
    begun: Sequence[Sequence[int]] | None = None,
) -> list[list[int] | None]:
    """The most likely tokens that continue each cache, decoded together; a row that ends frees its slot at once.

    Parameters
    ----------
    caches: at least one, of one model and one request each; empty afterwards, but for rows that end with their first token.
    logits: of each request's latest token, ``[B, vocabulary]``.
    limit: most tokens of a row, at least 1; more than any row has ``begun`` with.
    done: called with a row's tokens after each new one; True ends the row, which keeps the token.
    begun: of each row the tokens of its answer that its cache has read already. None: no row has any.

    Returns
    -------
    list
        Tokens per row, those begun with included; None for a row whose largest logit is not a finite number, which ends it.

    Raises
    ------
    CacheError
        For a cache that slots do not take: of another model, of several rows, or one that still holds its whole prompt to
        choose from.
    """
    samplers = [Sampler(GREEDY, (), logits.device) for _ in caches]
    for sampler, tokens in zip(samplers, begun or [()] * len(samplers), strict=True):
        sampler.tokens.extend(tokens)
    shortest = min((len(sampler.tokens) for sampler in samplers), default=0)
    rows: list[list[int] | None] = [sampler.tokens for sampler in samplers]
    ended = [False] * len(rows)

    def take(active: Sequence[int], chosen: Sequence[object]) -> None:
        for row, one in zip(active, chosen, strict=True):
            if one is None:
                rows[row] = None
            tokens = rows[row]
            ended[row] = tokens is None or len(tokens) == limit or done(tokens)

    take(range(len(rows)), choose(logits, samplers))
    active = [row for row in range(len(rows)) if not ended[row]]
    slots = Slots(caches[0].model, like=caches[0])
    slots.place_all([caches[row] for row in active], min(limit - 1 - shortest, COLUMN_BLOCK))
    while active:
        take(active, advance(slots, [samplers[row] for row in active]))
        drop_ended(slots, active, ended.__getitem__)
    return rows
