"""Tables of docs/choose.md, made of what ``winnow audit --json`` measured over all policies and levels.

Two records: ``policies-summaries`` (long answers, compared after the largest lookahead, so that the tokens that a level reads
over the whole cache do not count) and ``policies-questions`` (answers that may be short, all tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from website.audit_groups import Group, held_share, holds_more, kept_share, level_of
from website.records import Record
from website.tables import Records, markdown, table
from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.errors import InputError
from winnowkv.report import MIB

SUMMARIES, QUESTIONS = "policies-summaries", "policies-questions"
BUDGET = DEFAULT_BUDGET  # by which rows are sorted and advice is given


def named(group: Group) -> str:
    """A row's name: the policy, its level, its bytes if it evicts nothing, and how many answers were never compressed."""
    name, level = level_of(group["policy"])
    said = f"`{name}`" if level == "lean" else f"`{name}`, {level}"
    if group["whole"]:
        said += f" ({kept_share(group):.0%} of the bytes)"
    if group["whole_answers"]:
        said += f" ({group['whole_answers']} of {group['prompts'] + group['trivial']} answers never compressed)"
    return said


def held_more(group: Group) -> str:
    """``, which holds 22% of the bytes`` if a policy's storage is larger than what it keeps: heads padded to the longest."""
    lookahead = level_of(group["policy"])[1] != "lean"  # answers' own tokens are in what these hold
    return f", which holds {held_share(group):.0%} of the bytes" if holds_more(group) and not lookahead else ""


def share(measure: dict[str, float | None], *, interval: bool = True) -> str:
    """``78.0% (74.5 to 80.7)``: a mean and its 95% interval, without it if there is none; empty if nothing was compared."""
    if measure["mean"] is None:
        return ""
    said = f"{100 * measure['mean']:.1f}%"
    if not interval or measure["low"] is None or measure["high"] is None:
        return said
    return f"{said} ({100 * measure['low']:.1f} to {100 * measure['high']:.1f})"


def nats(measure: dict[str, float | None]) -> str:
    """A KL divergence, empty if nothing was compared."""
    return "" if measure["mean"] is None else f"{measure['mean']:.3f}"


def about(record: Record, compared: str) -> str:
    """The line below a table: what was compared, over how many prompts, where and when."""
    result, machine = record.content["result"], record.content.get("machine", {})
    prompts = max(group["prompts"] for group in result["groups"])
    return (
        f"({prompts} prompts, {compared}; model `{result['model']}`, {machine.get('processor', 'unknown processor')}, "
        f"{record.content.get('date', 'no date')}; in brackets the 95% interval over prompts)"
    )


def rows_by_policy(groups: Sequence[Group], measure: str, kl: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row a policy and level, a column a budget, best first at the default budget.

    What evicts nothing stands in the column whose budget is nearest to its bytes.
    """
    budgets = sorted({group["budget"] for group in groups if isinstance(group["budget"], float)})
    cells: dict[str, dict[float, Group]] = {}
    for group in groups:
        if group["whole"] and kept_share(group) == 1:
            continue  # the full cache
        at = min(budgets, key=lambda one: abs(one - kept_share(group))) if group["whole"] else group["budget"]
        cells.setdefault(group["policy"], {})[at] = group

    def order(found: dict[float, Group]) -> tuple[bool, float]:
        at = found.get(BUDGET)
        return at is None, -((at or next(iter(found.values())))[measure]["mean"] or 0)

    columns = ["policy", *(f"{budget:.0%}" for budget in budgets), f"KL at {BUDGET:.0%}"]
    rows = [
        [
            named(next(iter(found.values()))),
            *(share(found[budget][measure]) if budget in found else "" for budget in budgets),
            nats(found[BUDGET][kl]) if BUDGET in found else "",
        ]
        for found in sorted(cells.values(), key=order)
    ]
    return columns, rows


def measured(records: Records, name: str) -> Record | None:
    """A record, None if it is unknown or was not measured yet."""
    record = records.get(name)
    try:
        return record if record and record.content else None
    except InputError:
        return None


def from_record(name: str) -> Callable[[Callable[[Record], str]], Callable[[Records], str]]:
    """Give a table its record; until that was measured the table says so."""

    def of(function: Callable[[Record], str]) -> Callable[[Records], str]:
        def read(records: Records) -> str:
            record = measured(records, name)
            return function(record) if record else f"*The record `{name}` was not measured yet.*"

        read.__name__ = function.__name__
        return read

    return of


@table
@from_record(SUMMARIES)
def choose_summaries(record: Record) -> str:
    """All policies and levels on long answers: same token after the lookahead, by budget."""
    result = record.content["result"]
    after = result["after"]
    measure, kl = ("agreement_after", "kl_after") if after else ("agreement", "kl_mean")
    columns, rows = rows_by_policy(result["groups"], measure, kl)
    compared = f"tokens after the first {after} of an answer" if after else "all tokens of an answer"
    return markdown(columns, rows) + "\n\n" + about(record, compared)


@table
@from_record(QUESTIONS)
def choose_questions(record: Record) -> str:
    """All policies and levels on questions: same token over the whole answer, by budget."""
    columns, rows = rows_by_policy(record.content["result"]["groups"], "agreement", "kl_mean")
    return markdown(columns, rows) + "\n\n" + about(record, "all tokens of an answer")


@table
def choose_advice(records: Records) -> str:
    """What to take for what, each with its number."""
    rows: list[list[str]] = []
    if summaries := measured(records, SUMMARIES):
        rows += summary_advice(summaries.content["result"])
    if questions := measured(records, QUESTIONS):
        rows += question_advice(questions.content["result"])
    levels = {row["level"]: row for row in records["levels"].get("rows")}
    peaks = ", ".join(f"{name} {levels[name]['peak_bytes'] / MIB:.1f}" for name in ("lean", "balanced", "best"))
    full = levels["full cache"]["peak_bytes"] / MIB
    rows.append(["the lowest peak while the prompt is read", "lean, with a [profile](policies.md#profiles)",
                 f"held at most, of {full:.1f} MiB of the full cache: {peaks} MiB (2,048 tokens)"])  # fmt: skip
    return markdown(["you want", "take", "same tokens as the full cache, or bytes"], rows)


def summary_advice(result: dict[str, Any]) -> Iterable[list[str]]:
    """Rows on long answers."""
    measure = "agreement_after" if result["after"] else "agreement"
    found = {level_of(group["policy"]): group for group in result["groups"] if group["budget"] == BUDGET}
    yield ["a summary, or a long answer", '`quality="balanced"`', beside(found, "balanced", measure)]
    yield ["the same, with a peak below the full cache", "lean `winnow`", beside(found, "lean", measure)]
    yield ["the same, and a pause does no harm", '`quality="best"`', beside(found, "best", measure)]
    for group in result["groups"]:
        if group["whole"] and kept_share(group) < 1:
            yield [f"{kept_share(group):.0%} of the bytes are few enough", f"`{group['policy']}`", share(group[measure])]


def question_advice(result: dict[str, Any]) -> Iterable[list[str]]:
    """The row on questions."""
    found = {level_of(group["policy"]): group for group in result["groups"] if group["budget"] == BUDGET}
    means = {name: group["agreement"]["mean"] or 0.0 for (name, level), group in found.items() if level == "lean"}
    best = max(means, key=lambda name: means[name])
    # One hidden fact and the words of an answer are two questions: docs/choose.md says which policy finds the fact.
    take = "lean `winnow`" if best == "winnow" else f"lean `winnow` for single facts, `{best}` for the answer's words"
    yield ["an answer to a question, often short", take, beside(found, "lean", "agreement")]


def beside(found: dict[tuple[str, str], Group], level: str, measure: str) -> str:
    """``winnow`` of a level at the default budget, and the best other policy of that level, whichever is ahead."""
    others = [(group[measure]["mean"], name) for (name, its), group in found.items() if its == level and name != "winnow"]
    said = share(found["winnow", level][measure]) if ("winnow", level) in found else "not measured"
    best = max((one for one in others if one[0] is not None), default=None)
    if not best:
        return f"at {BUDGET:.0%} {said}"
    other = found[best[1], level]
    return f"at {BUDGET:.0%} {said}; best other `{best[1]}` {share(other[measure])}{held_more(other)}"
