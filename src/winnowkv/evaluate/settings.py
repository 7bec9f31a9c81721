"""Settings to compare, each a policy and a budget: one recorded prefill of a prompt serves all of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from winnowkv.budget import Asked, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.reading import extend, prefill
from winnowkv.engine.step import greedy_rows
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.lookahead import FirstTokens
from winnowkv.models.info import ModelInfo
from winnowkv.policies import Policy, PromptInfo, policy as make_policy
from winnowkv.prompt.task import TaskProfile

# A padded row of a batch holds at most this many times the entries of the batch's shortest cache. Padding costs little time.
MAX_PADDING_RATIO = 3.0


@dataclass(frozen=True, eq=False)
class Setting:
    """A policy spec and a budget, as the user wrote them."""

    policy: str
    budget: Asked

    @property
    def key(self) -> tuple[str, str, Asked]:
        """The identity of a setting: 1 entry and the fraction 1.0 are two budgets."""
        return self.policy, *Budget(self.budget).key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setting) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a setting kept of one prompt: its cache, or the reason why it has none; and what its answer begins from.

    ``logits`` ``[1, V]`` are those of the prompt's last token; ``question`` holds the token ids that are read into the
    compressed cache before the answer, empty if they were part of the prompt. ``spoken``: tokens of the answer that the cache
    has read over the whole prompt before it evicted; ``logits`` are then those of the last of them. ``ended``: the answer, if
    it ended while the whole prompt was held.
    """

    setting: Setting
    cache: CompactCache | None
    failed: str | None = None
    logits: torch.Tensor | None = None
    question: tuple[int, ...] = ()
    spoken: tuple[int, ...] = ()
    ended: Answer | None = None


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, None if a logit was not a number.

    Seconds and steps are those of its whole batch, without tokens that were read over the whole prompt before it was evicted.
    """

    tokens: list[int] | None
    seconds: float
    steps: int
    batch: int


def settings(policies: Sequence[str], budgets: Sequence[Asked]) -> list[Setting]:
    """Every policy at every budget; a policy that evicts nothing appears once. Raises PolicyError for an unknown policy."""
    if not policies or not budgets:
        raise InputError("nothing to compare: give at least one policy and one budget")
    return [Setting(spec, b) for spec in policies for b in (budgets if make_policy(spec).evicts else budgets[:1])]


def read_prompt(
    model: PreTrainedModel, ids: Sequence[int], policies: Iterable[Policy], task: TaskProfile
) -> tuple[CompactCache, torch.Tensor, float]:
    """Record a prefill that serves all of ``policies``: the full cache, the last token's logits ``[1, V]``, the seconds."""
    info = ModelInfo.of(model)
    prompt = PromptInfo(len(ids), info.layers, len(ids), task)
    record = max((policy.query_span(info, prompt) for policy in policies), default=0)
    begin = time.perf_counter()
    recorded = CompactCache(model, "full", 1, record=max(record, 1))
    logits = prefill(model, torch.tensor([ids], device=model.device), recorded)
    logits.argmax(-1).item()  # wait for the device
    return recorded, logits, time.perf_counter() - begin


def policies_for(asked: Sequence[Setting], model: PreTrainedModel, task: TaskProfile) -> dict[str, Policy]:
    """The policy of every spec. Raises PolicyError and ProfileError for those that cannot serve this model and task."""
    made, info = {one.policy: make_policy(one.policy) for one in asked}, ModelInfo.of(model)
    for policy in made.values():
        policy.check(info, task)
    return made


def replay(
    recorded: CompactCache,
    asked: Sequence[Setting],
    policies: Mapping[str, Policy],
    task: TaskProfile,
    *,
    first: FirstTokens | None = None,
    keep_scores: bool = False,
) -> list[Kept]:
    """What every setting keeps of a recorded prompt; a setting that fails (a budget below its window) holds the reason.

    ``first``: of the prompt's answer, which policies with lookahead or draft read before they evict. Without them such a cache
    still holds the whole prompt, and cannot be decoded together with others.
    """
    kept: list[Kept] = []
    how: dict[str, Any] = {"task": task, "keep_scores": keep_scores}
    for setting in asked:
        try:
            kept.append(begun(setting, recorded.replay(policies[setting.policy], setting.budget, **how), first))
        except WinnowError as error:
            kept.append(Kept(setting, None, str(error)))
    return kept


def begun(setting: Setting, cache: CompactCache, first: FirstTokens | None) -> Kept:
    """What a setting keeps, after the lookahead and the draft of its policy."""
    if first is None or cache.looking is None:
        return Kept(setting, cache)
    begin = first.begin(cache)
    if begin.over:
        return Kept(setting, cache, ended=Answer(None if begin.failed else list(begin.tokens), 0.0, 0, 1))
    return Kept(setting, cache, logits=begin.logits, spoken=begin.tokens)


def batches(kept: Sequence[Kept]) -> Iterator[list[Kept]]:
    """Groups of settings whose caches are of similar length; settings without a cache, or whose answer has ended, are left out.

    Lengths are compared layer by layer: each layer of a batch is padded to its longest row, and policies favour
    different layers.
    """
    with_cache = [
        ([layer.length for layer in one.cache.compact_layers], one)
        for one in kept
        if one.cache is not None and one.ended is None
    ]
    group: list[Kept] = []
    shortest, padded = 0, [0]
    for lengths, one in sorted(with_cache, key=lambda pair: sum(pair[0])):
        wider = [max(pair) for pair in zip(padded, lengths, strict=True)] if group else lengths
        if group and sum(wider) > MAX_PADDING_RATIO * shortest:
            yield group
            group, wider = [], lengths
        if not group:
            shortest = sum(lengths)
        group.append(one)
        padded = wider
    if group:
        yield group


def continue_all(
    model: PreTrainedModel,
    kept: Sequence[Kept],
    logits: torch.Tensor,
    question: Sequence[int],
    limit: int,
    done: Callable[[list[int]], bool],
) -> dict[Setting, Answer]:
    """Greedy answers of all settings of one prompt that have a cache; see :func:`decode_together`."""
    started = [replace(one, logits=logits if one.logits is None else one.logits, question=tuple(question)) for one in kept]
    answers = decode_together(model, started, limit, done)
    return {one.setting: answer for one, answer in zip(kept, answers, strict=True) if answer is not None}


def decode_together(
    model: PreTrainedModel, kept: Sequence[Kept], limit: int, done: Callable[[list[int]], bool]
) -> list[Answer | None]:
    """Greedy answers from all caches, of one prompt or several, similar lengths in one batch; None for a missing cache."""
    found: dict[int, Answer] = {id(one): one.ended for one in kept if one.ended is not None}
    for batch in batches(kept):
        begin = time.perf_counter()
        caches = [one.cache for one in batch if one.cache is not None]
        first = [read_question(model, one) for one in batch]
        rows = greedy_rows(caches, torch.cat(first), limit, done, [one.spoken for one in batch])
        seconds = time.perf_counter() - begin
        steps = max(len(tokens or one.spoken) - len(one.spoken) for tokens, one in zip(rows, batch, strict=True))
        for one, tokens in zip(batch, rows, strict=True):
            found[id(one)] = Answer(tokens, seconds, steps, len(batch))
    return [found.get(id(one)) for one in kept]


def read_question(model: PreTrainedModel, kept: Kept) -> torch.Tensor:
    """The logits ``[1, V]`` that an answer begins from."""
    if not kept.question or kept.cache is None:
        return kept.logits  # type: ignore[return-value]  # callers that decode have set them
    ids = torch.tensor([kept.question], device=model.device)
    return extend(model, kept.cache, ids, kept.cache.report.prompt_tokens, last=1)[:, -1]


def peak_memory() -> int | None:
    """The most memory that this process has held so far, in bytes; on CUDA, what torch allocated there; None on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
