"""What the pictures of agreement read from records of ``winnow audit --json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from website.records import Record
from winnowkv.errors import InputError
from winnowkv.policies import policy as make_policy

LEAN, BALANCED, BEST = "winnow, lean", "winnow, balanced", "winnow, best"


@dataclass(frozen=True)
class Point:
    """One setting: kept share of the bytes, and share of the full cache's tokens with its 95% interval."""

    kept: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Audit:
    """An audit: points of each policy by kept bytes, how many prompts, and after how many tokens agreement is counted."""

    lines: Mapping[str, list[Point]]
    whole: tuple[str, ...]
    held: Mapping[str, float]
    prompts: int
    after: int

    @property
    def counted(self) -> str:
        """Which tokens count, in words."""
        return f"tokens after the first {self.after}" if self.after else "all tokens"

    def published(self) -> list[str]:
        """The policies that evict and are not ours, the best on average over their points first."""
        theirs = [name for name, points in self.lines.items() if not name.startswith("winnow") and len(points) > 1]
        return sorted(theirs, key=lambda name: -sum(point.mean for point in self.lines[name]) / len(self.lines[name]))


def read(record: Record) -> Audit:
    """An audit of a record. Tokens after the lookahead count if all groups have some, else all tokens.

    ``held`` has, by policy, the most storage over kept bytes of its budgets, for those that evict and do not look first.
    Groups in which no answer was long enough for anything to be evicted have no point; their policies are in ``whole``.
    Raises InputError for a record without a group whose interval is known.
    """
    groups = [group for group in record.get("groups") if group.get("prompts")]
    later = all(group.get("prompts_after") for group in groups)
    lines: dict[str, list[Point]] = {}
    whole: dict[str, None] = {}
    held: dict[str, float] = {}
    for group in groups:
        name = name_of(group["policy"])
        if group.get("whole_answers") == group["prompts"] and not group.get("whole"):
            whole[name] = None
            continue
        share = group["agreement_after" if later else "agreement"]
        if share.get("low") is None or "kept_bytes" not in group:
            raise InputError(f"record {record.name}: {name} has no interval or no bytes, is it an audit of several prompts?")
        point = Point(group["kept_bytes"] / group["full_bytes"], share["mean"], share["low"], share["high"])
        mine = lines.setdefault(name, [])
        if not group.get("whole") and name not in (BALANCED, BEST):
            held[name] = max(held.get(name, 0.0), group.get("held_bytes", group["kept_bytes"]) / group["kept_bytes"])
        if not group.get("whole") or not mine:  # one that evicts nothing is the same at every budget
            mine.append(point)
    if not lines:
        raise InputError(f"record {record.name} has no group with a compared prompt")
    made = {name: sorted(points, key=lambda point: point.kept) for name, points in lines.items()}
    return Audit(made, tuple(whole), held, max(group["prompts"] for group in groups), record.get("after") if later else 0)


def name_of(spec: str) -> str:
    """A policy's name in pictures: levels of quality of ``winnow`` by name, all others as they are written."""
    policy: Any = make_policy(spec)
    if policy.name != "winnow":
        return spec
    if policy.draft:
        return BEST
    return BALANCED if policy.lookahead else LEAN
