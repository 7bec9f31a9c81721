"""CompressKV: the semantic retrieval heads choose, and layers that suffer most from eviction keep most."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from winnowkv.errors import PolicyError
from winnowkv.files import shown
from winnowkv.models.calibration import CalibrationProfile, choose_heads, find_profile
from winnowkv.models.info import ModelInfo
from winnowkv.policies.observation import WindowScorer
from winnowkv.policies.parts import Allocator, LayerStates, PromptInfo, Scorer
from winnowkv.policies.snapkv import SnapKV
from winnowkv.prompt.task import TaskProfile
from winnowkv.scoring.allocate import weighted
from winnowkv.scoring.attention import PoolKind, group_members, pool, some_heads_attention
from winnowkv.types import Scores


@dataclass(frozen=True, kw_only=True)
class CompressKV(SnapKV):
    """Tokens by the best semantic retrieval heads, layers by eviction error (arXiv 2508.02401, 2606.24467).

    A calibration profile says which heads of a layer retrieve, and what eviction costs each layer.

    Formula
    -------
    ``score[i] = mean over the chosen heads(pool(sum over q of A[q, i]))``. ``entries of a layer = clip(least + share * rest,
    least, most * mean)``, in which ``share`` is the layer's part of the measured eviction errors, ``rest`` what ``least``
    leaves of the budget of all layers together, and ``mean`` the budget. Recent tokens are counted in all of these, and no
    layer keeps less than sinks and recent tokens.

    Parameters
    ----------
    kernel: neighbouring tokens whose scores are pooled, odd; 1 pools nothing.
    pooling: ``avg`` or ``max`` over them.
    group_by: of SnapKV, from which this derives; the chosen heads vote instead.
    profile: a calibration profile, its file or a folder of profiles; None: one that ships with the package.
    heads: who votes: ``srh``, ``traditional`` (both from the profile), ``all``, or ``random:k`` (k heads a layer).
    heads_per_layer: how many of them in each layer.
    budgets: ``error``: layers by eviction error; ``uniform``: all the same.
    indices: ``shared`` by all KV heads, or ``per-kv-head``, where a KV head is scored by the chosen heads of its own group
        only, and by all chosen ones if it has none.
    least: entries that every layer keeps.
    most: the most that a layer keeps, in means.
    seed: of ``heads=random:k``.

    Departures
    ----------
    From the repository: what a bound takes away or adds is shared by the other layers in proportion, not one entry each in
    turns. The question looks where it is known, not the last 8 tokens (``preset=paper``).
    """

    name: ClassVar[str] = "compresskv"
    source: ClassVar[str] = "CompressKV, arXiv 2508.02401, 2606.24467"
    scope: ClassVar[str] = "tokens, same for all heads, budgets over layers by measured eviction error"
    purpose: ClassVar[str] = "one fact in a long text, with a profile; all heads keep alike"
    needs_profile: ClassVar[bool] = True

    published: ClassVar[int] = 8

    kernel: int = 5
    pooling: PoolKind = "avg"
    profile: str | CalibrationProfile | None = None
    heads: str = "srh"
    heads_per_layer: int = 4
    budgets: Literal["error", "uniform"] = "error"
    indices: Literal["shared", "per-kv-head"] = "shared"
    least: int = 32
    most: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("heads_per_layer", minimum=1)
        self.require("least", minimum=0)
        self.require("most", minimum=1)
        if not re.fullmatch(r"srh|traditional|all|random:[1-9]\d{0,8}", self.heads):
            raise PolicyError(f"compresskv: heads={shown(self.heads)} must be srh, traditional, all or random:k")

    @property
    def keeps_equal(self) -> bool:  # type: ignore[override]
        """With ``budgets=uniform``."""
        return self.budgets == "uniform"

    def check(self, model: ModelInfo, task: TaskProfile | None) -> None:
        """Raise PolicyError for more heads than the model has, ProfileError if a profile is needed and missing."""
        count = int(self.heads.partition(":")[2] or self.heads_per_layer)
        if count > model.heads:
            raise PolicyError(f"compresskv: {count} heads a layer are asked for, the model has {model.heads}: lower it")
        self.read_profile(model)

    def read_profile(self, model: ModelInfo) -> CalibrationProfile | None:
        """The model's profile, if heads or budgets need one."""
        needed = self.budgets == "error" or self.heads in ("srh", "traditional")
        return find_profile(self.profile, model) if needed else None

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By the chosen heads."""
        window, profile = self.observed(prompt), self.read_profile(model)
        return ChosenHeadsScorer(prompt.tokens, window.size, tail=window.tail, options=self, profile=profile)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """By the layers' eviction errors, or the same for all."""
        profile = self.read_profile(model)
        if self.budgets == "uniform" or profile is None:
            return Allocator(prompt)
        always = self.sinks + self.observed(prompt).recent
        return ErrorAllocator(prompt, always=always, options=self, errors=profile.errors)


@dataclass(frozen=True, kw_only=True)
class ChosenHeadsScorer(WindowScorer):
    """Attention of a few query heads of each layer."""

    options: CompressKV
    profile: CalibrationProfile | None
    shares_heads: ClassVar[bool] = True

    def score(self, states: LayerStates) -> Scores:
        """Mean over the chosen heads after pooling, ``[1, 1, C]``, or ``[1, Hkv, C]`` for ``per-kv-head``."""
        states = self.seen(states)
        asked, group = self.options, states.queries.shape[1] // states.kv_heads
        kv_heads = states.kv_heads * states.heads.size
        heads = choose_heads(asked.heads, self.profile, states.layer, asked.heads_per_layer, kv_heads * group, asked.seed)
        attention = some_heads_attention(states.queries, states.keys, states.scale, heads, states.heads)
        scores = pool(attention, asked.kernel, asked.pooling)
        if asked.indices == "shared":
            return scores.mean(1, keepdim=True)
        return group_members(scores, heads, kv_heads * group, kv_heads)


@dataclass(frozen=True, kw_only=True)
class ErrorAllocator(Allocator):
    """Layers by their share in the measured eviction ``errors``, none below what it ``always`` keeps."""

    always: int
    options: CompressKV
    errors: tuple[float, ...]

    def prefill_limits(self) -> list[int]:
        """``least`` entries each, the rest by error, none above ``most`` times the mean."""
        asked, prompt = self.options, self.prompt
        safe = max(min(asked.least, prompt.budget), self.always)
        return list(weighted(self.errors, prompt.budget, safe, min(int(asked.most * prompt.budget), prompt.tokens)))
