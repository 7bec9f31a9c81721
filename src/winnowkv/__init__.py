"""winnowkv: keep the few percent of an LLM's KV cache that the task needs.

Importing the package is inert and quick: torch and transformers load with the first
public name that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnowkv.batching import Engine
    from winnowkv.budget import Budget
    from winnowkv.cache import CompactCache
    from winnowkv.classify import task_profile
    from winnowkv.engine import Run, compress
    from winnowkv.errors import (
        BudgetError,
        CacheError,
        InputError,
        ModelNotFoundError,
        PolicyError,
        ProfileError,
        UnsupportedModelError,
        WinnowError,
    )
    from winnowkv.models import load
    from winnowkv.policies import Policy, Prompt, policy
    from winnowkv.profile import Profile, read_profile
    from winnowkv.report import Report
    from winnowkv.request import Completion, Event, Request
    from winnowkv.sampling import Sampling
    from winnowkv.snapshot import load_cache, save_cache
    from winnowkv.task import TaskProfile

__version__ = "0.1.0"

_HOMES = {
    "winnowkv.batching": ("Engine",),
    "winnowkv.budget": ("Budget",),
    "winnowkv.cache": ("CompactCache",),
    "winnowkv.classify": ("task_profile",),
    "winnowkv.engine": ("Run", "compress"),
    "winnowkv.errors": (
        "BudgetError", "CacheError", "InputError", "ModelNotFoundError", "PolicyError", "ProfileError",
        "UnsupportedModelError", "WinnowError",
    ),
    "winnowkv.models": ("load",),
    "winnowkv.policies": ("Policy", "Prompt", "policy"),
    "winnowkv.profile": ("Profile", "read_profile"),
    "winnowkv.report": ("Report",),
    "winnowkv.request": ("Completion", "Event", "Request"),
    "winnowkv.sampling": ("Sampling",),
    "winnowkv.snapshot": ("load_cache", "save_cache"),
    "winnowkv.task": ("TaskProfile",),
}  # fmt: skip
_HOME_OF = {name: module for module, public in _HOMES.items() for name in public}

__all__ = [
    "Budget", "BudgetError", "CacheError", "CompactCache", "Completion", "Engine", "Event", "InputError", "ModelNotFoundError",
    "Policy", "PolicyError", "Profile", "ProfileError", "Prompt", "Report", "Request", "Run", "Sampling", "TaskProfile",
    "UnsupportedModelError", "WinnowError",
    "compress", "load", "load_cache", "policy", "read_profile", "save_cache",
    "task_profile",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'winnowkv' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
