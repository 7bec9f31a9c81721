"""The decode budget: how many entries of the tokens after the prompt are held, and when they are evicted.

Which of them stay is the policy's affair (:meth:`winnowkv.policies.Policy.decode_eviction`).
"""

from __future__ import annotations

from winnowkv.errors import BudgetError, CacheError

DECODE_BLOCK = 64  # entries evicted at once
LEAST_DECODE_BUDGET = 64


def check_decode_budget(budget: int | None) -> None:
    """Raise BudgetError for a decode budget that is no whole number or below :data:`LEAST_DECODE_BUDGET`."""
    if budget is None:
        return
    way_out = f"give at least {LEAST_DECODE_BUDGET} entries, or None for no limit"
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"decode budget {budget!r} is not a whole number of entries: {way_out}")
    if budget < LEAST_DECODE_BUDGET:
        raise BudgetError(f"decode budget {budget} is below {LEAST_DECODE_BUDGET}, of which the newest always stay: {way_out}")


def check_crop(back: int, whole: int, budget: int) -> None:
    """Raise CacheError if more of the newest tokens are taken back than are whole under a decode budget."""
    if back > whole:
        raise CacheError(
            f"cannot crop {back} tokens: the decode budget of {budget} has evicted entries among them, only "
            f"the last {whole} tokens are whole; crop fewer, or raise decode_budget"
        )
