"""The reference of the command line: every command of ``winnow`` with all of its options, as ``--help`` says them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import typer

from website.tables import markdown as table
from winnowkv.cli.main import command_line

GROUPS = {
    "Use": ("generate", "explain", "serve", "context", "vllm"),
    "Measure": ("demo", "audit", "needle", "eval", "report", "bench"),
    "Prepare": ("policies", "plan", "calibrate", "task", "profile"),
}


def commands() -> dict[str, Any]:
    """Every command by its full name, ``context add`` below ``context``."""
    found = {}

    def walk(command: Any, name: str) -> None:
        if not command.hidden:
            found[name] = command
        for below in getattr(command, "commands", {}).values():
            walk(below, f"{name} {below.name}".strip())

    for command in typer.main.get_command(command_line()).commands.values():  # type: ignore[attr-defined]
        walk(command, command.name)
    return found


def pages() -> dict[str, str]:
    """Markdown of the overview and of a page for each command by path below ``docs``; a group's commands share its page."""
    found = commands()
    top = [name for name in found if " " not in name]
    made = {"cli/index.md": overview(found, top)}
    for name in top:
        sub = [each for each in found if each.startswith(f"{name} ")]
        text = f"# winnow {name}\n\n{described(name, found[name])}"
        made[f"cli/{name}.md"] = (
            "\n\n".join([text, *(f"## winnow {each}\n\n{described(each, found[each])}" for each in sub)]) + "\n"
        )
    return made


def overview(found: dict[str, Any], top: list[str]) -> str:
    """All commands in their groups, a line each."""
    groups = {**GROUPS, "More": tuple(name for name in top if not any(name in names for names in GROUPS.values()))}
    parts = [
        "# Commands",
        "What `winnow COMMAND --help` prints. How to work with them: [the command line](../command-line.md).",
    ]
    for title, names in groups.items():
        rows = [(f"[`winnow {name}`]({name}.md)", plain(first_line(found[name]))) for name in names if name in found]
        if rows:
            parts.append(f"## {title}\n\n{table(['command', 'what'], rows)}")
    return "\n\n".join(parts) + "\n"


def first_line(command: Any) -> str:
    """A command's help up to its first empty line."""
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


def described(name: str, command: Any) -> str:
    """Help, usage, and a table of arguments and options."""
    context = command.context_class(command, info_name=f"winnow {name}")
    said, _, examples = inspect.cleandoc(command.help or "").partition("\n\nwinnow ")
    said = re.sub(r"\n*Examples:$", "", said)
    parts = [plain(said), f"```\n{command.get_usage(context).removeprefix('Usage: ')}\n```"]
    if examples:
        parts.append("Examples:\n\n```\nwinnow " + re.sub(r"\n\n+", "\n", examples) + "\n```")
    rows: dict[str, list[tuple[str, str, str]]] = {"argument": [], "option": []}
    for each in command.get_params(context):
        record = each.get_help_record(context)
        if record is not None and "--help" not in each.opts:
            rows[each.param_type_name].append(row(*record))
    parts += [table([kind, "what", "default"], found) for kind, found in rows.items() if found]
    return "\n\n".join(parts)


def row(left: str, right: str) -> tuple[str, str, str]:
    """A line of help as names, text, and what is in brackets at its end."""
    said, _, more = right.partition("  [")
    return f"`{left}`".replace("|", "\\|"), plain(said), plain(more.removesuffix("]").removeprefix("default: "))


def plain(text: str) -> str:
    """Text that Markdown shows as it is, outside of its code spans."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*_<>\[\]|{}])", r"\\\1", piece) for piece in pieces)
