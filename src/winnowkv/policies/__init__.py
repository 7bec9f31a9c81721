"""Eviction policies, one file each, found through the entry-point group ``winnowkv.policies``."""

from winnowkv.policies.base import Policy, Prompt
from winnowkv.policies.registry import Tasks, names, policy, policy_class, resolve, split_policies

__all__ = ["Policy", "Prompt", "Tasks", "names", "policy", "policy_class", "resolve", "split_policies"]
