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
    from winnowkv.cache.explain import Explanation
    from winnowkv.cache.kept import KeptTokens
    from winnowkv.cache.reading import extend, greedy, prefill
    from winnowkv.cache.snapshot import load_cache, save_cache
    from winnowkv.cache.stacked import stack
    from winnowkv.cache.study import Study
    from winnowkv.documents import Answer, Document, open_document, read
    from winnowkv.engine.engine import Engine
    from winnowkv.engine.request import Completion, Event, Request
    from winnowkv.engine.sampling import Logprob, Sampling
    from winnowkv.errors import (
        BudgetError,
        CacheError,
        InputError,
        ModelNotFoundError,
        PolicyError,
        ProfileError,
        UnsupportedEngineError,
        UnsupportedModelError,
        WinnowError,
    )
    from winnowkv.models.calibration import CalibrationProfile, read_profile
    from winnowkv.models.info import ModelInfo
    from winnowkv.models.load import load
    from winnowkv.policies import LayerStates, Policy, PromptInfo, policy, register_policy
    from winnowkv.policies.wrappers import adakv, chunkkv, criticalkv
    from winnowkv.prompt.classifier import task_profile
    from winnowkv.prompt.structure import Structure, read_structure
    from winnowkv.prompt.task import TaskProfile
    from winnowkv.report import Report

__version__ = "0.2.0"

_HOMES = {
    "winnowkv.api": ("Run", "compress"),
    "winnowkv.budget": ("Budget",),
    "winnowkv.cache.cache": ("CompactCache",),
    "winnowkv.cache.explain": ("Explanation",),
    "winnowkv.cache.kept": ("KeptTokens",),
    "winnowkv.cache.reading": ("extend", "greedy", "prefill"),
    "winnowkv.cache.snapshot": ("load_cache", "save_cache"),
    "winnowkv.cache.stacked": ("stack",),
    "winnowkv.cache.study": ("Study",),
    "winnowkv.documents": ("Answer", "Document", "open_document", "read"),
    "winnowkv.engine.engine": ("Engine",),
    "winnowkv.engine.request": ("Completion", "Event", "Request"),
    "winnowkv.engine.sampling": ("Logprob", "Sampling"),
    "winnowkv.errors": (
        "BudgetError", "CacheError", "InputError", "ModelNotFoundError", "PolicyError", "ProfileError",
        "UnsupportedEngineError", "UnsupportedModelError", "WinnowError",
    ),
    "winnowkv.models.calibration": ("CalibrationProfile", "read_profile"),
    "winnowkv.models.info": ("ModelInfo",),
    "winnowkv.models.load": ("load",),
    "winnowkv.policies": ("LayerStates", "Policy", "PromptInfo", "policy", "register_policy"),
    "winnowkv.policies.wrappers": ("adakv", "chunkkv", "criticalkv"),
    "winnowkv.prompt.classifier": ("task_profile",),
    "winnowkv.prompt.structure": ("Structure", "read_structure"),
    "winnowkv.prompt.task": ("TaskProfile",),
    "winnowkv.report": ("Report",),
}  # fmt: skip
_HOME_OF = {name: module for module, public in _HOMES.items() for name in public}

__all__ = [
    "Answer", "Budget", "BudgetError", "CacheError", "CalibrationProfile", "CompactCache", "Completion", "Document",
    "Engine", "Event", "Explanation", "InputError", "KeptTokens", "LayerStates", "Logprob", "ModelInfo",
    "ModelNotFoundError", "Policy", "PolicyError", "ProfileError", "PromptInfo", "Report", "Request", "Run", "Sampling",
    "Structure", "Study", "TaskProfile", "UnsupportedEngineError", "UnsupportedModelError", "WinnowError", "adakv",
    "chunkkv", "compress", "criticalkv", "extend", "greedy", "load", "load_cache", "open_document", "policy", "prefill",
    "read", "read_profile", "read_structure", "register_policy", "save_cache", "stack", "task_profile",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'winnowkv' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
