"""Eviction policies, one file each."""

from winnowkv.policies.base import BoundPolicy, Policy
from winnowkv.policies.parts import LayerStates, PromptInfo
from winnowkv.policies.registry import Tasks, names, policy, policy_class, split_policies

__all__ = [
    "BoundPolicy", "LayerStates", "Policy", "PromptInfo", "Tasks", "names", "policy", "policy_class", "split_policies",
]  # fmt: skip
