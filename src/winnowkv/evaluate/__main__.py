"""``python -m winnowkv.evaluate``: the command line of lm-evaluation-harness, with our model and our tasks.

It takes what ``lm_eval`` takes, with ``--model winnow`` and the tasks of ``local_tasks/`` beside
the harness's own::

    WINNOW_DATA=DIR python -m winnowkv.evaluate --model winnow \
        --model_args pretrained=embedded,policy=compresskv,budget=0.12 --tasks longbench_qasper --limit 1
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from winnowkv.errors import InputError, WinnowError

OPTION = "--include_path"
LOCAL_TASKS = Path(__file__).parent / "tasks" / "local_tasks"


def with_local_tasks(arguments: Sequence[str]) -> list[str]:
    """Arguments that let lm-eval find our tasks. Raises InputError where another folder of tasks is given."""
    if any(argument.partition("=")[0] == OPTION for argument in arguments):
        raise InputError(
            f"{OPTION} is taken here by {LOCAL_TASKS}: name your own task files by path in --tasks, or run lm_eval itself"
        )
    return [*arguments, OPTION, str(LOCAL_TASKS)] if arguments else []


def main() -> None:
    """Run lm-eval; a bad value of ours exits with 2 and one sentence."""
    try:
        sys.argv[1:] = with_local_tasks(sys.argv[1:])
        run()
    except WinnowError as error:
        print(f"winnow: {error}", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """lm-eval's own command line. Raises InputError where it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise InputError(f"lm-eval cannot be used: {error} (pip install 'winnowkv[eval]')") from None
    cli_evaluate()


if __name__ == "__main__":
    main()
