"""What a bench says in all: its cells by kind, how compression grows with the prompt, and whether each target is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from winnowkv.budget import spoken
from winnowkv.evaluate.bench.bench import Bench, Cell, identity
from winnowkv.evaluate.report.machine import machine, versions
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.evaluate.settings import Setting
from winnowkv.policies import policy as make_policy

KINDS = ("prefill", "decode", "flat", "serve", "growth")
HARNESS = ("versions", "git", "kind")
SHORT, LONG = 2048, 8192  # contexts that the targets speak of
Bar = dict[str, Any]


def write_summary(bench: Bench, store: ResultStore, model: str) -> dict[str, Any]:
    """Everything that the store holds of this bench, as ``bench.json`` and pictures beside it; returned, too."""
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
        "expected_lines": len(wanted), **by_kind, "slopes": slopes, "bars": bars(bench, by_kind, slopes), "notes": notes,
    }  # fmt: skip


def plain(line: Cell) -> Cell:
    """A line without what all of them share."""
    return {name: value for name, value in line.items() if name not in HARNESS}


def slopes_of(lines: Iterable[Cell]) -> list[dict[str, Any]]:
    """How compression seconds grow with the prompt, for each setting measured at two contexts or more that evicts."""
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
    """The exponent by which seconds grow with size: 1 where twice the size takes twice as long (a fit in logarithms)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def bars(bench: Bench, by_kind: dict[str, list[Cell]], slopes: Sequence[dict[str, Any]]) -> list[Bar]:
    """Each target of speed and memory for each setting: its value, and whether it is met; None where it was not measured."""
    evicting = [one for one in bench.settings if make_policy(one.policy).evicts]
    found = [each for one in evicting for each in bars_of(one, bench.compile, by_kind, slopes)]
    for line in by_kind["flat"]:
        ends = f"{line['longest']} over {line['shortest']} prompt tokens"
        value = line["long_over_short"]["median"]
        found.append(bar(f"decode at equal kept entries, {ends}, {line['policy']}", value, "within 0.05 of", 1.0))
    for line in by_kind["growth"]:
        grown = f"memory after {line['requests']} requests over that after the first {line['first']}, {line['policy']}"
        found.append(bar(grown, 1 + line["growth"] if "growth" in line else None, "<=", 1.02))
    return found


def bars_of(one: Setting, compiled: bool, by_kind: dict[str, list[Cell]], slopes: Sequence[dict[str, Any]]) -> Iterator[Bar]:
    """The targets of one setting."""
    name = f"{one.policy} at {spoken(one.budget)}"

    def at(kind: str, **where: Any) -> Cell | None:
        return pick(by_kind[kind], one, where)

    for context, limit in ((SHORT, 1.03), (LONG, 1.02)):
        value = of(at("prefill", context=context), "over_plain", "median")
        yield bar(f"prefill over plain prefill at {context // 1024}k, {name}", value, "<=", limit)
    rows = {batch: at("decode", context=LONG, batch=batch, compiled=False) for batch in (1, 8)}
    value = of(rows[1], "over", "native", "median")
    yield bar(f"decode behind 8k over a native context as long as what is kept, {name}", value, "<=", 1.03)
    for batch, least in ((1, 1.9), (8, 4.0)):
        value = inverse(of(rows[batch], "over", "dynamic", "median"))
        yield bar(f"decode speed-up over the full dynamic cache at 8k, batch {batch}, {name}", value, ">=", least)
    graph = at("decode", context=LONG, batch=1, compiled=True)
    value = of(graph, "over", "native", "median")
    yield bar(f"compiled decode over eager transformers on the same kept length, {name}", value, "<=", 0.75)
    if compiled:
        value = inverse(of(graph, "over", "dynamic", "median"))
        yield bar(f"decode speed-up over the full dynamic cache at 8k, batch 1, compiled, {name}", value, ">=", 1.9)
    value = next((fit["slope"] for fit in slopes if matches(fit, one)), None)
    yield bar(f"compression time, slope over contexts, {name}", value, "within 0.1 of", 1.0)
    for through in (False, True) if compiled else (False,):
        line, how = at("serve", compiled=through), ", compiled" if through else ""
        fits = line["fits"] / line["plain_fits"] if line and line.get("fits") and line["plain_fits"] else None
        yield bar(f"requests that fit in the KV memory over the full cache's{how}, {name}", fits, ">=", 8.0)
        value = of(line, "speedup", "median")
        yield bar(f"decode tokens a second in the KV memory over the full cache's{how}, {name}", value, ">=", 3.0)


def bar(name: str, value: float | None, way: str, target: float) -> Bar:
    """A target, and whether the value meets it; ``way`` is ``<=``, ``>=`` or ``within x of``."""
    tests: dict[str, Callable[[float], bool]] = {"<=": lambda v: v <= target, ">=": lambda v: v >= target}
    if way not in tests:
        apart = float(way.split()[1])
        tests[way] = lambda v: abs(v - target) <= apart
    return {"name": name, "value": value, "target": f"{way} {target:g}", "met": None if value is None else tests[way](value)}


def pick(lines: Iterable[Cell], one: Setting, where: dict[str, Any]) -> Cell | None:
    """The line of a setting at these values; None where it was not measured."""
    return next((line for line in lines if matches(line, one) and all(line.get(k) == v for k, v in where.items())), None)


def matches(line: Cell, one: Setting) -> bool:
    """Whether a line is of this setting."""
    return Setting(line["policy"], line["budget"]) == one


def of(line: Cell | None, *path: str) -> float | None:
    """A value inside a line; None where it has none."""
    value: Any = line
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def inverse(value: float | None) -> float | None:
    """How many times faster, of a ratio of seconds."""
    return None if value is None else 1 / value
