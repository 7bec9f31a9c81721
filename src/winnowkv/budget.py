"""How many entries may stay: the budget a user asks for, and pure allocators that split it.

A budget counts KV entries per layer and KV head, mean over layers, with sinks
and recent window included. Allocators return whole numbers whose sum is exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from winnowkv.errors import BudgetError
from winnowkv.types import Scores

WAY_OUT = "give kept entries as an int >= 1 (128), the kept fraction of the prompt (0.12), or auto:0.95"
AUTO = re.compile(r"auto(?::(?P<target>[0-9.]+)(?::(?P<profile>.+))?)?")
TARGET = 0.95
Asked = int | float | str


@dataclass(frozen=True)
class Budget:
    """What the user asked to keep: ``int`` is entries, ``float`` the kept fraction of the prompt.

    ``"auto:0.95"`` (``"auto"`` is the same) is the smallest budget that is expected to give 95% of the full cache's
    tokens on the prompt at hand, by the policy's curve in the model's profile; ``"auto:0.95:p.json"`` names the profile.

    Raises
    ------
    BudgetError
        For 0, a negative number, a fraction above 1, something that is no number, or a target outside 0 to 1.
    """

    asked: Asked

    def __post_init__(self) -> None:
        if isinstance(self.asked, str):
            if not AUTO.fullmatch(self.asked):
                raise BudgetError(f"budget {self.asked!r} is not a number: {WAY_OUT}")
            try:
                target = self.target or 0
            except ValueError:
                target = 0
            if not 0 < target < 1:
                raise BudgetError(f"budget {self.asked!r}: its target must be above 0 and below 1, as in auto:0.95")
            return
        if isinstance(self.asked, bool) or not isinstance(self.asked, int | float):
            raise BudgetError(f"budget {self.asked!r} is not a number: {WAY_OUT}")
        if not self.asked > 0:  # NaN fails this too
            raise BudgetError(f"budget {self.asked!r} keeps nothing, it must be above 0: {WAY_OUT}")
        if isinstance(self.asked, float) and self.asked > 1:
            raise BudgetError(f"budget {self.asked!r} is a fraction above 1: {WAY_OUT}")

    @classmethod
    def of(cls, value: Budget | int | float | str) -> Budget:
        """Read a budget from Python or from the command line (``"128"`` entries, ``"0.12"`` fraction)."""
        if isinstance(value, Budget):
            return value
        if not isinstance(value, str):
            return cls(value)
        text = value.strip()
        if text.startswith("auto"):
            return cls(text)
        if re.fullmatch(r"[+-]?\d+", text):
            return cls(int(text))
        try:
            return cls(float(text))
        except ValueError as error:
            if isinstance(error, BudgetError):
                raise
            raise BudgetError(f"budget {value!r} is not a number: {WAY_OUT}") from None

    @property
    def target(self) -> float | None:
        """The agreement with the full cache that ``auto`` goes for; None for a budget in numbers."""
        found = AUTO.fullmatch(str(self.asked))
        return None if found is None else float(found["target"] or TARGET)

    @property
    def profile(self) -> str | None:
        """The profile file that ``auto`` names."""
        found = AUTO.fullmatch(str(self.asked))
        return None if found is None else found["profile"]

    def entries(self, prompt_tokens: int) -> int:
        """Entries per layer and KV head for a prompt of this length, never more than the prompt; all of it for ``auto``.

        A fraction is rounded down, in exact decimal arithmetic: 0.29 of 100 is 29, not 28.
        """
        if isinstance(self.asked, str):
            return prompt_tokens
        if isinstance(self.asked, int):
            return min(self.asked, prompt_tokens)
        return int(Fraction(repr(float(self.asked))) * prompt_tokens)  # float(): numpy's floats have another repr

    def __str__(self) -> str:
        return str(self.asked)


def spoken(asked: Asked) -> str:
    """A budget as people say it: ``12%``, ``128 entries``, ``auto:0.95``."""
    if isinstance(asked, str):
        return asked
    return f"{100 * asked:g}%" if isinstance(asked, float) else f"{asked} entries"


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
