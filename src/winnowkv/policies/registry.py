"""From a name or a spec to a policy. Built-in policies stand in a plain dict, those of other packages have an entry point::

[project.entry-points."winnowkv.policies"]
mine = "my_package.my_policy:MyPolicy"

and one that is in no package is made known to this process by :func:`register_policy`.
"""

from __future__ import annotations

import difflib
import re
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from winnowkv.errors import PolicyError
from winnowkv.files import LARGEST_WHOLE, SHOWN, shown
from winnowkv.policies.base import Policy
from winnowkv.prompt.task import TaskProfile

Kind = TypeVar("Kind", bound=Policy)
ENTRY_POINT_GROUP = "winnowkv.policies"
BUILT_IN: Mapping[str, str] = {
    "adakv": "winnowkv.policies.adakv:AdaKV",
    "cake": "winnowkv.policies.cake:CAKE",
    "chunkkv": "winnowkv.policies.chunkkv:ChunkKV",
    "compresskv": "winnowkv.policies.compresskv:CompressKV",
    "criticalkv": "winnowkv.policies.criticalkv:CriticalKV",
    "defensivekv": "winnowkv.policies.defensivekv:DefensiveKV",
    "dynamickv": "winnowkv.policies.dynamickv:DynamicKV",
    "expected": "winnowkv.policies.expected:Expected",
    "full": "winnowkv.policies.full:Full",
    "h2o": "winnowkv.policies.h2o:H2O",
    "headkv": "winnowkv.policies.headkv:HeadKV",
    "int4": "winnowkv.policies.quantized:Int4",
    "int8": "winnowkv.policies.quantized:Int8",
    "keydiff": "winnowkv.policies.keydiff:KeyDiff",
    "knorm": "winnowkv.policies.knorm:Knorm",
    "kvzip": "winnowkv.policies.kvzip:KVzip",
    "lagkv": "winnowkv.policies.lagkv:LagKV",
    "pyramidkv": "winnowkv.policies.pyramidkv:PyramidKV",
    "random": "winnowkv.policies.random:Random",
    "snapkv": "winnowkv.policies.snapkv:SnapKV",
    "streaming": "winnowkv.policies.streaming:Streaming",
    "tova": "winnowkv.policies.tova:TOVA",
    "windowkv": "winnowkv.policies.windowkv:WindowKV",
    "winnow": "winnowkv.policies.winnow:Winnow",
}
_registered: dict[str, type[Policy]] = {}  # of this process
Tasks = TaskProfile | str | None | Sequence[TaskProfile | str | None]
INNER_OPTION = "of"  # a wrapper's option that names the policy it wraps; what follows it belongs to that policy
LONGEST_SPEC, DEEPEST_SPEC = 8192, 8  # characters, a profile's path among them, and policies that wrap each other
TRUTH_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@cache
def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name not in BUILT_IN:
            found[entry.name] = entry
        elif entry.value != BUILT_IN[entry.name]:
            warnings.warn(f"policy {entry.name!r} of {entry.value!r} has the name of a built-in one, which wins", stacklevel=2)
    return found


def names() -> list[str]:
    """Names of all policies, built in and registered, sorted."""
    _entries.cache_clear()
    return sorted({*BUILT_IN, *_registered, *_entries()})


def register_policy(kind: type[Kind]) -> type[Kind]:
    """Let this process know a policy class by its ``name``; returns the class, so that it can be a decorator.

    Specs, wrappers (``adakv:of=mine``) and whatever else takes a policy by name then find it. Other processes (Ray's workers)
    do not: for these a package of its own has an entry point. A class takes the place of an earlier one of its name.
    Raises PolicyError for what is no policy class, and for a name that is a built-in one's or cannot stand in a spec.

    Examples
    --------
    >>> @register_policy                                             # doctest: +SKIP
    ... @dataclass(frozen=True, kw_only=True)
    ... class Mine(SnapKV):
    ...     name: ClassVar[str] = "mine"
    """
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise PolicyError(f"{shown(kind)} is not a subclass of Policy: derive from TokenPolicy, or from a policy")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise PolicyError(f"{kind.__name__}: the name {shown(name)} must be letters, digits, '_', '.' or '-': set name")
    if name in BUILT_IN:
        raise PolicyError(f"{kind.__name__}: {name!r} is the name of a built-in policy: set another name")
    _registered[name] = kind
    return kind


def policy_class(name: str) -> type[Policy]:
    """The class of that name. Raises PolicyError and suggests the nearest name."""
    if name in BUILT_IN:
        module, _, kind = BUILT_IN[name].partition(":")
        built_in: type[Policy] = getattr(import_module(module), kind)
        return built_in
    if name in _registered:
        return _registered[name]
    if name not in _entries():
        _entries.cache_clear()  # it may have been installed since; to look for every prompt takes 5 ms each
    entries = _entries()
    if name not in entries:
        known = [*BUILT_IN, *_registered, *entries]
        near = difflib.get_close_matches(name[:SHOWN], known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PolicyError(
            f"policy {shown(name)} is unknown.{hint} Known: {', '.join(sorted(known))}; your own: docs/policies.md#your-own"
        )
    found = entries[name].load()
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"policy {name!r}: the entry point {entries[name].value!r} is not a subclass of Policy")
    return found


def policy(name: str | Policy, **options: Any) -> Policy:
    """Make a policy from its name and flat options: ``policy("windowkv", group=6, window=8)``.

    A spec as on the command line works too: ``policy("windowkv:group=6:window=8")``, and for wrappers
    ``policy("adakv:floor=0.1:of=snapkv:observe=16")``, in which everything after ``of=`` is the inner policy's spec.
    Raises PolicyError for an unknown name, an unknown option or a value of the wrong type.
    """
    if isinstance(name, Policy):
        if options:
            raise PolicyError(f"options {sorted(options)} given beside a finished policy: use dataclasses.replace")
        return name
    if not isinstance(name, str):
        raise PolicyError(f"policy {shown(name)} is no name: give one, such as 'snapkv', or a Policy")
    if len(name) > LONGEST_SPEC or name.count(f":{INNER_OPTION}=") > DEEPEST_SPEC:
        raise PolicyError(
            f"policy {shown(name)} is too long: a spec has at most {LONGEST_SPEC} characters and {DEEPEST_SPEC} policies in it"
        )
    head, *pairs = name.split(":")
    given: dict[str, Any] = {}
    key = ""
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if key == INNER_OPTION:
            given[INNER_OPTION] += f":{pair}"
        elif option in given and equals:
            raise PolicyError(f"{shown(name)}: {option} stands twice in it: leave one out")
        elif option and equals:
            given[key := option] = value
        elif key and not equals:  # a value may hold a colon itself, as heads=random:4 does
            given[key] += f":{pair}"
        else:
            raise PolicyError(f"{shown(name)}: {shown(pair)} is not option=value; write it as {shown(head)[1:-1]}:option=value")
    given.update(options)
    kind = policy_class(head)
    hints, allowed = get_type_hints(kind), option_names(kind)
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key[:SHOWN], allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PolicyError(f"{head} has no option {shown(key)}.{hint} Options: {', '.join(allowed)}")
    return kind(**{key: convert(head, key, value, hints[key]) for key, value in given.items()})


def option_names(kind: type[Policy]) -> list[str]:
    """What a user may ask of a policy, by name."""
    return [each.name for each in fields(kind) if each.init]  # type: ignore[arg-type]  # every policy is a dataclass


def split_policies(text: str) -> list[str]:
    """The specs of a comma-separated list, as they were written. Raises PolicyError for an empty list."""
    specs = [spec.strip() for spec in text.split(",") if spec.strip()]
    if not specs:
        raise PolicyError("no policy was named: give at least one, for example full,snapkv")
    return specs


def convert(head: str, key: str, value: Any, hint: Any) -> Any:
    """An option's value in the type its dataclass field declares. Raises PolicyError if it does not fit."""
    _check_finite(head, key, value)
    found = _converted(head, key, value, hint)
    _check_finite(head, key, found)
    return found


def _check_finite(head: str, key: str, value: Any) -> None:
    if isinstance(value, int | float) and not abs(value) < LARGEST_WHOLE:  # not a number fails this too
        raise PolicyError(f"{head}: {key}={shown(value)} must be a finite number")


def _converted(head: str, key: str, value: Any, hint: Any) -> Any:
    if hint is Policy and isinstance(value, str | Policy):
        return policy(value)
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
            raise PolicyError(f"{head}: {key}={shown(value)} must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in TRUTH_WORDS:
            return TRUTH_WORDS[str(value).lower()]
    elif isinstance(value, str) and hint is not str:
        try:
            return hint(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not isinstance(value, bool):
        return value
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise PolicyError(f"{head}: {key}={shown(value)} is not of type {hint.__name__}")
