"""CompressKV: the semantic retrieval heads choose, and layers that suffer most from eviction keep most."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from winnowkv.errors import PolicyError
from winnowkv.models.calibration import Profile, choose_heads, find_profile
from winnowkv.models.info import Fingerprint
from winnowkv.policies.base import Prompt
from winnowkv.policies.snapkv import SnapKV
from winnowkv.scoring.allocate import uniform, weighted
from winnowkv.scoring.attention import PoolKind, group_members, pool, some_heads_attention
from winnowkv.types import Keys, Queries, Scores


@dataclass(frozen=True, kw_only=True)
class CompressKV(SnapKV):
    """Tokens by the best ``heads_per_layer`` semantic retrieval heads, layers by eviction error (arXiv 2508.02401, 2606.24467).

    ``heads``: ``srh``, ``traditional`` (both from the profile), ``all``, or ``random:k`` (k heads a
    layer, drawn with ``seed``). ``budgets``: ``error`` gives a layer
    ``clip(least + share x rest, least, most x mean)``, or ``uniform``. ``indices``: ``shared`` by all
    KV heads, or ``per-kv-head``, where a KV head hears only the chosen heads of its own group, and
    all chosen ones if it has none. Departure from the repository: what a bound takes away or
    adds is shared by the other layers in proportion, not one entry each in turns.
    """

    name: ClassVar[str] = "compresskv"
    source: ClassVar[str] = "CompressKV, arXiv 2508.02401, 2606.24467"
    scope: ClassVar[str] = "tokens, same for all heads, budgets over layers by measured eviction error"
    by_profile: ClassVar[bool] = True

    observe: int = 8
    kernel: int = 5
    pooling: PoolKind = "avg"
    profile: str | Profile | None = None
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
        if not re.fullmatch(r"srh|traditional|all|random:[1-9]\d*", self.heads):
            raise PolicyError(f"compresskv: heads={self.heads!r} must be srh, traditional, all or random:k")

    def for_model(self, model: Fingerprint) -> CompressKV:
        """The policy with the model's profile read, where heads or budgets need one."""
        count = int(self.heads.partition(":")[2] or self.heads_per_layer)
        if count > model.heads:
            raise PolicyError(f"compresskv: {count} heads a layer are asked for, the model has {model.heads}: lower it")
        needed = self.budgets == "error" or self.heads in ("srh", "traditional")
        return replace(self, profile=find_profile(self.profile, model)) if needed else self

    def ceilings(self, prompt: Prompt) -> list[int]:
        """By the share of each layer in the measured eviction errors, or the same for all."""
        if self.budgets == "uniform":
            return uniform(prompt.layers, prompt.budget)
        errors = self.profile.errors  # type: ignore[union-attr]  # for_model() has read it
        safe = max(min(self.least, prompt.budget), self.sinks + self.observe)
        return list(weighted(errors, prompt.budget, safe, min(int(self.most * prompt.budget), prompt.tokens)))

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Mean over the chosen heads after pooling, ``[1, 1, C]``, or ``[1, Hkv, C]`` for ``per-kv-head``."""
        profile = self.profile if isinstance(self.profile, Profile) else None
        heads = choose_heads(self.heads, profile, layer, self.heads_per_layer, queries.shape[1], self.seed)
        scores = pool(some_heads_attention(queries, keys, scale, heads), self.kernel, self.pooling)
        if self.indices == "shared":
            return scores.mean(1, keepdim=True)
        return group_members(scores, heads, queries.shape[1], keys.shape[1])
