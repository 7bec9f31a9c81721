"""Summary of a bench: its cells by kind, how compression time grows with the prompt, and whether each target is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from winnowkv.budget import budget_text
from winnowkv.evaluate.bench.bench import Bench, identity
from winnowkv.evaluate.bench.cells import Cell
from winnowkv.evaluate.report.machine import machine, versions
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.evaluate.settings import Setting
from winnowkv.policies import policy as make_policy

KINDS = ("prefill", "decode", "flat", "serve", "growth")
SHARED_FIELDS = ("versions", "git", "kind")
SHORT_CONTEXT, LONG_CONTEXT = 2048, 8192  # contexts at which targets are set
Target = dict[str, Any]


def write_summary(bench: Bench, store: ResultStore, model: str) -> dict[str, Any]:
    """Write ``bench.json`` and pictures of all that the store holds of this bench; returns the summary."""
    from winnowkv.evaluate.bench.plots import decode_lines, throughput_points

    summary = summarize(bench, store.lines, model)
    write_json(store.folder / "bench.json", summary)
    measured = [line for line in summary["decode"] if "ms" in line]
    if any(line["batch"] == 1 for line in measured):
        decode_lines(summary["decode"], store.folder / "decode.png")
    if measured:
        throughput_points(summary["decode"], summary["serve"], store.folder / "throughput.png")
    return summary


def summarize(bench: Bench, lines: Sequence[Cell], model: str) -> dict[str, Any]:
    """The measured cells of this bench by kind, in the order asked, with slopes and targets."""
    wanted = [identity(cell) for cell in bench.cells()]
    found = {identity(line): line for line in lines}
    mine = [found[key] for key in wanted if key in found]
    by_kind = {kind: [plain(line) for line in mine if line["kind"] == kind] for kind in KINDS}
    revisions = sorted({line["git"] or "unknown" for line in mine})
    notes = [f"measured on several revisions of the code: {', '.join(revisions)}"] if len(revisions) > 1 else []
    slopes = slopes_of(by_kind["prefill"])
    return {
        "model": model, "machine": machine(), "versions": versions(), "git": revisions, "lines": len(mine),
        "expected_lines": len(wanted), **by_kind, "slopes": slopes, "bars": targets(bench, by_kind, slopes), "notes": notes,
    }  # fmt: skip


def plain(line: Cell) -> Cell:
    """A line without the fields that all lines share."""
    return {name: value for name, value in line.items() if name not in SHARED_FIELDS}


def slopes_of(lines: Iterable[Cell]) -> list[dict[str, Any]]:
    """How compression time grows with the prompt, for each evicting setting measured at two contexts or more."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for line in lines:
        if make_policy(line["policy"]).evicts:
            groups.setdefault((line["policy"], str(line["budget"])), []).append(line)
    return [
        {
            "policy": group[0]["policy"], "budget": group[0]["budget"], "contexts": [line["context"] for line in group],
            "slope": slope([line["prompt_tokens"] for line in group], [line["compress_s"]["median"] for line in group]),
        }
        for group in groups.values()
        if len(group) > 1
    ]  # fmt: skip


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent with which seconds grow with size, fitted in logarithms: 1 means that twice the size takes twice as long."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def targets(bench: Bench, by_kind: dict[str, list[Cell]], slopes: Sequence[dict[str, Any]]) -> list[Target]:
    """All targets of speed and memory for each setting: the value, and whether it is met; None if it was not measured."""
    evicting = [one for one in bench.settings if make_policy(one.policy).evicts]
    found = [each for one in evicting for each in targets_of(one, bench.compile, by_kind, slopes)]
    for line in by_kind["flat"]:
        ends = f"{line['longest']} over {line['shortest']} prompt tokens"
        value = line["long_over_short"]["median"]
        found.append(target(f"decode at equal kept entries, {ends}, {line['policy']}", value, "within 0.05 of", 1.0))
    for line in by_kind["growth"]:
        grown = f"memory after {line['requests']} requests over that after the first {line['first']}, {line['policy']}"
        found.append(target(grown, 1 + line["growth"] if "growth" in line else None, "<=", 1.02))
    return found


def targets_of(
    one: Setting, compiled: bool, by_kind: dict[str, list[Cell]], slopes: Sequence[dict[str, Any]]
) -> Iterator[Target]:
    """The targets of one setting."""
    name = f"{one.policy} at {budget_text(one.budget)}"

    def measured(kind: str, **fields: Any) -> Cell | None:
        return pick(by_kind[kind], one, fields)

    for context, limit in ((SHORT_CONTEXT, 1.03), (LONG_CONTEXT, 1.02)):
        value = nested(measured("prefill", context=context), "over_plain", "median")
        yield target(f"prefill over plain prefill at {context // 1024}k, {name}", value, "<=", limit)
    rows = {batch: measured("decode", context=LONG_CONTEXT, batch=batch, compiled=False) for batch in (1, 8)}
    value = nested(rows[1], "over", "native", "median")
    yield target(f"decode after 8k over a native context as long as what is kept, {name}", value, "<=", 1.03)
    for batch, least in ((1, 1.9), (8, 4.0)):
        value = inverse(nested(rows[batch], "over", "dynamic", "median"))
        yield target(f"decode speed-up over the full dynamic cache at 8k, batch {batch}, {name}", value, ">=", least)
    graph = measured("decode", context=LONG_CONTEXT, batch=1, compiled=True)
    value = nested(graph, "over", "native", "median")
    yield target(f"compiled decode over eager transformers on the same kept length, {name}", value, "<=", 0.75)
    if compiled:
        value = inverse(nested(graph, "over", "dynamic", "median"))
        yield target(f"decode speed-up over the full dynamic cache at 8k, batch 1, compiled, {name}", value, ">=", 1.9)
    value = next((fit["slope"] for fit in slopes if matches(fit, one)), None)
    yield target(f"compression time, slope over contexts, {name}", value, "within 0.1 of", 1.0)
    for with_graphs in (False, True) if compiled else (False,):
        line, how = measured("serve", compiled=with_graphs), ", compiled" if with_graphs else ""
        fits = line["fits"] / line["plain_fits"] if line and line.get("fits") and line["plain_fits"] else None
        yield target(f"requests that fit in the KV memory over the full cache's{how}, {name}", fits, ">=", 8.0)
        value = nested(line, "speedup", "median")
        yield target(f"decode tokens a second in the KV memory over the full cache's{how}, {name}", value, ">=", 3.0)


def target(name: str, value: float | None, comparison: str, limit: float) -> Target:
    """A target, and whether the value meets it; ``comparison`` is ``<=``, ``>=`` or ``within x of``."""
    tests: dict[str, Callable[[float], bool]] = {"<=": lambda v: v <= limit, ">=": lambda v: v >= limit}
    if comparison not in tests:
        distance = float(comparison.split()[1])
        tests[comparison] = lambda v: abs(v - limit) <= distance
    met = None if value is None else tests[comparison](value)
    return {"name": name, "value": value, "target": f"{comparison} {limit:g}", "met": met}


def pick(lines: Iterable[Cell], one: Setting, fields: dict[str, Any]) -> Cell | None:
    """The line of a setting with these field values; None if it was not measured."""
    return next((line for line in lines if matches(line, one) and all(line.get(k) == v for k, v in fields.items())), None)


def matches(line: Cell, one: Setting) -> bool:
    """Whether a line is of this setting."""
    return Setting(line["policy"], line["budget"]) == one


def nested(line: Cell | None, *path: str) -> float | None:
    """A nested value of a line; None if it has none."""
    value: Any = line
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    number: float | None = value
    return number


def inverse(value: float | None) -> float | None:
    """The speed-up that a ratio of seconds means."""
    return None if value is None else 1 / value
