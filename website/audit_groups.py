"""What tables and pictures read of one group of ``winnow audit --json``: its level, and the bytes that it keeps and holds."""

from __future__ import annotations

from typing import Any

from winnowkv.policies.quality import LEVELS

HELD_MORE = 1.1  # held over kept bytes, from which on it is said: heads of a layer are padded to the longest
Group = dict[str, Any]


def level_of(spec: str) -> tuple[str, str]:
    """A policy and its level: ``("winnow", "balanced")`` of ``winnow:lookahead=64``."""
    name, *options = spec.split(":")
    for level in ("best", "balanced"):
        wanted = {f"{key}={str(value).lower()}" for key, value in LEVELS[level].items() if value}
        if wanted <= set(options):
            return ":".join([name, *(option for option in options if option not in wanted)]), level
    return spec, "lean"


def kept_share(group: Group) -> float:
    """Kept bytes over full bytes."""
    return float(group["kept_bytes"] / group["full_bytes"])


def held_share(group: Group) -> float:
    """Bytes that are really held over full bytes."""
    return float(group["held_bytes"] / group["full_bytes"])


def holds_more(group: Group) -> bool:
    """Whether a policy holds so much more than it keeps that a reader has to know."""
    return held_share(group) > HELD_MORE * kept_share(group)
