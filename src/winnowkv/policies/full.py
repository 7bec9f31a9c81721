"""The whole cache: what every other policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.policies.base import TokenPolicy


@dataclass(frozen=True, kw_only=True)
class Full(TokenPolicy):
    """Keep every entry, whatever the budget says.

    Formula
    -------
    None: nothing is scored.

    Departures
    ----------
    None: the full cache is what every policy is compared with.
    """

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "no eviction"
    scope: ClassVar[str] = "everything"
    purpose: ClassVar[str] = "the answer to compare with: nothing is evicted"
    evicts: ClassVar[bool] = False
