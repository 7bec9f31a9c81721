"""winnowkv: keep the few percent of an LLM's KV cache that the task needs."""

from winnowkv.budget import Budget
from winnowkv.cache import CompactCache
from winnowkv.engine import Run, compress
from winnowkv.errors import (
    BudgetError,
    CacheError,
    InputError,
    ModelNotFoundError,
    PolicyError,
    UnsupportedModelError,
    WinnowError,
    WinnowWarning,
)
from winnowkv.models import load
from winnowkv.policies import Policy, Prompt, names as policy_names, policy
from winnowkv.report import Report
from winnowkv.task import TaskProfile

__version__ = "0.1.0"

__all__ = [
    "Budget", "BudgetError", "CacheError", "CompactCache", "InputError", "ModelNotFoundError", "Policy", "PolicyError",
    "Prompt", "Report", "Run", "TaskProfile", "UnsupportedModelError", "WinnowError", "WinnowWarning", "compress",
    "load", "policy", "policy_names",
]
