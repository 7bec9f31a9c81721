"""The command ``winnow``: registers all commands, prints errors as one sentence, and ends in order after Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from winnowkv.errors import WinnowError

INTERRUPTED = 130  # exit code after Ctrl-C


def print_version(asked: bool) -> None:
    """Print the version, alone on its line, and end."""
    if asked:
        from winnowkv import __version__

        print(f"winnow {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keep the few percent of an LLM's KV cache that the task needs, and see what it costs."""


def command_line() -> typer.Typer:
    """All commands of ``winnow``."""
    from winnowkv.cli import (
        audit,
        bench,
        calibrate,
        context,
        demo,
        eval as evaluation,
        explain_page,
        generate,
        needle,
        plan,
        policies,
        profile,
        report,
        serve,
        task,
        vllm,
    )

    app = typer.Typer(
        name="winnow",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for command in (
        demo, generate, serve, explain_page, context, vllm, plan, audit, bench, needle, evaluation, report, calibrate, profile,
        task, policies,
    ):  # fmt: skip
        command.register(app)
    return app


def main() -> None:
    """Run ``winnow``. A WinnowError prints one sentence and exits with 2; Ctrl-C exits with 130."""
    app = command_line()
    with one_sentence("winnow"):
        app(prog_name="winnow")


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Exit codes of a command or script: 2 and one sentence for a WinnowError or a file that cannot be used, 130 for Ctrl-C,
    1 for a closed output pipe."""
    with clean_interrupts(name):
        try:
            yield
        except WinnowError as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader of our output is gone, as with `| head`
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"{name}: {error.filename} cannot be used: {error.strerror}", file=sys.stderr)
            sys.exit(2)


@contextmanager
def clean_interrupts(name: str) -> Iterator[None]:
    """The first Ctrl-C ends the work and cleans up; a second one does not disturb that, a third ends at once.

    Nothing that was measured is lost either way, since every line is in its file when it is finished. After the first one
    the handler stays, so that none interrupts the interpreter's own end either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    more = 0

    def again(number: int, frame: Any) -> None:
        nonlocal more
        more += 1
        if more > 1:
            os._exit(INTERRUPTED)
        with suppress(OSError):
            os.write(2, f"{name}: writing what was measured; Ctrl-C once more ends at once\n".encode())

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, again)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as under nohup, or the business of whoever called us
        yield
        return
    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, before)
