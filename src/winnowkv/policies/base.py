"""What an eviction policy is: a frozen dataclass of options with a few pure hooks.

The way of one request: :meth:`Policy.ceilings` says what a layer may hold while
prefill runs; after each layer :meth:`Policy.score` reads the wanted queries and
:meth:`Policy.revise` may lower the limits of the layers seen so far; after the last
layer :meth:`Policy.allocate` says what every layer ends with. Each time a layer's
limit falls, :meth:`Policy.select` names the entries that stay. Everything a hook
needs is an argument; a policy holds options and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from winnowkv.errors import BudgetError, PolicyError
from winnowkv.models.info import Fingerprint
from winnowkv.prompt.task import TaskProfile
from winnowkv.scoring.allocate import uniform
from winnowkv.scoring.select import top_tokens, with_recent, with_sinks
from winnowkv.types import BITS, Entries, HeadScores, Indices, Keys, Quantization, Queries, Scores

GIVEN = {"given": True}  # metadata of a field that for_model() or for_task() fills in, and no user


def options(kind: type[Policy]) -> list[str]:
    """What a user may ask of a policy, by name."""
    return [each.name for each in fields(kind) if not each.metadata.get("given")]


@dataclass(frozen=True)
class Prompt:
    """What a policy knows of one request.

    Attributes
    ----------
    tokens: prompt tokens ``S``, padding not counted.
    layers: layers whose cache may be compressed (full-attention layers).
    budget: entries per layer and KV head, mean over layers; at most ``tokens``.
    """

    tokens: int
    layers: int
    budget: int

    @property
    def total(self) -> int:
        """Entries per KV head over all layers."""
        return self.budget * self.layers


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all eviction policies.

    Parameters
    ----------
    sinks: first tokens that always stay.
    observe: observation window ``W``, the last prompt tokens; they always stay.
    quantize: ``int8`` or ``int4`` stores the entries that stay in 8 or 4 bits once the prompt is read.

    Class attributes
    ----------------
    evicts: False for what keeps everything.
    by_task, by_profile: whether :meth:`for_task` makes use of a task, :meth:`for_model` needs a calibration profile.
    by_layout: whether :meth:`for_task` makes use of the prompt's layout.
    per_head: whether heads of a layer may keep different numbers of entries; a layer is then held at its longest head.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    scope: ClassVar[str]
    evicts: ClassVar[bool] = True
    by_task: ClassVar[bool] = False
    by_profile: ClassVar[bool] = False
    by_layout: ClassVar[bool] = False
    per_head: ClassVar[bool] = False

    sinks: int = 0
    observe: int = 0
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        self.require("sinks", minimum=0)
        self.require("observe", minimum=0)
        if self.quantize not in (None, *BITS):
            raise PolicyError(f"{self.name}: quantize={self.quantize!r} must be one of {', '.join(BITS)}")

    def require(self, option: str, *, minimum: float, maximum: float = math.inf, odd: bool = False) -> None:
        """Raise PolicyError where an option lies outside its bounds, is not finite or is not odd."""
        value = getattr(self, option)
        if value is not None and not math.isfinite(value):
            raise PolicyError(f"{self.name}: {option}={value} must be a finite number")
        if value is not None and value < minimum:
            raise PolicyError(f"{self.name}: {option}={value} is too small, it must be at least {minimum}")
        if value is not None and value > maximum:
            raise PolicyError(f"{self.name}: {option}={value} is too large, it must be at most {maximum}")
        if value is not None and odd and value % 2 == 0:
            raise PolicyError(f"{self.name}: {option}={value} must be odd")

    def for_task(self, profile: TaskProfile) -> Policy:
        """The policy with everything that hangs on the task decided. Most policies do not care."""
        return self

    def for_model(self, model: Fingerprint) -> Policy:
        """The policy with everything that hangs on the model decided; a second call changes nothing.

        Raises ProfileError where the policy needs a calibration profile and there is none of this model.
        """
        return self

    def reads(self, tokens: int) -> int:
        """How far back the queries lie that :meth:`score` and :meth:`hear` want to see; the observation window for most."""
        return self.observe

    def wanted(self, tokens: int) -> Tensor:
        """Ascending prompt positions of these queries; all the last ones that :meth:`reads` says, where nobody says less."""
        return torch.arange(max(tokens - self.reads(tokens), 0), tokens)

    @property
    def hint(self) -> str | None:
        """One line for the report on what would make the policy better; None where there is nothing to say."""
        return None

    def peak_entries(self, prompt: Prompt) -> int:
        """Entries per KV head over all layers that are never passed while a prompt is read; all, where nobody says less."""
        return prompt.layers * prompt.tokens

    def minimum_budget(self) -> int:
        """The smallest budget that leaves room for sinks and recent window."""
        return max(self.sinks + self.observe, 1)

    def check(self, prompt: Prompt) -> None:
        """Raise BudgetError where the prompt's budget cannot hold sinks and recent window."""
        if prompt.budget < self.minimum_budget():
            raise BudgetError(
                f"{self.name}: a budget of {prompt.budget} entries (prompt of {prompt.tokens} tokens) is below "
                f"sinks + window = {self.sinks} + {self.observe}: keep at least {self.minimum_budget()} entries, "
                f"or make the window smaller (observe=)"
            )

    def leader(self, layer: int) -> int:
        """The layer whose scores this layer uses; itself where nothing is shared."""
        return layer

    def ceilings(self, prompt: Prompt) -> Sequence[Entries]:
        """Entries each layer may hold while prefill runs; for one-shot policies what it ends with."""
        return uniform(prompt.layers, prompt.budget)

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Importance of each context token of one request, ``[1, H, C]``, from the queries at :meth:`wanted`."""
        raise TypeError(f"{type(self).__name__} does not define score()")

    def hear(self, layer: int, queries: Queries, keys: Keys, scale: float) -> HeadScores | None:
        """What this layer has to say on the tokens that all layers keep, ``[1, n, C]``; None where nothing is shared."""
        return None

    def shared(self, heard: Sequence[HeadScores], prompt: Prompt, earlier: Indices | None) -> Indices | None:
        """Context positions that win in every layer seen so far, ``[1, 1, n]``, from what these layers had to say.

        ``earlier`` is what was shared before, and what came after is a part of it; None where everything was.
        """
        return None

    def revise(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> Sequence[Entries]:
        """New limits for the layers seen so far, never above what they hold. One-shot policies change nothing."""
        return list(held)

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> Sequence[Entries]:
        """What every layer ends with; the sum is ``prompt.total``. One-shot policies are there already."""
        return list(held)

    def select(self, layer: int, scores: Scores, entries: Entries, prompt: Prompt) -> Indices:
        """Positions that stay, ``[1, H, n]``, sinks and recent window included.

        ``entries`` for each head of ``scores``; a policy with budgets per head splits ``entries``
        times the number of heads between them and pads the shorter ones in front with -1.
        """
        context = top_tokens(with_sinks(scores, self.sinks), int(entries) - self.observe)
        return with_recent(context, prompt.tokens, self.observe)
