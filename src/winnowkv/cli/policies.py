"""``winnow policies``: all eviction policies, with their options and sources."""

from __future__ import annotations

import json
from typing import Any

import typer

from winnowkv.cli.options import Json


def policies(as_json: Json = False) -> None:
    """List the eviction policies: what they keep, their options with defaults, and their sources."""
    from winnowkv.policies import names, policy_class
    from winnowkv.policies.registry import INNER_OPTION, option_names

    rows: list[dict[str, Any]] = []
    for name in names():
        kind = policy_class(name)
        made = kind()
        in_order = sorted(option_names(kind), key=lambda option: option == INNER_OPTION)  # as in a spec, the inner policy last
        options = {option: shown(getattr(made, option)) for option in in_order}
        rows.append({"policy": name, "scope": kind.scope, "source": kind.source, "options": options})
    if as_json:
        print(json.dumps({"policies": rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    wrappers = ", ".join(row["policy"] for row in rows if INNER_OPTION in row["options"])
    caption = (
        f"{INNER_OPTION}= is the policy that a wrapper ({wrappers}) changes, any of this list; it comes last, and what "
        f"follows it are the inner policy's options: adakv:floor=0.1:{INNER_OPTION}=snapkv:observe=16"
    )
    table = Table(title="Eviction policies (write options as name:option=value:option=value)", caption=caption)
    for column in ("policy", "keeps", "options and defaults", "source"):
        table.add_column(column, overflow="fold")
    for row in rows:
        listed = (f"{key}={'-' if value is None else value}" for key, value in row["options"].items())
        table.add_row(row["policy"], row["scope"], " ".join(listed), row["source"])
    Console().print(table)


def shown(value: Any) -> Any:
    """An option's default as plain data; a policy as its spec."""
    return getattr(value, "spec", value)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(policies)
