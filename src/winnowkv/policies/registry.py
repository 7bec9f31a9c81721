"""From a name or a spec to a policy. Built-ins and third parties come through the same door.

A package registers a policy with an entry point::

    [project.entry-points."winnowkv.policies"]
    mine = "my_package.my_policy:MyPolicy"
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from winnowkv.errors import PolicyError
from winnowkv.models.info import Fingerprint
from winnowkv.policies.base import Policy, options as options_of
from winnowkv.prompt.task import TaskProfile

GROUP = "winnowkv.policies"
Tasks = TaskProfile | str | None | Sequence[TaskProfile | str | None]
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Names of all registered policies, sorted."""
    _entries.cache_clear()
    return sorted(_entries())


def policy_class(name: str) -> type[Policy]:
    """The class registered under a name. Raises PolicyError and suggests the nearest name."""
    if name not in _entries():
        _entries.cache_clear()  # it may have been installed since; to look for every prompt takes 5 ms each
    entries = _entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PolicyError(f"policy {name!r} is unknown.{hint} Known: {', '.join(sorted(entries)) or 'none'}")
    found = entries[name].load()
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"policy {name!r}: the entry point {entries[name].value!r} is not a subclass of Policy")
    return found


def policy(name: str | Policy, **options: Any) -> Policy:
    """Make a policy from its name and flat options: ``policy("windowkv", group=6, window=8)``.

    A spec as on the command line works too: ``policy("windowkv:group=6:window=8")``.
    Raises PolicyError for an unknown name, an unknown option or a value of the wrong type.
    """
    if isinstance(name, Policy):
        if options:
            raise PolicyError(f"options {sorted(options)} given beside a finished policy: use dataclasses.replace")
        return name
    head, *pairs = name.split(":")
    given: dict[str, Any] = {}
    key = ""
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if option and equals:
            given[key := option] = value
        elif key and not equals:  # a value may hold a colon itself, as heads=random:4 does
            given[key] += f":{pair}"
        else:
            raise PolicyError(f"{name!r}: {pair!r} is not option=value; write it as {head}:option=value")
    given.update(options)
    kind = policy_class(head)
    hints = get_type_hints(kind)
    allowed = options_of(kind)
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PolicyError(f"{head} has no option {key!r}.{hint} Options: {', '.join(allowed)}")
    return kind(**{key: convert(head, key, value, hints[key]) for key, value in given.items()})


def resolve(policy_or_spec: str | Policy, model: Fingerprint, task: Tasks = None) -> list[Policy]:
    """The policy with everything that hangs on model and task decided: one, or one for each row's task.

    Raises PolicyError or ProfileError where a task or a calibration profile is missing or does not fit.
    """
    made = policy(policy_or_spec).for_model(model)
    rows = [task] if task is None or isinstance(task, TaskProfile | str) else task
    return [made.for_task(TaskProfile.of(row)) for row in rows]


def split_policies(text: str) -> list[str]:
    """The specs of a comma-separated list, as they were written. Raises PolicyError for an empty list."""
    specs = [spec.strip() for spec in text.split(",") if spec.strip()]
    if not specs:
        raise PolicyError("no policy was named: give at least one, for example full,snapkv")
    return specs


def convert(head: str, key: str, value: Any, hint: Any) -> Any:
    """An option's value in the type its dataclass field declares. Raises PolicyError where it does not fit."""
    if get_origin(hint) in (Union, types.UnionType):
        if type(None) in get_args(hint) and (value is None or value == "none"):
            return None
        if not isinstance(value, str | bool) and any(
            isinstance(value, part) for part in get_args(hint) if isinstance(part, type)
        ):
            return value
        words = [word for part in get_args(hint) if get_origin(part) is Literal for word in get_args(part)]
        if value in words:
            return value
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise PolicyError(f"{head}: {key}={value!r} must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in TRUTH:
            return TRUTH[str(value).lower()]
    elif isinstance(value, str) and hint is not str:
        try:
            return hint(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not isinstance(value, bool):
        return value
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise PolicyError(f"{head}: {key}={value!r} is not of type {hint.__name__}")
