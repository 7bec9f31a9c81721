"""The tables that winnow_parts.py prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from winnowkv.cli.tables import ResultTable, keys, numbers as number_columns, say
from winnowkv.evaluate.report.plot import same

COLUMNS = {"needles": ("found",), "texts": ("rows", "same token", "KL, nats", "same token - best", "KL - best")}
Line = dict[str, Any]


def show(summary: Line) -> None:
    """Print the table: a row for each setting, a section for each budget."""
    where, of, rows = summary["machine"], summary["config"], summary["rows"]
    ran = f"{of['model']} in {of['dtype']}, {where['accelerator'] or where['processor']}, {where['threads']} threads"
    columns = [*keys("variant", "budget"), *number_columns(COLUMNS[summary["table"]])]
    title = f"Parts of winnow, {summary['table']}: {ran}"
    if summary["table"] == "needles":
        show_rows(columns, title, rows, lambda row: [f"{row['found']} of {row['prompts']}"])
    else:
        late = f"after {rows[0]['after']}"
        show_rows(columns, f"{title}; all tokens but the first", rows, text_cells)
        if any(row["prompts_after"] for row in rows):
            print()
            show_rows(columns, f"Of the same answers the tokens {late}", rows, partial(text_cells, which="_after"))
        print()
        means = ("rows", "same\ntoken", "KL\nnats", f"same\n{late}", f"KL\n{late}")
        show_rows([*keys("variant", "budget"), *number_columns(means)], "The means of both", rows, mean_cells)
    for budget, best in {str(row["budget"]): row.get("against") for row in rows}.items():
        if best:
            say(f"best published by KL at {budget}: {best}")
    say(f"{summary['prompts']} prompts asked; counted are those with a result for all settings; files in {summary['folder']}")


def show_rows(columns: Sequence[Any], title: str, rows: Sequence[Line], cells: Callable[[Line], list[str]]) -> None:
    """Print a table of all settings."""
    table = ResultTable(columns, title)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add(row["policy"], str(row["budget"]), *cells(row))
        if following is not None and not same(following["budget"], row["budget"]):
            table.section()
    table.print()


def text_cells(row: Line, which: str = "") -> list[str]:
    """Rows, both means and both differences, each with its interval; ``which``: ``_after`` for the later tokens."""
    if not row[f"prompts{which}"]:
        return ["0", *["-"] * 4]
    forms = {"agreement": "{:.1f}%", "kl_mean": "{:.3f}", "agreement_difference": "{:+.1f}", "kl_mean_difference": "{:+.3f}"}
    cells = (interval(row[f"{name}{which}"], form, 100 if "agree" in name else 1) for name, form in forms.items())
    return [str(row[f"prompts{which}"]), *cells]


def mean_cells(row: Line) -> list[str]:
    """Rows and the means alone, of all tokens and of the later ones."""
    forms = {"agreement": "{:.1f}%", "kl_mean": "{:.3f}", "agreement_after": "{:.1f}%", "kl_mean_after": "{:.3f}"}
    means = {name: row[name][0] for name in forms}
    shown = [
        "-" if mean is None else forms[name].format(mean * (100 if "agree" in name else 1)) for name, mean in means.items()
    ]
    return [str(row["prompts"]), *shown]


def interval(numbers: Sequence[float | None], form: str, times: int) -> str:
    """A mean and its interval; a single row has no interval."""
    center, *ends = (form.format(times * number) for number in numbers if number is not None)
    return f"{center} ({' to '.join(ends)})" if ends else center
