"""``winnow --help`` and every ``winnow CMD --help`` load nothing heavy; the version."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import winnowkv as wk
from winnowkv.cli.main import command_line

HEAVY = ("torch", "transformers", "sklearn", "matplotlib", "pandas", "lm_eval", "ray", "numpy", "yaml", "safetensors")
APP = command_line()
COMMANDS = [command.name or command.callback.__name__ for command in APP.registered_commands]
COMMANDS += [
    f"{group.name} {command.name}" for group in APP.registered_groups for command in group.typer_instance.registered_commands
]
# Prints, for each command line, its exit code and the heavy modules that are loaded after it.
SCRIPT = """
import json, sys
from winnowkv.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["winnow", *arguments]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    found.append([arguments, code, [name for name in %r if name in sys.modules]])
print(json.dumps(found), file=sys.stderr)
"""


def test_help_of_every_command_loads_nothing_heavy() -> None:
    asked = [["--help"], ["--version"], *([*command.split(), "--help"] for command in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % (HEAVY,), json.dumps(asked)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr) == [[arguments, 0, []] for arguments in asked]
    assert len(COMMANDS) == 23


def test_the_version(winnow) -> None:
    assert winnow("--version") == (0, f"winnow {wk.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_and_names_json(winnow, monkeypatch, command) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = winnow(*command.split(), "--help")
    assert code == 0
    assert "--json" in out
    assert max(map(len, out.splitlines())) <= 80
