"""``winnow policies``: what can be chosen, with options and sources."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import typer

from winnowkv.cli.options import Json


def policies(as_json: Json = False) -> None:
    """List the eviction policies: what they keep, their options with defaults, their source."""
    from winnowkv.policies import names, policy_class
    from winnowkv.policies.base import options as options_of

    rows: list[dict[str, Any]] = []
    for name in names():
        kind = policy_class(name)
        allowed = options_of(kind)
        options = {f.name: f.default for f in fields(kind) if f.name in allowed}
        rows.append({"policy": name, "scope": kind.scope, "source": kind.source, "options": options})
    if as_json:
        print(json.dumps({"policies": rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Eviction policies (write options as name:option=value:option=value)")
    for column in ("policy", "keeps", "options and defaults", "source"):
        table.add_column(column, overflow="fold")
    for row in rows:
        shown = (f"{key}={'-' if value is None else value}" for key, value in row["options"].items())
        table.add_row(row["policy"], row["scope"], " ".join(shown), row["source"])
    Console().print(table)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(policies)
