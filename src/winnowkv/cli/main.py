"""The command ``winnow``: registers all commands and prints errors as one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from winnowkv.errors import WinnowError

app = typer.Typer(
    name="winnow",
    help="Keep the few percent of an LLM's KV cache that the task needs, and see what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run ``winnow``. A WinnowError prints one sentence and exits with 2; Ctrl-C exits with 130."""
    from winnowkv.cli import audit, bench, calibrate, demo, eval as evaluation, generate, needle, plan, policies, report, task

    for command in (demo, generate, plan, audit, bench, needle, evaluation, report, calibrate, task, policies):
        command.register(app)
    with one_sentence("winnow"):
        app()


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Exit codes of a command or script: 2 and one sentence for a WinnowError, 130 for Ctrl-C, 1 for a closed output pipe."""
    try:
        yield
    except WinnowError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        sys.stderr.close()
        sys.exit(1)
