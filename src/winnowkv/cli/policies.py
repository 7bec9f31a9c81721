"""``winnow policies``: what each eviction policy is for, and the options and sources of those that are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from winnowkv.cli.options import DEFAULT_POLICY, Json
from winnowkv.cli.tables import Column, ResultTable, keys, note, say


def policies(
    named: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Policies to show in full; 'all' for all of them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the eviction policies and what each is for; with names, what they keep, their options and their sources.

    winnow policies winnow snapkv
    """
    from winnowkv.policies import names

    every = named is None or not named or named == ["all"]
    rows = [described(name) for name in (names() if every else dict.fromkeys(named or []))]
    if as_json:
        print(json.dumps({"policies": rows}, indent=2))
    elif named:
        show_options(rows)
    else:
        show_purposes(rows)


def described(name: str) -> dict[str, Any]:
    """A policy as plain data. Raises PolicyError for an unknown name."""
    from winnowkv.policies import policy_class
    from winnowkv.policies.registry import INNER_OPTION, option_names

    kind = policy_class(name)
    made = kind()
    in_order = sorted(option_names(kind), key=lambda option: option == INNER_OPTION)  # as in a spec, the inner policy last
    options = {option: shown(getattr(made, option)) for option in in_order}
    return {
        "policy": name, "default": name == DEFAULT_POLICY, "purpose": kind.purpose or kind.scope, "scope": kind.scope,
        "source": kind.source, "looks_from": getattr(made, "looks_from", None), "options": options,
    }  # fmt: skip


def show_purposes(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each policy."""
    table = ResultTable([*keys("policy"), Column("for", least=30)], "Eviction policies, and what each is for")
    for row in sorted(rows, key=lambda row: not row["default"]):
        table.add(row["policy"], f"{row['purpose']}{' (the default)' if row['default'] else ''}")
    table.print()
    note(f"without --policy it is {DEFAULT_POLICY}; winnow policies NAME shows a policy's options and source")
    wrappers = ", ".join(row["policy"] for row in rows if is_wrapper(row))
    note(f"those around another policy ({wrappers}) name it last: adakv:floor=0.1:of=snapkv:observe=16")


def show_options(rows: Sequence[dict[str, Any]]) -> None:
    """Print a paragraph for each policy."""
    for row in rows:
        say(f"{row['policy']}{' (the default)' if row['default'] else ''}: {row['purpose']}", indent=2)
        say(f"  keeps: {row['scope']}", indent=9)
        if row["looks_from"]:
            say(f"  looks from: {row['looks_from']}", indent=14)
        say(f"  source: {row['source']}", indent=10)
        listed = " ".join(f"{key}={'-' if value is None else value}" for key, value in row["options"].items())
        say(f"  options and defaults: {listed or 'none'}", indent=4)
    note("write options as NAME:option=value:option=value")
    if any(map(is_wrapper, rows)):
        note(
            "of= is the policy that a wrapper changes, any other; it comes last, and what follows it are the inner policy's "
            "options: adakv:floor=0.1:of=snapkv:observe=16"
        )


def is_wrapper(row: dict[str, Any]) -> bool:
    """Whether a policy changes another one."""
    from winnowkv.policies.registry import INNER_OPTION

    return INNER_OPTION in row["options"]


def shown(value: Any) -> Any:
    """An option's default as plain data; a policy as its spec."""
    return getattr(value, "spec", value)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(policies)
