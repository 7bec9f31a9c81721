"""Eviction policies, one file each, found through the entry-point group ``winnowkv.policies``."""

from winnowkv.policies.base import Policy, Prompt
from winnowkv.policies.registry import names, policy, policy_class, split_policies

__all__ = ["Policy", "Prompt", "names", "policy", "policy_class", "split_policies"]
