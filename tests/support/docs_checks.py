"""What a code block of the documentation names is there, without running it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from support.docs import Block, CommandLine
from support.paths import ROOT

OURS = "winnowkv"
INSTALLERS = {"pip": [("install",)], "uv": [("pip", "install"), ("sync",), ("venv",), ("export",), ("run",)]}
LISTS = {"policies": ",", "policy": None}  # options whose values are policy specs, and what stands between several


class BlockError(AssertionError):
    """A block names something that is not there, or is neither run nor excused."""


def check_python(block: Block) -> None:
    """A Python block can be compiled, and the modules, names and keywords of winnowkv in it exist."""
    try:
        tree = ast.parse("\n" * block.line + block.text)
    except SyntaxError as error:
        raise BlockError(f"{block.page}:{error.lineno}: {error.msg}") from error
    known: dict[str, Any] = {"wk": import_module(OURS)}
    for where, name, value in imported(tree, block):
        known[name] = value
        if value is None:
            raise BlockError(f"{where}: {name} is not there")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            resolve(node, known, block)
        if isinstance(node, ast.Call):
            check_keywords(node, known, block)


def imported(tree: ast.AST, block: Block) -> Iterator[tuple[str, str, Any]]:
    """Place, name and value (None if it is not there) of everything that is imported of winnowkv."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == OURS:
            module = find_module(node.module or "")
            for alias in node.names:
                yield f"{block.page}:{node.lineno}", alias.asname or alias.name, getattr(module, alias.name, None)
        elif isinstance(node, ast.Import):
            for alias in (one for one in node.names if one.name.partition(".")[0] == OURS):
                found = find_module(alias.name)
                yield f"{block.page}:{node.lineno}", alias.asname or OURS, found


def find_module(name: str) -> Any:
    """A module of winnowkv; None if there is none."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != OURS:
            raise
        return None


def resolve(node: ast.AST, known: dict[str, Any], block: Block) -> Any:
    """What a dotted name of winnowkv stands for; None if it begins with another name."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolve(node.value, known, block)
    if owner is None or not (inspect.ismodule(owner) or inspect.isclass(owner)):
        return None
    if not hasattr(owner, node.attr):
        raise BlockError(f"{block.page}:{node.lineno}: {owner.__name__} has no {node.attr}")
    return getattr(owner, node.attr)


def check_keywords(node: ast.Call, known: dict[str, Any], block: Block) -> None:
    """What is called of winnowkv takes the keywords that it is given."""
    function = resolve(node.func, known, block)
    if not callable(function):
        return
    takes = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
        return
    for keyword in (one.arg for one in node.keywords):
        if keyword is not None and keyword not in takes:
            raise BlockError(f"{block.page}:{node.lineno}: {function.__name__} takes no {keyword}=")


def check_command(line: CommandLine) -> None:
    """A command line that is not run: its options, targets, extras and files exist."""
    if line.name == "winnow":
        parse_winnow(line)
    elif line.name == "make":
        check_make(line)
    elif line.name in ("pip", "uv"):
        check_install(line)
    elif line.name in ("python", "python3"):
        check_script(line)
    check_files(line)


def parse_winnow(line: CommandLine) -> dict[str, Any]:
    """The values of a ``winnow`` command line as the command would get them. Nothing of it is run."""
    from winnowkv.cli.main import command_line
    from winnowkv.errors import WinnowError

    values: dict[str, Any] = {}
    command: Any = typer.main.get_command(command_line())
    for leaf in leaves(command):
        leaf.callback = lambda **given: values.update(given)
    try:
        command.main(list(line.words[1:]), prog_name=line.name, standalone_mode=False)
        check_values(values)
    except WinnowError as error:
        raise BlockError(f"{line.where}: {error}") from error
    except Exception as error:
        if not hasattr(error, "format_message"):  # of click's errors, or of those of the click that typer brings
            raise
        raise BlockError(f"{line.where}: {error.format_message()}") from error
    return values


def leaves(command: Any) -> Iterator[Any]:
    """The commands of a group, and of the groups in it."""
    for each in getattr(command, "commands", {}).values():
        yield from leaves(each) if hasattr(each, "commands") else [each]


def check_values(values: dict[str, Any]) -> None:
    """Policies exist and take the options that they are given, and budgets are some."""
    from winnowkv.cli.loading import check_policies
    from winnowkv.cli.options import budgets

    for name, between in LISTS.items():
        given = values.get(name)
        if isinstance(given, str):
            check_policies(given.split(between) if between else [given], [])
    if isinstance(values.get("budgets"), str):
        budgets(values["budgets"])


def check_make(line: CommandLine) -> None:
    """The targets stand in the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in (one for one in line.words[1:] if "=" not in one and not one.startswith("-")):
        if not re.search(rf"(?m)^{re.escape(word)}:", text):
            raise BlockError(f"{line.where}: the Makefile has no target {word}")


def recipe(target: str) -> str:
    """The last line of a target's recipe, without the Makefile's variables."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"(?m)^{re.escape(target)}:.*\n((?:\t.*\n)+)", text)
    return re.sub(r"\$\(BIN\)/|\$\(\w+\)", "", found[1].strip().splitlines()[-1]).strip() if found else ""


def check_install(line: CommandLine) -> None:
    """Extras of winnowkv are declared, and folders are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    words = line.words[1:]
    if not any(words[: len(known)] == known for known in INSTALLERS[line.name]):
        raise BlockError(f"{line.where}: no rule for {line.name} {' '.join(words)}")
    for before, word in pairwise(words):
        wanted = re.fullmatch(r"(?:\.|winnowkv)\[([\w,-]+)\]", word)
        for extra in wanted[1].split(",") if wanted else [word] if before == "--extra" else ():
            if extra not in project["optional-dependencies"]:
                raise BlockError(f"{line.where}: pyproject.toml has no extra {extra}")
        if "/" in word and not word.startswith(("-", "https://")) and not (ROOT / word).exists():
            raise BlockError(f"{line.where}: {word} is not there")


def check_script(line: CommandLine) -> None:
    """The file is there, or the module."""
    words = list(line.words[1:])
    if words[:1] == ["-m"] and importlib.util.find_spec(words[1]) is None:
        raise BlockError(f"{line.where}: there is no module {words[1]}")


def check_files(line: CommandLine) -> None:
    """Scripts and recipes that are named are there, in the repository or beside the page."""
    beside = Path(line.where.partition(":")[0]).parent
    for word in line.words[1:]:
        if re.fullmatch(r"[\w./-]+\.py|recipes/[\w./-]+", word) and not any(
            (ROOT / folder / word).exists() for folder in (".", beside)
        ):
            raise BlockError(f"{line.where}: {word} is not there")
