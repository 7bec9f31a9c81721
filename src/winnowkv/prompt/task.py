"""What the prompt asks for: a task profile that policies may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from winnowkv.errors import PolicyError
from winnowkv.files import shown
from winnowkv.prompt.structure import Structure

Task = Literal["localization", "aggregation"]
TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True)
class TaskProfile:
    """The task of one prompt, None if it is not known.

    ``localization`` asks for one place of the text (QA, retrieval), ``aggregation`` for
    the whole of it (summaries, few-shot, code); WindowKV, arXiv 2503.17922. ``probability``
    is the classifier's, 0.5 to 1; None if the task was given. ``structure`` says where in the
    prompt its question and its sentences are, None if it was not read.
    """

    task: Task | None = None
    probability: float | None = None
    structure: Structure | None = None

    @classmethod
    def of(cls, value: TaskProfile | str | None) -> TaskProfile:
        """Read a profile from a task's name. Raises PolicyError for any other name."""
        if isinstance(value, TaskProfile):
            return value
        if value is None:
            return cls(None)
        if value not in TASKS:
            raise PolicyError(f"task {shown(value)} is unknown: it is one of {', '.join(TASKS)}")
        return cls(value)  # type: ignore[arg-type]

    def decided(self, asker: str, sure: float, fallback: Task) -> Task:
        """The task to work with, ``fallback`` if a classifier is not ``sure``. Raises PolicyError if none is known."""
        if self.probability is not None and self.probability < sure:
            return fallback
        if self.task is None:
            raise PolicyError(
                f"{asker} scores by task: give task='localization' (QA, retrieval), task='aggregation' (summaries, "
                f"few-shot, code) or task=wk.task_profile(text), or give compress() the tokenizer="
            )
        return self.task
