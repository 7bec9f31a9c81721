"""Summary of an evaluation: scores, bytes and times of each setting, and each setting compared with the full cache.

Every protocol, model and dtype is a section of its own: nothing is averaged or paired across sections.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from winnowkv.budget import Asked
from winnowkv.evaluate.report.stats import mean_interval, paired, small

Line = dict[str, Any]
RowKey = tuple[str, Any]  # task and row
FullAnswers = dict[RowKey, Line]  # lines of the full cache
OVER_TASKS = "mean over tasks"
OVER_ROWS = "mean over rows"
BASELINE = "full"
MAX_WORST_ROWS = 5  # largest losses shown in a section
MAX_REASONS = 3  # failures with a note of their own, most frequent first


def section_of(line: Line) -> tuple[str, str, str]:
    """What lines must share to be averaged or paired: protocol, model, dtype."""
    return line["protocol"], str(line["model"]), str(line["dtype"])


def setting_of(line: Line) -> tuple[str, str, Asked]:
    """Policy and budget; 1 entry and the fraction 1.0 are two budgets."""
    return line["policy"], type(line["budget"]).__name__, line["budget"]


def failed(line: Line) -> str | None:
    """Why a line has no score; None if it has one."""
    score = line["score"]
    if line.get("failed") is not None:
        return str(line["failed"])
    return "the score is not a number" if score is None or math.isnan(score) else None


def group_budget_text(group: Line) -> str:
    """A group's budget as text: ``12%``, ``128`` (entries), ``all`` if nothing was evicted."""
    return "all" if group["whole"] else short_budget_text(group["budget"])


def short_budget_text(budget: Asked) -> str:
    """A budget as text: ``12%``, ``128`` (entries), ``auto:0.95``."""
    return f"{100 * budget:g}%" if isinstance(budget, float) else str(budget)


def rows_text(group: Line) -> str:
    """Over how many rows a group's means are: ``100``, or ``97 of 100`` if not every policy answered all of them."""
    return str(group["rows"]) if group["rows"] == group["all_rows"] else f"{group['rows']} of {group['all_rows']}"


def machine_text(machine: dict[str, Any] | None) -> str:
    """A machine in one line of text."""
    if not machine:
        return "unknown machine"
    accelerator = machine.get("accelerator")
    return f"{machine.get('processor')}, {machine.get('threads')} threads{f', {accelerator}' if accelerator else ''}"


def summarize(lines: Sequence[Line], config: dict[str, Any]) -> dict[str, Any]:
    """The content of ``summary.json``, ready for JSON; unknown values are None.

    ``config`` names model, dtype and machine of the run; lines of :func:`winnowkv.evaluate.report.merge.merge` name their
    own model and dtype. ``sections`` holds for each protocol, model and dtype its ``groups`` (a policy at a budget on a
    task, or the mean over all tasks or rows), each with its comparison ``against_full``; its ``worst`` regressions; and
    ``notes``, sentences for the reader. A group's means are over ``rows`` of ``all_rows``: those that all policies answered
    at that budget (:func:`common_rows`); ``answered_rows`` and ``failed_rows`` are its own.
    """
    labelled = [{"model": config.get("model"), "dtype": config.get("dtype"), **line} for line in lines]
    sections = [_section(labelled, key) for key in dict.fromkeys(map(section_of, labelled))]
    versions = {name: _distinct(line.get("versions", {}).get(name) for line in lines)
                for name in _distinct(name for line in lines for name in line.get("versions", {}))}  # fmt: skip
    return {
        "lines": len(lines), "machine": config.get("machine"), "versions": versions,
        "git": _distinct(line.get("git") for line in lines), "seeds": _distinct(line.get("seed") for line in lines),
        "sections": sections, "notes": _page_notes(sections, versions, config),
    }  # fmt: skip


def _section(labelled: Sequence[Line], key: tuple[str, str, str]) -> dict[str, Any]:
    lines = [line for line in labelled if section_of(line) == key]
    full = {(line["task"], line["row"]): line for line in lines if line["policy"] == BASELINE and failed(line) is None}
    settings = _settings(lines, full)
    tasks = _distinct(line["task"] for line in lines)
    common, groups = common_rows(settings, full), []
    for scope in (OVER_TASKS, OVER_ROWS, *tasks):
        every = {row_key(line) for line in lines if scope in (OVER_TASKS, OVER_ROWS, line["task"])}
        for rows, counted in zip(settings, common, strict=True):
            mine = [line for line in rows if line["task"] == scope] if scope in tasks else rows
            if mine:
                groups.append(_group(scope, mine, full, counted, len(every)))
    return {
        "protocol": key[0], "model": key[1], "dtype": key[2], "tasks": _tasks(lines, tasks), "groups": groups,
        "worst": worst(lines, full), "notes": _section_notes(lines, settings, full, common),
    }  # fmt: skip


def row_key(line: Line) -> RowKey:
    """The row that a line is of."""
    return line["task"], line["row"]


def common_rows(settings: Sequence[Sequence[Line]], full: FullAnswers) -> list[set[RowKey]]:
    """For each setting the rows that its means are over: those that all policies answered at its budget, task by task.

    A policy that answered no row of a task does not count there, or nothing would be left of it. One that evicts nothing
    belongs to every budget; its own means are over the rows of the budget that has most.
    """
    answered = [{row_key(line) for line in rows if failed(line) is None} for rows in settings]
    budgets = [None if _whole(rows, full) else setting_of(rows[0])[1:] for rows in settings]
    asked: list[Any] = [one for one in dict.fromkeys(budgets) if one is not None]
    by_budget = {
        budget: _answered_by_all([rows for rows, mine in zip(answered, budgets, strict=True) if mine in (budget, None)])
        for budget in asked or [None]
    }
    most: set[RowKey] = set()
    for task in {task for rows in answered for task, _ in rows}:
        most |= max(({key for key in rows if key[0] == task} for rows in by_budget.values()), key=len)
    return [most if budget is None else by_budget[budget] for budget in budgets]


def _answered_by_all(answered: Sequence[set[RowKey]]) -> set[RowKey]:
    there = [(rows, {task for task, _ in rows}) for rows in answered]
    return {key for key in set().union(*answered) if all(key in rows for rows, tasks in there if key[0] in tasks)}


def _settings(lines: Sequence[Line], full: FullAnswers) -> list[list[Line]]:
    """The lines of each setting. A policy that evicted nothing at any budget is one setting, each row once."""
    by_policy: dict[str, list[Line]] = {}
    for line in lines:
        by_policy.setdefault(line["policy"], []).append(line)
    settings = []
    for mine in by_policy.values():
        if _whole(mine, full):
            finished_last = sorted(mine, key=lambda line: failed(line) is None)
            settings.append(list({(line["task"], line["row"]): line for line in finished_last}.values()))
            continue
        by_budget: dict[Hashable, list[Line]] = {}
        for line in mine:
            by_budget.setdefault(setting_of(line), []).append(line)
        settings += by_budget.values()
    return settings


def _whole(lines: Sequence[Line], full: FullAnswers) -> bool:
    finished = [line for line in lines if failed(line) is None]
    return bool(finished) and all(_kept_fraction(line, full) >= 1 for line in finished)


def _kept_fraction(line: Line, full: FullAnswers) -> float:
    """Kept entries over those of the full cache, or over the prompt's tokens if the full cache was not run.

    The two differ in the protocol context-only: the question is part of the prompt, but not of what is compressed.
    """
    reference = full.get((line["task"], line["row"]))
    kept: float = line["kept_entries"]
    if reference is None or not same_prompt(line, reference):
        whole: float = line["prompt_tokens"]
    else:
        whole = reference["kept_entries"]
    return kept / whole


def _group(scope: str, rows: Sequence[Line], full: FullAnswers, common: set[RowKey], all_rows: int) -> dict[str, Any]:
    """One policy at one budget: on a task, or over all tasks with equal weights for tasks or for rows.

    Its means are over the ``common`` rows, of ``all_rows``.
    """
    answered = [line for line in rows if failed(line) is None]
    finished = [line for line in answered if row_key(line) in common]
    counts = Counter(line["task"] for line in finished)
    weights = [1 / counts[line["task"]] if scope == OVER_TASKS else 1.0 for line in finished]
    strata = [line["task"] for line in finished] if scope == OVER_TASKS else None
    score, low, high = mean_interval([line["score"] for line in finished], strata=strata)

    def average(values: Iterable[float]) -> float | None:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) if finished else None

    truncated = [line["truncated_tokens"] for line in rows if line.get("truncated_tokens")]
    return {
        "task": scope, "policy": rows[0]["policy"], "budget": rows[0]["budget"], "whole": _whole(rows, full),
        "metrics": _distinct(line.get("metric") for line in finished), "tasks": len(counts),
        "rows": len(finished), "all_rows": all_rows, "answered_rows": len(answered), "failed_rows": len(rows) - len(answered),
        "truncated_rows": len(truncated), "truncated_tokens": sum(truncated),
        "score": _known(score), "low": _known(low), "high": _known(high),
        "kept_fraction": average(_kept_fraction(line, full) for line in finished),
        **{name: average(line[name] for line in finished) for name in ("kept_bytes", "full_bytes", "held_bytes")},
        "prefill_ms_per_token": _pace(finished, "prefill_s", "prompt_tokens"),
        "compress_ms_per_token": _pace(finished, "compress_s", "prompt_tokens"),
        "decode_ms_per_step": _pace(finished, "decode_s", "decode_tokens"),
        "against_full": _against_full(scope, rows, full, common),
    }  # fmt: skip


def _against_full(scope: str, rows: Sequence[Line], full: FullAnswers, common: set[RowKey]) -> dict[str, Any] | None:
    """The paired comparison with the full cache; None for the full cache itself and if it was not run."""
    references = [full.get((line["task"], line["row"])) for line in rows]
    if rows[0]["policy"] == BASELINE or not any(references):
        return None
    before = [None if other is None or not same_prompt(line, other) else other["score"]
              for line, other in zip(rows, references, strict=True)]  # fmt: skip
    after = [line["score"] if row_key(line) in common else None for line in rows]
    compared = paired(before, after, strata=[line["task"] for line in rows] if scope == OVER_TASKS else None)
    return {name: _known(value) for name, value in asdict(compared).items()}


def same_prompt(line: Line, other: Line) -> bool:
    """Whether two lines of a row had the same prompt: merged runs may differ in truncation or chat template."""
    return all(line.get(name) == other.get(name) for name in ("prompt_tokens", "prompt_tail"))


def worst(lines: Sequence[Line], full: FullAnswers) -> list[dict[str, Any]]:
    """The rows on which a setting lost most against the full cache, largest loss first, each row once.

    Of equal losses, the one with more kept entries comes first.
    """
    drops = []
    for line in lines:
        reference = full.get((line["task"], line["row"]))
        if reference is None or failed(line) or line["policy"] == BASELINE or not same_prompt(line, reference):
            continue
        if line["score"] < reference["score"]:
            drops.append((reference["score"] - line["score"], _kept_fraction(line, full), line, reference))
    drops.sort(key=lambda drop: (-drop[0], -drop[1]))
    by_row: dict[Hashable, Any] = {}
    for drop in drops:
        by_row.setdefault((drop[2]["task"], drop[2]["row"]), drop)
    return [
        {
            **{name: line.get(name) for name in ("task", "row", "policy", "budget", "prompt_tail", "answers", "metric")},
            "whole": kept >= 1, "prediction": line["prediction"], "score": line["score"],
            "full_prediction": reference["prediction"], "full_score": reference["score"],
        }
        for _, kept, line, reference in list(by_row.values())[:MAX_WORST_ROWS]
    ]  # fmt: skip


def _tasks(lines: Sequence[Line], tasks: Sequence[str]) -> list[dict[str, Any]]:
    rows = {task: {line["row"] for line in lines if line["task"] == task} for task in tasks}
    return [{"task": task, "rows": len(rows[task]), "small": small(len(rows[task]))} for task in tasks]


def _section_notes(
    lines: Sequence[Line], settings: Sequence[Sequence[Line]], full: FullAnswers, common: Sequence[set[RowKey]]
) -> list[str]:
    """Sentences on small sets, failures, truncation, and rows that some settings lack."""
    notes = []
    tasks = _tasks(lines, _distinct(line["task"] for line in lines))
    for sentence in _distinct(task["small"] for task in tasks):
        named = [task["task"] for task in tasks if task["small"] == sentence]
        every = len(named) == len(tasks) > 1
        notes.append(f"{f'Each of the {len(tasks)} tasks' if every else ', '.join(named)}: {sentence}.")
    if not full:
        notes.append(f"Policy '{BASELINE}' has no finished row here, so nothing is compared with the uncompressed cache.")
    reasons = Counter(filter(None, map(failed, lines)))
    for reason, count in reasons.most_common(MAX_REASONS):
        notes.append(f"{count} of {len(lines)} measurements failed and have no score: {reason.rstrip('.')}.")
    if len(reasons) > MAX_REASONS:
        notes.append(f"{sum(reasons.values())} measurements failed in all, for {len(reasons)} reasons.")
    cut = {(line["task"], line["row"]): line["truncated_tokens"] for line in lines if line.get("truncated_tokens")}
    if cut:
        rows = len({(line["task"], line["row"]) for line in lines})
        notes.append(
            f"{len(cut)} of {rows} prompts were longer than the context: {sum(cut.values())} tokens were cut out of them."
        )
    whole = Counter(line["policy"] for line in lines if line.get("whole"))
    for policy, count in whole.items():
        answered = [line for line in lines if line["policy"] == policy and failed(line) is None]
        notes.append(
            f"{policy}: {count} of {len(answered)} answers ended before anything was evicted, and count with the whole cache."
        )
    notes += _lacking_notes(settings, full, common)
    finished = [(line, full.get((line["task"], line["row"]))) for line in lines if failed(line) is None]
    other = sum(reference is not None and not same_prompt(line, reference) for line, reference in finished)
    if other:
        notes.append(f"{other} measurements read another prompt than the full cache did and are not paired with it.")
    return notes


def _lacking_notes(settings: Sequence[Sequence[Line]], full: FullAnswers, common: Sequence[set[RowKey]]) -> list[str]:
    """For each budget at which some policy lacks rows, a line: over how many rows means are, who lacks some, and why."""
    every = {row_key(line) for rows in settings for line in rows}
    lacking: dict[Hashable, list[str]] = {}
    sizes: dict[Hashable, tuple[str, int]] = {}
    always: list[str] = []  # what evicts nothing belongs to every budget
    for rows, counted in zip(settings, common, strict=True):
        whole = _whole(rows, full)
        budget = None if whole else setting_of(rows[0])[1:]
        answered, tasks = {row_key(line) for line in rows if failed(line) is None}, {line["task"] for line in rows}
        sizes[budget] = ("", 0) if whole else (f" at {short_budget_text(rows[0]['budget'])}", len(counted))
        missing = {key for key in every if key[0] in tasks} - answered
        if not missing:
            continue
        reasons = Counter(failed(line) for line in rows if row_key(line) in missing)
        reasons["not measured"] += len(missing) - reasons.total()
        why = "; ".join(str(reason).rstrip(".") for reason, count in reasons.most_common(MAX_REASONS) if count)
        who = f"{rows[0]['policy']} lacks {len(missing)} ({why})"
        (always if whole else lacking.setdefault(budget, [])).append(who)
    named = {budget: size for budget, size in sizes.items() if budget is not None} or {None: ("", len(common[0]))}
    return [
        f"Means{where} are over the {count} of {len(every)} rows that all policies answered: {', '.join(names)}."
        for budget, (where, count) in named.items()
        if (names := [*always, *lacking.get(budget, [])])
    ]


def _page_notes(sections: Sequence[dict[str, Any]], versions: dict[str, list[Any]], config: dict[str, Any]) -> list[str]:
    """Sentences on what differs between the sections and between merged runs."""
    notes = []
    for name, several in (("protocol", "protocols"), ("model", "models"), ("dtype", "dtypes")):
        values = _distinct(section[name] for section in sections)
        if len(values) > 1:
            notes.append(f"{len(values)} {several} ({', '.join(values)}): shown side by side, never averaged, never paired.")
    notes += [
        f"Results of several versions of {name}: {', '.join(values)}." for name, values in versions.items() if len(values) > 1
    ]
    for name, values in config.get("differs", {}).items():
        shown = [f"{machine_text(value) if name == 'machine' else value} ({folder})" for folder, value in values.items()]
        notes.append(f"The runs differ in {name}: {', '.join(shown)}.")
    if "machine" in config.get("differs", {}):
        notes.append("Times of different machines are not comparable.")
    return notes


def _pace(lines: Sequence[Line], seconds: str, tokens: str) -> float | None:
    """Median milliseconds per token."""
    paces = [1000 * line[seconds] / line[tokens] for line in lines if line[tokens]]
    return median(paces) if paces else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value is not None))
