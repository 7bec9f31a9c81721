"""The budget that a user asks for: KV entries per layer and KV head, mean over layers, sinks and recent window included."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from winnowkv.errors import BudgetError
from winnowkv.files import LARGEST_WHOLE, shown

WAY_OUT = "give kept entries as an int >= 1 (128), the kept fraction of the prompt (0.12), or auto:0.95"
AUTO = re.compile(r"auto(?::(?P<target>[0-9.]+)(?::(?P<profile>.+))?)?")
DEFAULT_TARGET = 0.95  # of auto
DEFAULT_BUDGET = 0.12  # of every door: compress(), CompactCache, Engine, the command line
Asked = int | float | str


@dataclass(frozen=True, eq=False)
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
                raise BudgetError(f"budget {shown(self.asked)} is not a number: {WAY_OUT}")
            try:
                target = self.target or 0
            except ValueError:
                target = 0
            if not 0 < target < 1:
                raise BudgetError(f"budget {shown(self.asked)}: its target must be above 0 and below 1, as in auto:0.95")
            return
        if isinstance(self.asked, bool) or not isinstance(self.asked, int | float):
            raise BudgetError(f"budget {shown(self.asked)} is not a number: {WAY_OUT}")
        if isinstance(self.asked, int) and self.asked >= LARGEST_WHOLE:
            raise BudgetError(f"budget {shown(self.asked)} is larger than any prompt: {WAY_OUT}")
        if not self.asked > 0:  # NaN fails this too
            raise BudgetError(f"budget {shown(self.asked)} keeps nothing, it must be above 0: {WAY_OUT}")
        if isinstance(self.asked, float) and self.asked > 1:
            raise BudgetError(f"budget {shown(self.asked)} is a fraction above 1: {WAY_OUT}")

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
        try:
            return cls(int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text))
        except ValueError as error:
            if isinstance(error, BudgetError):
                raise
            raise BudgetError(f"budget {shown(value)} is not a number: {WAY_OUT}") from None

    @property
    def target(self) -> float | None:
        """The agreement with the full cache that ``auto`` goes for; None for a budget in numbers."""
        found = AUTO.fullmatch(str(self.asked))
        return None if found is None else float(found["target"] or DEFAULT_TARGET)

    @property
    def profile(self) -> str | None:
        """The profile file that ``auto`` names."""
        found = AUTO.fullmatch(str(self.asked))
        return None if found is None else found["profile"]

    @property
    def key(self) -> tuple[str, Asked]:
        """What tells two budgets apart: 1 entry and the fraction 1.0 compare equal as numbers and are two budgets."""
        return type(self.asked).__name__, self.asked

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

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


def budget_text(asked: Asked) -> str:
    """A budget as text: ``12%``, ``128 entries``, ``auto:0.95``."""
    if isinstance(asked, str):
        return asked
    return f"{100 * asked:g}%" if isinstance(asked, float) else f"{asked} entries"
