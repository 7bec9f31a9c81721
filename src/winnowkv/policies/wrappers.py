"""The wrappers as functions: ``adakv("snapkv")`` is ``policy("adakv:of=snapkv")``."""

from __future__ import annotations

from typing import Any

from winnowkv.policies.adakv import AdaKV
from winnowkv.policies.base import Policy
from winnowkv.policies.chunkkv import ChunkKV
from winnowkv.policies.criticalkv import CriticalKV
from winnowkv.policies.registry import policy


def adakv(of: str | Policy = "snapkv", **options: Any) -> AdaKV:
    """Heads of a layer share its budget by where their scores are: :class:`AdaKV` over any policy."""
    return AdaKV(of=policy(of), **options)


def criticalkv(of: str | Policy = "snapkv", **options: Any) -> CriticalKV:
    """Values count, too: :class:`CriticalKV` over any policy."""
    return CriticalKV(of=policy(of), **options)


def chunkkv(of: str | Policy = "snapkv", **options: Any) -> ChunkKV:
    """Whole chunks of tokens stay or go: :class:`ChunkKV` over any policy."""
    return ChunkKV(of=policy(of), **options)
