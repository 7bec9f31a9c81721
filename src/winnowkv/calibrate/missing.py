"""What policies lack if a model has no calibration profile, what happens in its place, and the commands that get one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from winnowkv.calibrate.card import default_repository
from winnowkv.errors import ProfileError
from winnowkv.models.calibration import known_profile
from winnowkv.models.info import ModelInfo
from winnowkv.policies import Policy, policy as make_policy
from winnowkv.policies.compose import innermost

GUESSES = "retrieval heads are guessed, and the whole prompt's cache is held until the last layer was read: more at the peak"
UNUSABLE = "it cannot be used"


@dataclass(frozen=True)
class MissingProfile:
    """Policies that want a profile where there is none.

    ``instead``: by a policy's spec what happens. ``commands``: what gets a profile, each by itself.
    """

    instead: dict[str, str]
    commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"instead": dict(self.instead), "commands": list(self.commands)}

    def sentences(self) -> list[str]:
        """In words: what happens, and how to get a profile."""
        by_effect: dict[str, list[str]] = {}
        for spec, effect in self.instead.items():
            by_effect.setdefault(effect, []).append(spec)
        found = [f"no calibration profile of this model for {', '.join(who)}: {effect}" for effect, who in by_effect.items()]
        return [*found, f"get a profile: {'; or: '.join(self.commands)}"]


def missing_profile(specs: Iterable[str], info: ModelInfo, model: str) -> MissingProfile | None:
    """What policies lack for a model; None if they have, or want, no profile.

    ``model`` is the name by which commands call it. A profile that a spec names is none that is missing: where it does not
    serve, the policy is refused.
    """
    instead: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        policy = make_policy(spec)
        if getattr(innermost(policy), "profile", None) is not None:
            continue
        if policy.wants_profile and known_profile(info) is None:
            instead[spec] = GUESSES
        elif policy.needs_profile and not has_profile(policy, info):
            instead[spec] = UNUSABLE
    return MissingProfile(instead, commands(model)) if instead else None


def has_profile(policy: Policy, info: ModelInfo) -> bool:
    """Whether a policy finds the profile it needs; options may leave it without need."""
    try:
        policy.check(info, None)
    except ProfileError:
        return False
    return True


def commands(model: str) -> tuple[str, ...]:
    """The commands that get a profile of a model. A config alone has no weights to measure: FOLDER is the one that has them."""
    name = shlex.quote(model)
    measured = "FOLDER" if model.endswith(".json") else name
    place = "" if default_repository() else " --repo OWNER/NAME"
    return (
        f"winnow profile fetch {name}{place}",
        f"winnow calibrate --model {measured} --out profile.json && winnow profile add profile.json",
    )
