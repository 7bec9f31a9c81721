"""The ``compress`` block: every prompt that a model reads inside it gets a compact cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from winnowkv.attention.hooks import Routing, acquire, check_model, release
from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.compression import Compression
from winnowkv.cache.explain import Explanation
from winnowkv.cache.generated import check_decode_budget
from winnowkv.errors import CacheError, InputError
from winnowkv.policies import Policy, Tasks
from winnowkv.prompt.classifier import task_profile
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import Report

CLASSIFIED_TOKENS = 1024  # tokens of a prompt's end that surely hold the 256 words that the classifier reads there


class Run:
    """One ``compress`` block: its settings and the reports of the prompts that went through it."""

    def __init__(self, policy: str | Policy, budget: Budget, task: Tasks, decode_budget: int | None, keep_scores: bool) -> None:
        self.policy = policy
        self.budget = budget
        self.task = task
        self.decode_budget = decode_budget
        self.keep_scores = keep_scores
        self.owner = threading.get_ident()
        self.reports: list[Report] = []
        self._cache: CompactCache | None = None

    @property
    def report(self) -> Report:
        """The report of the latest prompt. Raises CacheError before the first."""
        if not self.reports:
            raise CacheError("nothing was generated in this compress block yet, so there is no report")
        return self.reports[-1]

    def began(self, cache: CompactCache) -> None:
        """A prompt gets this cache. It is held only if its scores are kept, so that they can be asked for."""
        self.reports.append(cache.report)
        self._cache = cache if self.keep_scores else None

    def explain(self, layer: int, token: int, row: int = 0) -> list[Explanation]:
        """:meth:`CompactCache.explain` of the latest prompt. Raises CacheError without ``keep_scores=True``."""
        if not self.keep_scores:
            raise CacheError("explain() needs the importance scores: open the block with keep_scores=True and read a prompt")
        if self._cache is None:
            raise CacheError("explain() needs a prompt, and none was read in this compress block yet: read one first")
        return self._cache.explain(layer, token, row)


@contextmanager
def compress(
    model: PreTrainedModel,
    policy: str | Policy = "winnow",
    budget: Budget | int | float | str = DEFAULT_BUDGET,
    *,
    task: Tasks = None,
    decode_budget: int | None = None,
    keep_scores: bool = False,
    tokenizer: Any = None,
) -> Iterator[Run]:
    """Compress the KV cache of everything the model reads inside the block.

    Each prompt gets a :class:`CompactCache` of its own in place of the model's default
    cache; a cache that the caller passes is left alone. On leaving, also by an exception,
    the model is as it was. Blocks nest (the innermost wins) and threads may each open
    their own on one model; a helper thread that opened none uses the only block there is.

    Parameters
    ----------
    model, policy, budget, task, decode_budget, keep_scores: as for :class:`CompactCache`.
    tokenizer: if the policy scores by task and ``task`` is None, each prompt is read back with it and
        classified (:func:`winnowkv.task_profile`), every row of a batch by itself; if the policy uses the prompt's
        structure, that is read with it, too.

    Yields
    ------
    Run
        Its ``report`` says what the latest prompt kept, in entries, bytes and seconds; its ``explain`` why a token stayed.

    Raises
    ------
    PolicyError, BudgetError, UnsupportedModelError
        Before anything is touched, or when a prompt's length shows that the budget is too small.

    Examples
    --------
    >>> with compress(model, budget=0.12, tokenizer=tokenizer) as run:   # doctest: +SKIP
    ...     out = model.generate(**inputs, max_new_tokens=64)
    >>> print(run.report)                                            # doctest: +SKIP
    """
    run = Run(policy, Budget.of(budget), task, decode_budget, keep_scores)
    check_model(model)
    check_decode_budget(decode_budget)
    classified = tokenizer is not None and task is None
    # Complain now, not in the middle of a forward pass.
    made = Compression.of(model, policy, run.budget, task, task_is_known=not classified).policy
    routing = acquire(model)

    def give_cache(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # In this order: a thread that passes a cache of its own need not have a block.
        if not _wants_cache(module, args, kwargs) or _chosen(routing) is not run:
            return None
        tasks = run.task
        if (classified and made.uses_task) or (tokenizer is not None and made.uses_structure):
            ids = kwargs.get("input_ids", args[0] if args else None)
            tasks = read_tasks(tokenizer, ids, kwargs.get("attention_mask"), run.task, made)
        options: dict[str, Any] = {"decode_budget": run.decode_budget, "keep_scores": run.keep_scores}
        cache = CompactCache(model, run.policy, run.budget, task=tasks, hold=False, **options)
        run.began(cache)
        return args, {**kwargs, "past_key_values": cache}

    def check(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, CompactCache):
            cache.check_used()

    # The inner of two nested blocks registers later and must be asked first.
    hooks = [
        model.register_forward_pre_hook(give_cache, with_kwargs=True, prepend=True),
        model.register_forward_hook(check, with_kwargs=True),
    ]
    routing.runs.append(run)
    try:
        yield run
    finally:
        routing.runs.remove(run)
        for hook in hooks:
            hook.remove()
        release(model)


def read_tasks(tokenizer: Any, ids: Tensor | None, mask: Tensor | None, given: Tasks, policy: Policy) -> list[TaskProfile]:
    """What the policy uses of each row of a prompt: its task, classified if none is given, and its structure."""
    if ids is None:
        raise InputError(
            "a prompt given as embeddings cannot be read back: leave compress() the tokenizer= out, give it the task="
        )
    rows = [row if mask is None else row[mask[i, -row.shape[0] :].bool()] for i, row in enumerate(ids)]
    if given is None and policy.uses_task:
        tasks = [_classify(tokenizer, row) for row in rows]
    else:
        each = [given] if given is None or isinstance(given, TaskProfile | str) else list(given)
        tasks = [TaskProfile.of(task) for task in (each * len(rows) if len(each) == 1 else each)]
    if not policy.uses_structure or len(tasks) != len(rows):  # the cache says what is wrong with their number
        return tasks
    return [replace(task, structure=read_structure(tokenizer, row.tolist())) for task, row in zip(tasks, rows, strict=True)]


def _classify(tokenizer: Any, row: Tensor) -> TaskProfile:
    """The task of one prompt; both ends are all that the classifier reads."""
    ends = row if len(row) <= 2 * CLASSIFIED_TOKENS else torch.cat([row[:CLASSIFIED_TOKENS], row[-CLASSIFIED_TOKENS:]])
    return task_profile(tokenizer.decode(ends, skip_special_tokens=True))


def _chosen(routing: Routing) -> Run | None:
    mine = [run for run in routing.runs if run.owner == threading.get_ident()]
    if mine:
        return mine[-1]
    if len({run.owner for run in routing.runs}) > 1:
        raise CacheError(
            "several threads have compress blocks open on this model and this thread has none: "
            "open one here, or pass past_key_values=CompactCache(...)"
        )
    return routing.runs[-1] if routing.runs else None  # None: the block was closed while a helper thread asked


def _wants_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this forward pass starts a prompt with the framework's default cache."""
    if kwargs.get("use_cache", getattr(model.config, "use_cache", True)) is False:
        return False
    given = kwargs.get("past_key_values")
    return given is None or (type(given) is DynamicCache and given.get_seq_length() == 0)
