"""Policies for drawn queries and keys: everything decided that depends on model and task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import winnowkv as wk
from support.profiles import random_profile
from winnowkv.models.info import Fingerprint
from winnowkv.models.rope import Rotation

HEADS, KV_HEADS = 4, 2


def decided(spec: str, task: str | None, layers: int) -> wk.Policy:
    """The policy with everything decided that depends on model and task; a calibration profile is drawn."""
    made: Any = wk.policy(spec)
    shape = Fingerprint("Drawn", layers, HEADS, KV_HEADS, "", Rotation((1.0, 0.1)))
    if made.by_profile or (made.name == "winnow" and (made.profile or made.heads in (None, 1, 3, 5))):  # with and without one
        made = replace(made, profile=random_profile(shape, layers))
    return made.for_model(shape).for_task(wk.TaskProfile.of(task))
