"""What prompts are compressed by: policy, budget and task of a cache or of a compress block, checked once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from winnowkv.attention.projection import output_projections
from winnowkv.budget import Budget
from winnowkv.cache.auto import AutoSelection
from winnowkv.cache.quantized import quanto
from winnowkv.cache.selection import PromptSelection
from winnowkv.errors import InputError, PolicyError, WinnowError
from winnowkv.models.calibration import find_profile
from winnowkv.models.curve import Curve
from winnowkv.models.head_group import ALL_HEADS, HeadGroup
from winnowkv.models.info import ModelInfo
from winnowkv.policies import Policy, PromptInfo, Tasks, policy as make_policy
from winnowkv.policies.chunk_eviction import ExpectedSpans
from winnowkv.policies.parts import ChunkEviction
from winnowkv.policies.protected import read_spans
from winnowkv.policies.quality import with_quality
from winnowkv.prompt.task import TaskProfile
from winnowkv.types import Spans


@contextmanager
def naming_row(row: int, rows: int) -> Iterator[None]:
    """An error that one prompt of a batch causes says which one it is; rows count from 0."""
    try:
        yield
    except WinnowError as error:
        if rows == 1:
            raise
        raise type(error)(f"row {row} of a batch of {rows}: {error}") from error


@dataclass(frozen=True)
class Compression:
    """Policy, budget and tasks for prompts of one model.

    Attributes
    ----------
    asked: the policy as it was asked for, as text.
    tasks: of all prompts, or one for each row of a batch.
    curve: what ``auto`` expects of the policy; None for a budget in numbers.
    keep_scores: whether importance scores are kept once a prompt is read.
    heads: the processes that share the model's heads.
    keep: spans of every prompt that stay whatever they score.
    hint: tokens at a prompt's end by which the policy chooses, and which are taken back then; the budget is without them.
    study: whether the prompt is held whole until it was studied (cache/study.py).
    """

    asked: str
    policy: Policy
    model: ModelInfo
    budget: Budget
    tasks: tuple[TaskProfile, ...]
    curve: Curve | None = None
    keep_scores: bool = False
    heads: HeadGroup = ALL_HEADS
    keep: Spans = ()
    hint: int = 0
    study: bool = False

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        policy: str | Policy,
        budget: Budget | int | float | str,
        task: Tasks = None,
        *,
        task_is_known: bool = True,
        keep_scores: bool = False,
        keep: Sequence[tuple[int, int]] = (),
        quality: str | None = None,
    ) -> Compression:
        """Check everything that can be checked before a prompt is there.

        ``task_is_known`` is False if the prompts' tasks will be classified later. ``quality`` gives the policy the options of
        a level (:func:`~winnowkv.policies.quality.with_quality`).
        Raises PolicyError, BudgetError, ProfileError, InputError and UnsupportedModelError.
        """
        policy = with_quality(policy, quality)
        made, info, heads = make_policy(policy), ModelInfo.of(model), HeadGroup.of(model)
        rows = [task] if task is None or isinstance(task, TaskProfile | str) else list(task)
        tasks = tuple(TaskProfile.of(row) for row in rows)
        for each in tasks if task_is_known else (None,):
            made.check(info, each)
        if made.quantize is not None:
            quanto()  # complain now, and load it before the clock runs
        if made.needs_projection:
            output_projections(model)
        read, curve = Budget.of(budget), None
        if read.target is not None and made.evicts:
            curve = find_profile(read.profile, info).curve(made.name)
        asked = policy if isinstance(policy, str) else made.spec
        return cls(asked, made, info, read, tasks, curve, keep_scores, heads, read_spans(keep))

    @property
    def waits(self) -> bool:
        """Whether the whole prompt is held until more is known than the prompt."""
        return self.study or self.policy.looks

    def check_study(self) -> None:
        """Raise PolicyError for a policy that scores by a study of the text alone, where there is none."""
        if self.policy.needs_study and not self.study:
            raise PolicyError(
                f"{self.policy.name}: scores tokens while the model reads the text again, which wk.read(model, tokenizer, "
                f"text, {self.policy.name!r}) does for texts that are asked later: read it so, or name another policy"
            )

    def each_task(self, rows: int) -> Sequence[TaskProfile]:
        """The task of each row of a batch. Raises InputError if they are not as many."""
        if len(self.tasks) not in (1, rows):
            raise InputError(f"{len(self.tasks)} tasks for a batch of {rows} prompts: give one for each, or one")
        return self.tasks if len(self.tasks) > 1 else self.tasks * rows

    def prompt(self, tokens: int, layers: int, task: TaskProfile) -> PromptInfo:
        """What the policy knows of a prompt of so many tokens, of which so many layers are compressed."""
        return self.policy.prompt_info(self.budget, tokens, layers, task, keep=self.keep, hint=self.hint)

    def chunk_eviction(self) -> ChunkEviction:
        """What goes between the chunks of a long prompt: the policy's own rule, or the default."""
        return self.policy.chunk_eviction(self.model) or ExpectedSpans(self.model)

    def selection(self, prompt: PromptInfo) -> PromptSelection | AutoSelection:
        """The way of one prompt. Raises BudgetError if its budget is below what always stays."""
        if self.curve is None or self.budget.target is None:
            return PromptSelection(self.policy.bind(self.model, prompt), keep_scores=self.keep_scores)
        return AutoSelection(self.policy, self.model, prompt, self.curve, self.budget.target)
