"""What is compared: settings, each a policy and a budget; one recorded prefill serves them all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from winnowkv.budget import Asked, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.reading import extend, prefill
from winnowkv.engine.step import greedy_rows
from winnowkv.errors import InputError, WinnowError
from winnowkv.models.info import Fingerprint
from winnowkv.policies import Policy, policy as make_policy
from winnowkv.prompt.task import TaskProfile

PADDED = 3.0  # a batch holds at most so many times its shortest cache's entries a row; a step costs little more for them


@dataclass(frozen=True, eq=False)
class Setting:
    """A policy spec and a budget, as they were asked."""

    policy: str
    budget: Asked

    @property
    def key(self) -> tuple[str, str, Asked]:
        """What tells two settings apart: 1 entry and the fraction 1.0 are two budgets."""
        return self.policy, *Budget(self.budget).key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setting) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a setting kept of one prompt: its cache, or why it has none; and what its answer begins from.

    ``logits`` ``[1, V]`` are the prompt's last; ``question`` is what is read into the compressed cache before
    the answer, empty where it was part of the prompt.
    """

    setting: Setting
    cache: CompactCache | None
    failed: str | None = None
    logits: torch.Tensor | None = None
    question: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, None where a logit was not a number; seconds and steps are those of the batch it was in."""

    tokens: list[int] | None
    seconds: float
    steps: int
    batch: int


def settings(policies: Sequence[str], budgets: Sequence[Asked]) -> list[Setting]:
    """Every policy at every budget; a policy that evicts nothing once. Raises PolicyError for an unknown policy."""
    if not policies or not budgets:
        raise InputError("nothing to compare: give at least one policy and one budget")
    return [Setting(spec, b) for spec in policies for b in (budgets if make_policy(spec).evicts else budgets[:1])]


def read_prompt(
    model: PreTrainedModel, ids: Sequence[int], made: Mapping[str, Policy]
) -> tuple[CompactCache, torch.Tensor, float]:
    """A recorded prefill that serves all of ``made``: its full cache, the last token's logits ``[1, V]``, its seconds."""
    record = max((policy.reads(len(ids)) for policy in made.values()), default=0)
    begin = time.perf_counter()
    recorded = CompactCache(model, "full", 1, record=max(record, 1))
    logits = prefill(model, torch.tensor([ids], device=model.device), recorded)
    logits.argmax(-1).item()  # wait for the device
    return recorded, logits, time.perf_counter() - begin


def policies_for(asked: Sequence[Setting], model: PreTrainedModel, task: TaskProfile) -> dict[str, Policy]:
    """Every spec's policy with model and task decided."""
    fingerprint = Fingerprint.of(model)
    return {s.policy: make_policy(s.policy).for_model(fingerprint).for_task(task) for s in asked}


def replay(recorded: CompactCache, asked: Sequence[Setting], made: Mapping[str, Policy]) -> list[Kept]:
    """What every setting keeps of a recorded prompt; a setting that cannot (a budget below its window) says why."""
    kept = []
    for setting in asked:
        try:
            kept.append(Kept(setting, recorded.replay(made[setting.policy], setting.budget)))
        except WinnowError as error:
            kept.append(Kept(setting, None, str(error)))
    return kept


def batches(kept: Sequence[Kept]) -> Iterator[list[Kept]]:
    """Settings whose caches are of similar length, together; those without a cache are left out.

    Every layer of a batch is padded to its longest row, and policies favour different layers.
    """
    alive = [([layer.length for layer in one.cache.compact_layers], one) for one in kept if one.cache is not None]
    group: list[Kept] = []
    shortest, padded = 0, [0]
    for lengths, one in sorted(alive, key=lambda pair: sum(pair[0])):
        wider = [max(pair) for pair in zip(padded, lengths, strict=True)] if group else lengths
        if group and sum(wider) > PADDED * shortest:
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
    """Greedy answers of every setting of one prompt that has a cache; see :func:`decode_together`."""
    started = [replace(one, logits=logits, question=tuple(question)) for one in kept]
    answers = decode_together(model, started, limit, done)
    return {one.setting: answer for one, answer in zip(kept, answers, strict=True) if answer is not None}


def decode_together(
    model: PreTrainedModel, kept: Sequence[Kept], limit: int, done: Callable[[list[int]], bool]
) -> list[Answer | None]:
    """Greedy answers from every cache, of one prompt or of several, similar ones in one batch; None where there is no cache."""
    found: dict[int, Answer] = {}
    for batch in batches(kept):
        begin = time.perf_counter()
        caches = [one.cache for one in batch if one.cache is not None]
        first = [read_question(model, one) for one in batch]
        rows = greedy_rows(caches, torch.cat(first), limit, done)
        seconds, steps = time.perf_counter() - begin, max(len(tokens or ()) for tokens in rows)
        for one, tokens in zip(batch, rows, strict=True):
            found[id(one)] = Answer(tokens, seconds, steps, len(batch))
    return [found.get(id(one)) for one in kept]


def read_question(model: PreTrainedModel, kept: Kept) -> torch.Tensor:
    """The logits ``[1, V]`` that an answer begins from."""
    if not kept.question or kept.cache is None:
        return kept.logits  # type: ignore[return-value]  # whoever decodes has given them
    ids = torch.tensor([kept.question], device=model.device)
    return extend(model, kept.cache, ids, kept.cache.report.prompt_tokens, last=1)[:, -1]


def peak_memory() -> int | None:
    """The most memory that this process has held so far, in bytes; on CUDA what torch allocated there; None on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
