"""A study: what stays of a text whose question is not known yet is chosen by reading the text again and writing about it.

``text read, held whole -> read again after an instruction to repeat it -> (summary, facts, questions written) -> choose, once``

All of it goes into the cache after the text and is taken back (listening.py). The queries are reduced to sums and maxima
as they come (:class:`~winnowkv.scoring.study.Studied`). Source: KVzip (arXiv 2505.23416) for the text read again; else ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from winnowkv.cache.listening import WRITE, Ear, Progress, Source, Teller, again_ids, read_again, weighing, write_about
from winnowkv.cache.looking import Looking
from winnowkv.cache.reports import report_decode
from winnowkv.errors import CacheError, InputError
from winnowkv.models.info import end_tokens, position_limit
from winnowkv.policies import LayerStates, Policy
from winnowkv.policies.studied import StudiedPolicy
from winnowkv.prompt.chat import rest_of_turn, text_ending
from winnowkv.prompt.structure import Structure, read_structure
from winnowkv.scoring.study import Evidence

if TYPE_CHECKING:
    from winnowkv.budget import Budget
    from winnowkv.cache.cache import CompactCache

INSTRUCTION_TOKENS = 64  # room for an instruction, before the model's positions end
SAMPLED_QUERIES = 256  # of the text read again that are kept as they are, if values are refitted
LEAST_CHUNK = 16


@dataclass(frozen=True)
class Study:
    """How a text is studied before its cache is compressed.

    Parameters
    ----------
    sources: ``again``, the text read again, and what the model writes about it: ``summary``, ``facts``, ``questions``.
    tokens: most that it writes for each of these, the most likely ones.
    chunk: tokens of the text that are read again at once.
    maximum: a token scores the most attention that one query pays, as in KVzip, and not the root mean square over all.
    sentences: share of the budget, 0 to 1, for whole sentences that every layer and head keeps, if the policy has
        ``equal=true`` and the study chooses for it; 0 for none. Else nothing changes.

    Raises
    ------
    InputError
        For other sources, for numbers below 1 (tokens) and 16 (chunk), and for a share of sentences outside 0 to 1.
    """

    sources: tuple[Source, ...] = ("again",)
    tokens: int = 96
    chunk: int = 2048
    maximum: bool = False
    sentences: float = 0.5

    def __post_init__(self) -> None:
        for source in self.sources:
            if source != "again" and source not in WRITE:
                raise InputError(f"study: the source {source!r} is unknown: it is one of again, {', '.join(WRITE)}")
        if "again" not in self.sources:
            raise InputError("study: sources must have 'again', the text read again: the others add to it")
        if self.tokens < 1 or self.chunk < LEAST_CHUNK:
            raise InputError(
                f"study: tokens={self.tokens} must be at least 1 and chunk={self.chunk} at least {LEAST_CHUNK}: give more"
            )

        if not 0 <= self.sentences <= 1:
            raise InputError(f"study: sentences={self.sentences} is a share of the budget: give a number from 0 to 1")

    @classmethod
    def of(cls, asked: Study | str) -> Study:
        """A level by its name. Raises InputError for any other."""
        if isinstance(asked, Study):
            return asked
        if asked not in LEVELS:
            raise InputError(f"study={asked!r} must be one of {', '.join(LEVELS)}, a wk.Study, or None")
        return LEVELS[asked]

    def cost(self, text: int) -> int:
        """Tokens of the text that are read again and tokens that are written, at most, for a text of so many."""
        return text + self.tokens * (len(self.sources) - 1)


Level = Literal["lean", "full"]
LEVELS = {"lean": Study(), "full": Study(("again", *WRITE))}


class Studying(Looking):
    """A text that was read and is held whole until it was studied."""

    def __init__(self, looking: Looking, context: int, study: Study, heard: Ear | None = None) -> None:
        vars(self).update(vars(looking))
        self.heard: Any = heard or Ear(self.session.layers, [scale for _, scale in self._asked], context)
        self._study = study

    def _states(self, number: int, row: int, drafted: Any = None) -> LayerStates:
        queries, scale = self._asked[number]
        states = self.session.states(number, row, queries[row], scale)
        return replace(states, studied=self.evidence(number), heard=self.heard.sample(number), weight=self.policy.heard)

    def evidence(self, number: int) -> Evidence:
        """What was found out of a layer."""
        found = {source: layers[number] for source, layers in self.heard.found.items()}
        return Evidence(found.pop("again"), tuple(found.values()), self._study.maximum)


def wait_for_study(cache: CompactCache, study: Study, structure: Structure | None = None) -> None:
    """From a fresh cache on: the prompt is held whole until :func:`study_text`.

    ``structure``: the text's (:func:`text_structure`), for policies that keep its sentences in every head; without it these
    keep spans of a fixed length. Raises UnsupportedModelError if several processes share the model's heads.
    """
    cache.compression.heads.check_alone("study=")
    asked = cache.compression
    studied = StudiedPolicy(of=asked.policy, sentences=study.sentences)
    tasks = asked.tasks
    if structure is not None and studied.shares_sentences:
        tasks = tuple(replace(task, structure=structure) for task in tasks)
    cache.compression = replace(asked, study=True, policy=studied, tasks=tasks)
    cache.reset()


def text_structure(tokenizer: Any, ids: Sequence[int]) -> Structure:
    """Where sentences end in a text that will be asked later: it has no question."""
    return replace(read_structure(tokenizer, ids), question=0, tail=0)


@torch.no_grad()
def study_text(
    cache: CompactCache,
    tokenizer: Any,
    ids: Sequence[int],
    begin: int,
    study: Study,
    *,
    chat: bool,
    progress: Progress | None = None,
) -> None:
    """Study a text that was read into a cache whose compression waits for that, and choose what stays, once.

    ``ids`` are all tokens that were read, of which the text's begin at ``begin``. If it fails, or is interrupted, the cache is
    empty. ``progress`` is called with the tokens done and those in all, which may be fewer at the end.
    """
    looking = cache.looking
    if looking is None:
        raise CacheError("nothing that waits for a study was read into this cache")
    started, layers, studied = time.perf_counter(), cache.compact_layers, cache.compression.policy
    assert isinstance(studied, StudiedPolicy)
    limits = [layer.decode_budget for layer in layers]
    studying = Studying(looking, len(ids), study)
    ear: Ear = studying.heard
    try:
        cache.looking = studying
        for layer in layers:
            layer.decode_budget = None  # what is read now is not generated: nothing of it is evicted
        tell = Teller(progress, study.cost(len(ids) - begin))
        hear(cache, ear, tokenizer, ids, begin, study, chat=chat, weigh=studied.weighs_values, sample=studied.refit, tell=tell)
        for layer, limit in zip(layers, limits, strict=True):
            layer.decode_budget = limit
        with looking.session.compressing(studying.held_bytes):
            studying.settle(studying.choose())
            for layer in layers:
                layer.shrink()
        finish(cache, studying)
    except BaseException:
        cache.reset()  # a text that was not studied must not pass for one that was
        for layer, limit in zip(layers, limits, strict=True):
            layer.decode_budget = limit
        raise
    cache.report.study_tokens, cache.report.study_seconds = tell.read, time.perf_counter() - started


@torch.no_grad()
def hear(
    cache: CompactCache,
    ear: Ear,
    tokenizer: Any,
    ids: Sequence[int],
    begin: int,
    study: Study,
    *,
    chat: bool,
    weigh: bool,
    sample: bool,
    tell: Teller,
) -> None:
    """Read the text again and write about it, as ``study`` says, for an ear that the cache shows its queries to.

    ``weigh``: attention counts by what it adds to the hidden state. ``sample``: keep some queries as they are.
    """
    model = cache.model
    every = max((len(ids) - begin) // SAMPLED_QUERIES, 1) if sample else 0
    with weighing(cache, ear) if weigh else nullcontext():
        for instruction, chunk in again_ids(tokenizer, ids, begin, study.chunk, chat=chat):
            read_again(model, cache, ear, instruction, chunk, every)
            tell(len(chunk), len(instruction))
    ending, ends = text_ending(tokenizer, ids, chat=chat), end_tokens(model, tokenizer)
    for source in study.sources:
        if source != "again":
            instruction = rest_of_turn(tokenizer, ending, WRITE[source], chat=chat)
            tell(0, len(instruction))
            for _ in write_about(model, cache, ear, source, instruction, study.tokens, ends, int(sample)):
                tell(1)


def replay_studied(
    recorded: CompactCache,
    heard: Ear,
    study: Study,
    policy: str | Policy,
    budget: Budget | int | float | str,
    structure: Structure | None = None,
) -> CompactCache:
    """What a policy keeps of a recorded text by what was heard of it: one study serves many policies and budgets.

    ``structure``: as for :func:`wait_for_study`. Equal to a study of its own (a test says so), but for seconds. Raises as
    :meth:`CompactCache.replay`.
    """
    other = type(recorded)(recorded.model, policy, budget)
    wait_for_study(other, study, structure)
    other.replay_into(recorded)
    assert other.looking is not None
    studying = Studying(other.looking, heard.context, study, heard.only(study.sources))
    studying.settle(studying.choose())
    finish(other, studying)
    return other


def finish(cache: CompactCache, studying: Studying) -> None:
    """What stays is decided: from here on the cache is like any other."""
    studied = cache.compression.policy
    assert isinstance(studied, StudiedPolicy)
    studying.heard.tokens = 0  # none of them belongs to an answer
    cache.settled(studying)
    cache.compression = replace(cache.compression, study=False, policy=studied.of)
    report_decode(cache.report, 0, 0, 0.0)
    cache.resume(cache.report)


def fitted(study: Study, model: Any, tokens: int) -> Study:
    """A study of a text of so many tokens that stays within the model's positions: its chunks are smaller if they must be.

    Raises InputError if even the least would not fit.
    """
    limit = position_limit(model)
    if limit is None:
        return study
    room, least = limit - tokens - INSTRUCTION_TOKENS, max(LEAST_CHUNK, study.tokens if len(study.sources) > 1 else 0)
    if room < least:
        raise InputError(
            f"study: {tokens} tokens of text leave {max(limit - tokens, 0)} of the model's {limit} positions, and a study "
            f"needs {least + INSTRUCTION_TOKENS} of them after the text: give a shorter text, or leave study= out"
        )
    return replace(study, chunk=min(study.chunk, room))
