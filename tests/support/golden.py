"""The golden vectors and the authors' published budget rules, for the parity tests (law 9).

The vectors hold what the authors' published code keeps; the functions named ``published_*`` round as
that code rounds, faults included, so that our scores and our selection can be compared with it. They
are test code on purpose: the package itself meets its budget to the entry.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from support.paths import ROOT
from winnowkv.cache.selection import PromptSelection
from winnowkv.models.info import ModelInfo
from winnowkv.policies import BoundPolicy, LayerStates, Policy, PromptInfo
from winnowkv.scoring.allocate import global_top_k
from winnowkv.scoring.spans import window_reduce


def folder() -> Path:
    """Where the vectors lie: ``WINNOW_GOLDEN``, else ``shared/golden`` beside the repository."""
    given = os.environ.get("WINNOW_GOLDEN")
    return Path(given) if given else ROOT.parent / "shared" / "golden"


def missing(method: str) -> str | None:
    """Why a method's vectors cannot be read, in plain words; None if they can."""
    for suffix in (".json", ".safetensors"):
        path = folder() / f"{method}{suffix}"
        if not path.is_file():
            return f"golden vectors not found: {path} (set WINNOW_GOLDEN to the folder that holds them)"
    return None


@functools.cache
def document(method: str) -> dict[str, Any]:
    """A method's JSON; the test is skipped if it is absent."""
    if reason := missing(method):
        pytest.skip(reason)
    return json.loads((folder() / f"{method}.json").read_text(encoding="utf-8"))


@functools.cache
def tensors(method: str) -> dict[str, Tensor]:
    """A method's tensors, by name."""
    from safetensors.torch import load_file

    if reason := missing(method):
        pytest.skip(reason)
    return load_file(folder() / f"{method}.safetensors")


@dataclass(frozen=True)
class Case:
    """One case of a method, with its tensors looked up by what they are."""

    method: str
    params: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.params[key]

    def get(self, key: str) -> Any:
        return self.params.get(key)

    def tensor(self, key: str) -> Tensor:
        """The tensor that the field ``key`` names."""
        return tensors(self.method)[self.params[key]]

    def numbers(self, key: str) -> list[int]:
        """The whole numbers of the tensor that the field ``key`` names."""
        return self.tensor(key).tolist()

    def update(self, what: str, i: int) -> list[int]:
        """DynamicKV: ``counts`` or ``budgets`` of the i-th update."""
        return tensors(self.method)[self.params[f"{what}_updates"][i]].tolist()

    @property
    def context(self) -> int:
        """Tokens before the observation window (WindowKV calls it suffix)."""
        return int(self["n"] - (self.get("suffix") or self["window"]))

    def queries(self, layer: int, window: int) -> Tensor:
        """The last ``window`` queries of a layer, ``[1, H, window, D]``, float32."""
        return self.tensor("q")[layer, None, :, -window:].float()

    def keys(self, layer: int, *, per_query_head: bool = False) -> Tensor:
        """All keys of a layer, ``[1, Hkv, n, D]``, float32; one copy for each query head if asked."""
        keys = self.tensor("k")[layer, None].float()
        return keys.repeat_interleave(self["num_heads"] // self["num_kv_heads"], dim=1) if per_query_head else keys

    @property
    def scale(self) -> float:
        return float(self["head_dim"]) ** -0.5

    @property
    def model(self) -> ModelInfo:
        """The vectors' model."""
        return ModelInfo("Golden", self["num_layers"], self["num_heads"], self["num_kv_heads"], "")

    def prompt(self, budget: int) -> PromptInfo:
        """The vectors' prompt with a budget, which is the prompt's length at most."""
        return PromptInfo(tokens=self["n"], layers=self["num_layers"], budget=min(budget, self["n"]))

    def bind(self, policy: Policy, budget: int) -> BoundPolicy:
        """The policy for the vectors' prompt."""
        return policy.bind(self.model, self.prompt(budget))

    def states(self, bound: BoundPolicy, layer: int, *, per_query_head: bool = False) -> LayerStates:
        """What the policy sees of a layer; no policy of the vectors reads values."""
        keys, window = self.keys(layer, per_query_head=per_query_head), bound.policy.observation_window(bound.prompt)
        return LayerStates(layer, self.queries(layer, window), keys, keys, self.scale)

    def scores(self, policy: Policy, layer: int) -> Tensor:
        """The policy's scores for a layer; a head of its own for every query head if the vectors have one."""
        expanded = self.get("granularity") == "query_head" or self.method == "dynamickv"
        bound = self.bind(policy, self["n"])  # what is scored does not depend on the budget
        return bound.parts.scorer.score(self.states(bound, layer, per_query_head=expanded))

    def select(self, policy: Policy, layer: int, scores: Tensor, entries: int) -> Tensor:
        """What the policy keeps of a layer by these scores."""
        return self.bind(policy, self["n"]).parts.selector.select(layer, scores, entries)

    def run(self, policy: Policy, budget: int, *, per_query_head: bool = False) -> PromptSelection:
        """The case through the package's own prefill, layer by layer."""
        selection = PromptSelection(self.bind(policy, budget))
        for layer in range(self["num_layers"]):
            selection.observe(self.states(selection.bound, layer, per_query_head=per_query_head))
        return selection


def cases(method: str, keep: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: every case, or one that is skipped if the vectors are absent."""
    if reason := missing(method):
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]
    found = [Case(method, params) for params in document(method)["cases"]]
    return [pytest.param(case, id=case["name"]) for case in found if keep(case)]


def named(method: str, name: str) -> Case:
    """The case whose name ends so; the test is skipped if the vectors are absent."""
    (params,) = [params for params in document(method)["cases"] if params["name"].endswith(name)]
    return Case(method, params)


def positions(row: Tensor) -> list[int]:
    """A row of positions without its padding (-1)."""
    return [p for p in row.flatten().tolist() if p >= 0]


def heads(kept: Tensor | None, tokens: int, count: int) -> list[list[int]]:
    """What our code keeps, as one list for each of ``count`` heads: None is everything, one head serves all."""
    if kept is None:
        return [list(range(tokens))] * count
    rows = kept[0].tolist()
    return rows * count if len(rows) == 1 else rows


def same(ours: list[int], theirs: list[int], may: list[int] | None = None) -> None:
    """The rules of the vectors' README: equal sizes, equal as sets, ties at the boundary (``may``) left out."""
    assert len(set(ours)) == len(ours), "our positions repeat"
    assert ours == sorted(ours), "our positions are not in the prompt's order"
    assert len(ours) == len(theirs)
    tied = set(may or [])
    assert set(ours) - tied == set(theirs) - tied


# --- the authors' rounding -----------------------------------------------------------------------------------------


def published_windowkv_budgets(layers: int, capacity: int, beta: int, shared: int) -> list[int]:
    """WindowKV: context tokens for each layer. Too short if ``layers % shared`` is not 0 (fault W5).

    The group size bends the pyramid, every step is floored, the last group is pinned (so the sum drifts).
    """
    groups = layers // shared
    last = capacity * shared // beta
    first = 2 * capacity - last
    step = (first - last) // (groups - 1)  # W5: one single group divides by zero
    falling = [first - step * i for i in range(groups - 1)] + [last]
    return [b for b in falling for _ in range(shared)]


def published_windowkv_windows(context: int, budget: int, width: int = 8) -> int:
    """WindowKV: whole windows that stay; what leaves is counted in tokens, then rounded up to windows (fault W2)."""
    if context <= budget:
        return -(-context // width)
    dropped = -(-(context - budget) // width)
    return 0 if dropped * width >= context else -(-context // width) - dropped


def published_windowkv_entries(scores: Tensor, budget: int, width: int, top: int) -> int:
    """WindowKV: tokens in the windows that stay, by our window scores. The last window may be a short one."""
    context = scores.shape[-1]
    order = window_reduce(scores, width, top).mean(1)[0].sort(descending=True, stable=True).indices
    best = order[: published_windowkv_windows(context, budget, width)].tolist()
    return sum(min(width, context - width * window) for window in best)


def published_pyramidkv_budgets(layers: int, tokens: int, capacity: int, window: int, beta: int) -> list[int]:
    """PyramidKV: context tokens for each layer; all of the prompt if nothing is compressed.

    Fault P1: the floored step loses or gains slots, and a short prompt falls back to equal budgets.
    """
    mean = capacity - window
    if tokens < capacity:
        return [tokens] * layers
    if tokens < 2 * mean:
        return [mean] * layers
    last = mean // beta
    first = 2 * mean - last
    if first >= tokens - window:
        first = tokens - window
        last = 2 * mean - first
    step = (first - last) // (layers - 1)
    return [first - step * i for i in range(layers)]


@dataclass(frozen=True)
class PublishedUpdate:
    """DynamicKV: one update, hits and budgets of the layers seen so far."""

    counts: list[int]
    budgets: list[int]


def published_dynamickv_updates(case: Case, scores: list[Tensor]) -> list[PublishedUpdate]:
    """DynamicKV: what every update gives the layers seen so far, driven by our own global top-k.

    The authors' faults are kept: D3 (the whole model's total at every update, none for the layers after the
    last multiple of four), D4 (a layer keeps what it has, slots above that are lost: the budgets here are not
    yet clipped) and D5 (every remainder goes to the last entry).
    """
    base, layers, context, query_heads = case["base"], case["num_layers"], case.context, case["num_heads"]
    buffer = min(int(case["radio_max"] * base), context)
    updates = []
    for seen in range(case["update_every"], layers + 1, case["update_every"]):
        counts = global_top_k(scores[:seen], base * query_heads * seen)
        hits = [count // seen for count in counts]
        if seen == layers and sum(hits) != query_heads * context:
            hits[-1] += base * query_heads - sum(hits)
        budgets = [buffer * hit // sum(hits) for hit in hits]
        ratio = Fraction(sum(budgets), base * layers)
        budgets = [int(b / ratio) for b in budgets]
        budgets[-1] += base * layers - sum(budgets)
        updates.append(PublishedUpdate(counts, budgets))
    return updates
