"""Allocators: how many entries each layer or head gets of a budget. Pure functions; whole numbers whose sum is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch

from winnowkv.errors import BudgetError
from winnowkv.types import Scores


def apportion(
    weights: Sequence[float | Fraction], total: int, caps: Sequence[int], floors: Sequence[int] | None = None
) -> list[int]:
    """Split ``total`` in proportion to ``weights``: exact sum, ``floors <= share <= caps``.

    Shares that would pass their cap (or fall below their floor) are fixed there and
    the others fill up in proportion (water-filling); what is left after rounding down
    goes to the largest remainders, ties to the earlier layer. Weights that are all
    zero count as equal.

    Raises
    ------
    BudgetError
        When ``total`` lies below the sum of floors or above the sum of caps.
    """
    count = len(weights)
    low = list(floors) if floors is not None else [0] * count
    if not sum(low) <= total <= sum(caps) or any(f > c for f, c in zip(low, caps, strict=True)):
        raise BudgetError(f"cannot split {total} entries between floors {low} and caps {list(caps)}")
    # Whole numbers in the weights' proportion: as exact as fractions, and ten times faster.
    exact = [Fraction(w) for w in weights]
    scale = math.lcm(*(w.denominator for w in exact))
    parts = [w.numerator * (scale // w.denominator) for w in exact]
    share: list[int | None] = [None] * count
    while free := [i for i in range(count) if share[i] is None]:
        left = total - sum(s for s in share if s is not None)
        if not any(parts[i] for i in free):
            parts = [1] * count
        mass = sum(parts[i] for i in free)
        quota = {i: left * parts[i] for i in free}  # times ``mass``, as what it is compared with
        over = [i for i in free if quota[i] > caps[i] * mass]
        under = [i for i in free if quota[i] < low[i] * mass]
        # Fix one side only, the one that moves more entries: the other may be right after it.
        spill = sum(quota[i] - caps[i] * mass for i in over)
        lack = sum(low[i] * mass - quota[i] for i in under)
        if over and spill >= lack:
            for i in over:
                share[i] = caps[i]
        elif under:
            for i in under:
                share[i] = low[i]
        else:
            for i in free:
                share[i] = quota[i] // mass
            rest = left - sum(quota[i] // mass for i in free)
            # A share with a remainder is below its cap, so adding one entry never passes it.
            for i in sorted(free, key=lambda i: (-(quota[i] % mass), i))[:rest]:
                share[i] = quota[i] // mass + 1
    return [s for s in share if s is not None]


@lru_cache(maxsize=64)  # every layer of a prompt may ask for the same split again
def weighted(weights: tuple[float, ...], mean: int, safe: int, cap: int) -> tuple[int, ...]:
    """``safe`` entries each, the rest by weight, none above ``cap``; the sum is ``mean`` times their number.

    Ada-KV (arXiv 2407.11550) and HeadKV (arXiv 2410.19258) split so over heads, CompressKV (arXiv 2508.02401) over layers.
    """
    more = apportion(weights, len(weights) * (mean - safe), [cap - safe] * len(weights))
    return tuple(safe + count for count in more)


def uniform(layers: int, mean: int) -> list[int]:
    """Every layer the same."""
    return [mean] * layers


def pyramid(layers: int, mean: int, slope: float, cap: int, floor: int = 0) -> list[int]:
    """Linearly falling budgets from ``2 * mean - mean / slope`` to ``mean / slope`` (PyramidKV, arXiv 2406.02069).

    The published code floors every step and so loses entries; here the sum is ``layers * mean``.
    """
    return arithmetic_groups(layers, 1, mean, slope, cap, floor)


def arithmetic_groups(layers: int, group: int, mean: int, slope: float, cap: int, floor: int = 0) -> list[int]:
    """Budgets that fall in equal steps from one group of ``group`` layers to the next (WindowKV, arXiv 2503.17922).

    Departure from the repository: there the group's size also bends the pyramid
    (``cap * gamma // lambda``); here the ends depend on ``mean`` and ``slope`` only.
    Any number of layers will do: the last group may be shorter.
    """
    groups = -(-layers // group)
    last = Fraction(mean) / Fraction(slope)
    first = 2 * mean - last
    step = (first - last) / (groups - 1) if groups > 1 else Fraction(0)
    top = first if groups > 1 else Fraction(max(mean, 1))
    weights = [top - step * (layer // group) for layer in range(layers)]
    return apportion(weights, layers * mean, [cap] * layers, [floor] * layers)


def global_top_k(scores: Sequence[Scores], k: int) -> list[int]:
    """How many of the ``k`` best scores over all layers fall in each layer (DynamicKV, arXiv 2412.14838)."""
    flat = torch.cat([s.flatten() for s in scores])
    winners = flat.topk(min(k, flat.numel())).indices
    ends = torch.tensor([s.numel() for s in scores], device=flat.device).cumsum(0)
    owner = torch.bucketize(winners, ends, right=True)
    return torch.bincount(owner, minlength=len(scores)).tolist()
