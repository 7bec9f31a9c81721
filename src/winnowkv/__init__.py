"""winnowkv: keep the few percent of an LLM's KV cache that the task needs.

Importing the package is inert and quick: torch and transformers load with the first
public name that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnowkv.api import Run, compress
    from winnowkv.budget import Budget
    from winnowkv.cache.cache import CompactCache
    from winnowkv.cache.snapshot import load_cache, save_cache
    from winnowkv.engine.engine import Engine
    from winnowkv.engine.request import Completion, Event, Request
    from winnowkv.engine.sampling import Sampling
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
    from winnowkv.models.calibration import Profile, read_profile
    from winnowkv.models.load import load
    from winnowkv.policies import Policy, Prompt, policy
    from winnowkv.prompt.classifier import task_profile
    from winnowkv.prompt.task import TaskProfile
    from winnowkv.report import Report

__version__ = "0.1.0"

_HOMES = {
    "winnowkv.engine.engine": ("Engine",),
    "winnowkv.budget": ("Budget",),
    "winnowkv.cache.cache": ("CompactCache",),
    "winnowkv.prompt.classifier": ("task_profile",),
    "winnowkv.api": ("Run", "compress"),
    "winnowkv.errors": (
        "BudgetError", "CacheError", "InputError", "ModelNotFoundError", "PolicyError", "ProfileError",
        "UnsupportedModelError", "WinnowError",
    ),
    "winnowkv.models.load": ("load",),
    "winnowkv.policies": ("Policy", "Prompt", "policy"),
    "winnowkv.models.calibration": ("Profile", "read_profile"),
    "winnowkv.report": ("Report",),
    "winnowkv.engine.request": ("Completion", "Event", "Request"),
    "winnowkv.engine.sampling": ("Sampling",),
    "winnowkv.cache.snapshot": ("load_cache", "save_cache"),
    "winnowkv.prompt.task": ("TaskProfile",),
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
