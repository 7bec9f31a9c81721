"""``winnow demo``: the needle test on the embedded model, in a few minutes, on one screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.cli.options import DEFAULT_POLICY, Factorial, Json, Out
from winnowkv.cli.tables import ResultTable, keys, note, numbers

# The three papers' rules look from the question, and with preset=paper as they were published.
POLICIES = (
    "full,winnow,random,streaming,snapkv,adakv,headkv,cake,windowkv,windowkv:preset=paper,dynamickv,dynamickv:preset=paper,"
    "compresskv,compresskv:preset=paper"
)
NEEDLES = 2  # of the package's eight: six prompts at three depths, about four minutes on two cores
NEXT_STEPS = (
    "your own text: winnow generate -f report.txt --budget 0.12",
    "what it costs on prompts of yours: winnow audit --prompts mine.jsonl",
)


def demo(factorial: Factorial = False, out: Out = Path("winnow-out/demo"), as_json: Json = False) -> None:
    """Answer needle prompts of 3,000 tokens with the full cache, winnow and published policies, at 12% and at 128 entries.

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
        **({} if factorial else {"show": show_screen}),
    )


def show_screen(summary: dict[str, Any], out: Path) -> None:
    """Print one row for each policy, what was shown, and what to try next: a screen of at most 24 lines."""
    from winnowkv.evaluate.report.summary import short_budget_text
    from winnowkv.report import MIB

    groups = summary["groups"]
    budgets = list(dict.fromkeys(short_budget_text(group["budget"]) for group in groups))
    cases, full = (max((group[name] for group in groups), default=0) for name in ("cases", "full_bytes"))
    titles = [f"{what}\nat {budget}" for budget in budgets for what in ("found", "MiB", "ms/token")]
    table = ResultTable(
        [*keys("policy"), *numbers(titles)],
        f"{cases} needle prompts of 3,000 tokens ({full / MIB:.1f} MiB of KV); files in {out}",
    )
    for policy in dict.fromkeys(group["policy"] for group in groups):
        mine = {short_budget_text(group["budget"]): group for group in groups if group["policy"] == policy}
        table.add(policy, *(cell for budget in budgets for cell in cells(mine.get(budget))))
    table.print()
    if summary["failed"]:
        note(f"{summary['failed']} measurements failed and are left out")
    for line in (*shown(groups), *NEXT_STEPS):
        note(line)


def cells(group: dict[str, Any] | None) -> list[str]:
    """What a policy found at a budget, in how many MiB, how fast."""
    from winnowkv.report import MIB

    if group is None:
        return ["-"] * 3
    pace = group["decode_ms_per_token"]
    found, held = f"{100 * group['accuracy']:.0f}%", f"{group['kept_bytes'] / MIB:.1f}"
    return [found, held, "-" if pace is None else f"{pace:.1f}"]


def shown(groups: list[dict[str, Any]]) -> list[str]:
    """One line that says what the table shows of the default policy; none if it was not measured."""
    from winnowkv.report import MIB

    by_name = {name: next((g for g in groups if g["policy"] == name), None) for name in (DEFAULT_POLICY, "full")}
    ours, full = by_name.values()
    if ours is None or full is None:
        return []
    share = 100 * ours["kept_bytes"] / ours["full_bytes"]
    return [
        f"{ours['policy']} found {100 * ours['accuracy']:.0f}% in {ours['kept_bytes'] / MIB:.1f} MiB ({share:.0f}%), "
        f"the full cache {100 * full['accuracy']:.0f}% in {full['kept_bytes'] / MIB:.1f} MiB"
    ]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)
