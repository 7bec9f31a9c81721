"""``winnow demo``: the needle test on the embedded model, in a few minutes."""

from __future__ import annotations

from pathlib import Path

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.cli.options import Factorial, Json, Out

POLICIES = "full,winnow,random,streaming,h2o,tova,snapkv,pyramidkv,adakv,headkv,cake,dynamickv,windowkv,compresskv"
NEEDLES = 2  # of the package's eight: six prompts at three depths, about four minutes on two cores


def demo(factorial: Factorial = False, out: Out = Path("winnow-out/demo"), as_json: Json = False) -> None:
    """Answer needle prompts of 3,000 tokens with the full cache and with every policy, at 12% and at 128 entries.

    Runs the embedded SmolLM2-135M-Instruct; `winnow needle` is the same test with everything adjustable.
    """
    from winnowkv.cli.needle import asked_policies, measure
    from winnowkv.evaluate.needle.prompts import read_haystack, read_needles

    measure(
        model="embedded",
        chat=True,
        out=out,
        as_json=as_json,
        haystack=read_haystack(),
        policies=asked_policies(POLICIES, factorial),
        budgets=[DEFAULT_BUDGET, 128],
        lengths=[3000],
        depths=[0.1, 0.5, 0.9],
        needles=read_needles()[:NEEDLES],
        variant="single",
        task="localization",
        max_new_tokens=24,
        metric="correct",
        timed=True,
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)
