"""Levels of quality: how much memory and time at an answer's start is spent on choosing what stays.

The numbers below are the only place that says what a level is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, get_args

from winnowkv.errors import PolicyError
from winnowkv.files import shown
from winnowkv.policies.base import Policy
from winnowkv.policies.compose import Wrapper, innermost
from winnowkv.policies.registry import INNER_OPTION, policy as make_policy

Quality = Literal["lean", "balanced", "best"]
LEVELS: Mapping[str, Mapping[str, Any]] = {
    "lean": {"lookahead": 0, "draft": 0, "refit": False},
    "balanced": {"lookahead": 64, "draft": 0, "refit": False},
    "best": {"lookahead": 64, "draft": 64, "rounds": 2, "refit": True},
}
assert set(LEVELS) == set(get_args(Quality))


def check_quality(quality: str) -> None:
    """Raise PolicyError for a level that does not exist."""
    if quality not in LEVELS:
        raise PolicyError(f"quality {shown(quality)} is unknown: it is one of {', '.join(LEVELS)}, or leave it out")


def with_quality(policy: str | Policy, quality: str | None) -> str | Policy:
    """A policy with the options of a level, as it was given: a spec as a spec, a policy as a policy; None changes nothing.

    ``lean`` holds least and starts fastest: what stays is chosen from the prompt alone. ``balanced`` holds the whole prompt
    until the answer's first 64 tokens are out, and chooses by what they looked for: a request needs the memory of its full
    cache for so long, and no time to the first token. ``best`` then also generates two drafts from what would stay, throws
    them away, chooses again after each, and refits values: a pause of 128 decode steps, once an answer. A policy that evicts
    nothing is left as it is. What each costs and brings is measured in docs/winnow-policy.md.

    Raises
    ------
    PolicyError
        For an unknown level, a policy that has an option of the level with another value, or one without these options.
    """
    if quality is None:
        return policy
    if isinstance(policy, str):
        return spec_of_quality(policy, quality)
    options = _lacking(policy, quality)
    return _replaced(policy, options) if options else policy


def spec_of_quality(spec: str, quality: str) -> str:
    """A spec with the options of a level that it lacks; those of a wrapper are of the policy that it wraps. Raises as above."""
    policy = make_policy(spec)
    for part in spec.split(":")[1:]:  # an option that is written out counts, also if its value is the default
        option, _, value = part.partition("=")
        if policy.evicts and option in LEVELS.get(quality, ()) and getattr(policy, option) != LEVELS[quality][option]:
            raise PolicyError(_contradiction(spec, quality, option, value))
    options = _lacking(policy, quality)
    if not options:
        return spec
    inner = policy
    for _ in range(sum(part.startswith(f"{INNER_OPTION}=") for part in spec.split(":"))):
        inner = inner.of  # type: ignore[attr-defined]  # a spec that names an inner policy is a wrapper's
    if isinstance(inner, Wrapper):  # one that it has by default
        spec = f"{spec}:{INNER_OPTION}={inner.of.spec}"
    return ":".join([spec, *(f"{option}={_written(value)}" for option, value in options.items())])


def _lacking(policy: Policy, quality: str) -> dict[str, Any]:
    """The options of a level that a policy does not have yet."""
    check_quality(quality)
    if not policy.evicts:
        return {}
    level = LEVELS[quality]
    defaults = {each.name: each.default for each in fields(innermost(policy))}  # type: ignore[arg-type]  # all are dataclasses
    found = {}
    for option, value in level.items():
        own = getattr(policy, option, None)
        if own == value:
            continue
        if option not in defaults:
            raise PolicyError(f"{policy.spec} has no option {option}, which quality={quality} sets: leave quality out")
        if own != defaults[option]:
            raise PolicyError(_contradiction(policy.spec, quality, option, own))
        found[option] = value
    return found


def _contradiction(spec: str, quality: str, option: str, own: Any) -> str:
    level = LEVELS[quality][option]
    return (
        f"{spec}: {option}={_written(own)} contradicts quality={quality}, which is {option}={_written(level)}: leave one "
        "of them out"
    )


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _replaced(policy: Policy, options: Mapping[str, Any]) -> Policy:
    if isinstance(policy, Wrapper):
        return replace(policy, of=_replaced(policy.of, options))
    return replace(policy, **options)  # type: ignore[type-var]  # every policy is a dataclass
