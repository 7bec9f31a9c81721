"""``python -m winnowkv.evaluate``: the command line of lm-evaluation-harness, with our model and our tasks.

It takes all arguments of ``lm_eval``, and adds ``--model winnow`` and the tasks of ``local_tasks/``
to the harness's own::

    WINNOW_DATA=DIR python -m winnowkv.evaluate --model winnow \
        --model_args pretrained=embedded,policy=compresskv,budget=0.12 --tasks longbench_qasper --limit 1
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from winnowkv.errors import InputError, WinnowError

INCLUDE_OPTION = "--include_path"
LOCAL_TASKS = Path(__file__).parent / "tasks" / "local_tasks"


def with_local_tasks(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the folder of our tasks added. Raises InputError if they name another folder of tasks."""
    if any(argument.partition("=")[0] == INCLUDE_OPTION for argument in arguments):
        raise InputError(
            f"{INCLUDE_OPTION} is taken here by {LOCAL_TASKS}: name your own task files by path in --tasks, "
            "or run lm_eval itself"
        )
    return [*arguments, INCLUDE_OPTION, str(LOCAL_TASKS)] if arguments else []


def main() -> None:
    """Run lm-eval; a WinnowError prints one sentence and exits with 2."""
    try:
        sys.argv[1:] = with_local_tasks(sys.argv[1:])
        run()
    except WinnowError as error:
        print(f"winnow: {error}", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Run lm-eval's own command line. Raises InputError if it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise InputError(f"lm-eval cannot be used: {error} (pip install 'winnowkv[eval]')") from None
    cli_evaluate()


if __name__ == "__main__":
    main()
