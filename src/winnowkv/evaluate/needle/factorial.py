"""Ablations: every combination of a policy's design choices, and the mean accuracy of each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import mean
from typing import Any

# Policy -> factor -> levels. An empty level leaves the option out, so that the preset decides it.
FACTORS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "compresskv": {
        "heads": ("srh", "traditional", "all", "random:4"),
        "budgets": ("error", "uniform"),
        "indices": ("shared", "per-kv-head"),
    },
    "windowkv": {
        "preset": ("paper", "repo"),
        "task": ("localization", "aggregation"),
        "window": ("", "1"),
        "group": ("6", "1"),
    },
}


def specs(policy: str) -> list[str]:
    """Every combination of a policy's factors, as policy specs."""
    factors = FACTORS[policy]
    combinations = product(*([(name, level) for level in levels] for name, levels in factors.items()))
    return [":".join([policy, *(f"{name}={level}" for name, level in chosen if level)]) for chosen in combinations]


def all_specs() -> list[str]:
    """Specs of the full cache and of every combination of every policy that has factors."""
    return ["full", *(spec for policy in FACTORS for spec in specs(policy))]


def effects(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy at each level of each factor, over all levels of the others; one row for each budget and length.

    ``groups`` are those of a needle summary; options other than the factors (a profile) are ignored.
    """
    rows = []
    settings = list(dict.fromkeys((type(g["budget"]), g["budget"], g["length"]) for g in groups))
    for policy, factors in FACTORS.items():
        mine = [g for g in groups if g["policy"].split(":")[0] == policy]
        for name, levels in factors.items():
            for kind, budget, length in settings:
                means = {level or "preset's": _mean(mine, f"{name}={level}" if level else "", name, (kind, budget, length))
                         for level in levels}  # fmt: skip
                if all(value is not None for value in means.values()):
                    rows.append({"policy": policy, "factor": name, "budget": budget, "length": length, "accuracy": means})
    return rows


def _mean(groups: Sequence[dict[str, Any]], level: str, factor: str, setting: tuple[type, float, int]) -> float | None:
    found = []
    for group in groups:
        spec = f"{group['policy']}:"
        has = f":{level}:" in spec if level else f":{factor}=" not in spec
        if has and (type(group["budget"]), group["budget"], group["length"]) == setting:
            found.append(group["accuracy"])
    return mean(found) if found else None
