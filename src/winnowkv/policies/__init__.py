"""Eviction policies, one file each, and what a policy of one's own is made of."""

from winnowkv.policies.base import BoundPolicy, Policy, TokenPolicy
from winnowkv.policies.parts import Allocator, LayerStates, Parts, PromptInfo, QueryFreeScorer, Scorer, Selector
from winnowkv.policies.registry import Tasks, names, policy, policy_class, register_policy, split_policies

__all__ = [
    "Allocator", "BoundPolicy", "LayerStates", "Parts", "Policy", "PromptInfo", "QueryFreeScorer", "Scorer", "Selector",
    "Tasks", "TokenPolicy", "names", "policy", "policy_class", "register_policy", "split_policies",
]  # fmt: skip
