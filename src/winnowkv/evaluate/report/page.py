"""``report.html``: one page with the whole summary that opens without a network and can be read without JavaScript."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from winnowkv.evaluate.report import charts
from winnowkv.evaluate.report.store import replace_text
from winnowkv.evaluate.report.summary import (
    OVER_ROWS,
    OVER_TASKS,
    Line,
    failed,
    group_budget_text,
    machine_text,
    short_budget_text,
)
from winnowkv.report import MIB

MAX_FAILURES_LISTED = 50  # the rest is in results.jsonl
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
PROTOCOLS = {
    "official": "The question is part of the prompt that is compressed, as in the published tables.",
    "context-only": "The text is compressed before the question is known.",
}


def write_page(summary: dict[str, Any], lines: Sequence[Line], config: dict[str, Any], file: Path) -> None:
    """Write the page of a summary and the lines it was made of. Raises InputError if the file cannot be written."""
    replace_text(file, render(summary, lines, config), "report ")


def render(summary: dict[str, Any], lines: Sequence[Line], config: dict[str, Any]) -> str:
    """The page's HTML. All texts of models, prompts and settings are escaped; only the package's script may run."""
    data = files("winnowkv.evaluate.report") / "data"
    script = (data / "report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "score": lambda value: DASH if value is None else f"{100 * value:.1f}",
        "signed": lambda value: DASH if value is None else f"{100 * value:+.1f}".replace("-", MINUS),
        "interval": interval,
        "percent": lambda value: DASH if value is None else f"{100 * value:.3g}%",
        "mib": lambda value: DASH if value is None else f"{value / MIB:.1f}",
        "ms": lambda value: DASH if value is None else f"{value:.3g}",
        "budget": group_budget_text,
        "asked": short_budget_text,
        "plain": plain,
        "breakable": lambda text: Markup(escape(text).replace(":", Markup(":<wbr>")).replace("/", Markup("/<wbr>"))),
    }
    return environment.from_string((data / "report.html").read_text(encoding="utf-8")).render(
        summary=summary,
        sections=[section(one) for one in summary["sections"]],
        rows=table_rows(summary["sections"]),
        several_models=len({(one["model"], one["dtype"]) for one in summary["sections"]}) > 1,
        facts=facts(summary),
        failures=[(line, failed(line)) for line in lines if failed(line)][:MAX_FAILURES_LISTED],
        failed_rows=sum(failed(line) is not None for line in lines),
        config=config,
        style=Markup((data / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        over_tasks=OVER_TASKS,
    )  # fmt: skip


def facts(summary: dict[str, Any]) -> dict[str, str]:
    """Facts at the top of the page, by name."""
    sections = summary["sections"]
    versions = " · ".join(f"{name} {', '.join(values)}" for name, values in summary["versions"].items())
    return {
        "model": ", ".join(dict.fromkeys(f"{one['model']} in {one['dtype']}" for one in sections)),
        "machine": machine_text(summary["machine"]),
        "versions": versions or "unknown",
        "git": ", ".join(summary["git"]) or "unknown",
        "seed": ", ".join(map(str, summary["seeds"])) or "unknown",
        "measurements": str(summary["lines"]),
    }


def section(summary: dict[str, Any]) -> dict[str, Any]:
    """A section with its charts; colours are given in the order of the policies."""
    policies = list(dict.fromkeys(group["policy"] for group in summary["groups"]))
    overall = [group for group in summary["groups"] if group["task"] == OVER_TASKS and group["score"] is not None]
    return {
        **summary,
        "about": PROTOCOLS.get(summary["protocol"], ""),
        "legend": [(policy, Markup(charts.marker(index))) for index, policy in enumerate(policies)],
        "by_fraction": Markup(_scatter(overall, policies, "kept_fraction", 1, "kept entries", lambda x: f"{100 * x:.3g}%")),
        "by_bytes": Markup(_scatter(overall, policies, "kept_bytes", MIB, "kept MiB a prompt", lambda x: f"{x:.3g}")),
        "bars": _bars(summary, policies),
    }


def _scatter(groups: Sequence[dict[str, Any]], policies: Sequence[str], field: str, unit: float, label: str, show: Any) -> str:
    series = []
    for policy in policies:
        mine = [group for group in groups if group["policy"] == policy and group[field]]
        points = [charts.Point(group[field] / unit, *_hundredfold(group), f"{policy} at {group_budget_text(group)}: "
                               f"{_score(group)}, {show(group[field] / unit)} {label}") for group in mine]  # fmt: skip
        series.append(charts.Series(policy, points))
    return charts.scatter(series, label, show) if any(one.points for one in series) else ""


def _bars(summary: dict[str, Any], policies: Sequence[str]) -> list[dict[str, Any]]:
    """One panel per budget with a chart per task and a bar per policy. A policy that evicts nothing is in every panel."""
    groups = [
        group for group in summary["groups"] if group["task"] not in (OVER_TASKS, OVER_ROWS) and group["score"] is not None
    ]
    if not groups:
        return []
    top = charts.ceiling([value for group in groups for value in _hundredfold(group) if value is not None])
    budgets = dict.fromkeys(group_budget_text(group) for group in groups if not group["whole"]) or {"all": None}
    panels = []
    for budget in budgets:
        by_task: dict[str, list[Any]] = {}
        for group in groups:
            if group["whole"] or group_budget_text(group) == budget:
                drawn = Markup(charts.bar(*_hundredfold(group), top, policies.index(group["policy"])))
                by_task.setdefault(group["task"], []).append((group, drawn, _score(group)))
        panels.append({"budget": budget, "tasks": by_task, "top": f"{top:g}"})
    return panels


def table_rows(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All groups of all sections, means over everything first."""
    rows = [{"protocol": one["protocol"], "model": f"{one['model']} in {one['dtype']}", **group}
            for one in sections for group in one["groups"]]  # fmt: skip
    return sorted(rows, key=lambda row: row["task"] not in (OVER_TASKS, OVER_ROWS))


def interval(group: dict[str, Any]) -> str:
    """A 95% interval in points of 100, a dash if there is none."""
    if group["low"] is None:
        return DASH
    return f"{100 * group['low']:.1f} to {100 * group['high']:.1f}".replace("-", MINUS)


def plain(value: Any) -> str:
    """A setting's value as text."""
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _hundredfold(group: dict[str, Any]) -> tuple[float, float | None, float | None]:
    low, high = (None if group[end] is None else 100 * group[end] for end in ("low", "high"))
    return 100 * group["score"], low, high


def _score(group: dict[str, Any]) -> str:
    known = f" ({interval(group)})" if group["low"] is not None else ""
    return f"{100 * group['score']:.1f}{known}"
