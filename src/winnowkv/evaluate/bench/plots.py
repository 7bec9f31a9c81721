"""The two pictures of a bench: decode time against the context, and throughput against KV memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnowkv.budget import budget_text
from winnowkv.evaluate.bench.cells import Cell
from winnowkv.evaluate.report.plot import MARKERS, tokens_label
from winnowkv.policies import policy as make_policy
from winnowkv.report import MIB

TRANSFORMERS_LABELS = {"dynamic": "transformers, dynamic cache", "static": "transformers, static cache",
          "quantized": "transformers, quantized cache"}  # fmt: skip
TRANSFORMERS_COLOURS = {"dynamic": "black", "static": "tab:gray", "quantized": "silver"}


def decode_lines(lines: Sequence[Cell], file: Path) -> None:
    """Draw milliseconds per token of one request against its context, medians with quartiles, as PNG."""
    figure, panel = canvas()
    for number, (label, points) in enumerate(decode_series(lines).items()):
        contexts, middle, low, high = zip(*points, strict=True)
        around = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        panel.errorbar(contexts, middle, yerr=around, label=label, capsize=2, **look(label, number))
    panel.set_xscale("log", base=2)
    ticks = sorted({line["context"] for line in lines})
    panel.set_xticks(ticks, [tokens_label(tick) if tick % 1024 else f"{tick // 1024}k" for tick in ticks])
    panel.set_xlabel("prompt tokens", fontsize=9)
    panel.set_ylabel("decode, ms a token", fontsize=9)
    finish(figure, panel, file)


def decode_series(lines: Sequence[Cell]) -> dict[str, list[tuple[float, ...]]]:
    """Per label, the points (context, median, quartiles) of one request's steps, ascending; transformers' caches once."""
    series: dict[str, dict[int, tuple[float, ...]]] = {}
    for line in lines:
        if line["batch"] != 1:
            continue
        for name, spread in line.get("ms", {}).items():
            if (label := label_of(line, name)) is not None:
                point = (line["context"], *(spread[key] for key in ("median", "low", "high")))
                series.setdefault(label, {}).setdefault(line["context"], point)
    return {label: [points[context] for context in sorted(points)] for label, points in sorted(series.items(), key=order)}


def throughput_points(decode: Sequence[Cell], serve: Sequence[Cell], file: Path) -> None:
    """Draw decode tokens per second against the bytes of keys and values, a point for each batch, as PNG.

    The context shown is that of :func:`shown_context`. Stars are engines in a given KV memory.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure, panel = canvas()
    for number, (label, points) in enumerate(throughput_series(decode, serve).items()):
        sizes, paces = [size / MIB for size, _, _ in points], [pace for _, pace, _ in points]
        panel.plot(sizes, paces, label=label, **look(label, number))
        for size, pace, batch in points:
            panel.annotate(str(batch), (size / MIB, pace), xytext=(3, 4), textcoords="offset points", fontsize=7)
    for line in serve:
        if "tokens_s" in line:
            label = f"engine, {setting(line)}{', compiled' if line['compiled'] else ''}"
            at = (line["kv_bytes"] / MIB, line["tokens_s"]["median"])
            panel.plot(*at, "*", markersize=11, label=f"{label}: {line['fits']} requests in {line['kv_memory'] / MIB:.0f} MiB")
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("MiB of keys and values; numbers are requests at once", fontsize=9)
    panel.set_ylabel("decode, tokens a second", fontsize=9)
    panel.set_title(f"prompts of {shown_context(decode, serve)} tokens", fontsize=9)
    finish(figure, panel, file)


def throughput_series(decode: Sequence[Cell], serve: Sequence[Cell]) -> dict[str, list[tuple[float, float, int]]]:
    """Per label, the points (bytes, tokens per second, batch) of one context, by batch."""
    context = shown_context(decode, serve)
    series: dict[str, dict[int, tuple[float, float, int]]] = {}
    for line in decode:
        for name, pace in line.get("tokens_s", {}).items():
            label = label_of(line, name)
            if line["context"] == context and label is not None and name not in ("static", "quantized"):
                point = (line["kv_bytes"][name], pace, line["batch"])
                series.setdefault(label, {}).setdefault(line["batch"], point)
    return {label: [points[batch] for batch in sorted(points)] for label, points in sorted(series.items(), key=order)}


def shown_context(decode: Sequence[Cell], serve: Sequence[Cell]) -> int:
    """The context of the engine's requests if decode steps were measured at it, else the longest."""
    contexts = {line["context"] for line in decode if "tokens_s" in line}
    return int(next((line["context"] for line in serve if line["context"] in contexts), max(contexts)))


def label_of(line: Cell, name: str) -> str | None:
    """The label of a cache; None for the native context, which is not drawn since its length depends on the budget."""
    if name in TRANSFORMERS_LABELS:
        return TRANSFORMERS_LABELS[name]
    return None if name == "native" else f"{setting(line)}{name.removeprefix('slots')}"


def setting(line: Cell) -> str:
    """A policy, with its budget if it evicts."""
    return f"{line['policy']} at {budget_text(line['budget'])}" if make_policy(line["policy"]).evicts else line["policy"]


def order(item: tuple[str, Any]) -> bool:
    """Sort key that puts transformers' caches after ours."""
    return item[0] in TRANSFORMERS_LABELS.values()


def look(label: str, number: int) -> dict[str, Any]:
    """Colour and marker of a series: transformers' caches are grey."""
    grey = next((TRANSFORMERS_COLOURS[name] for name, text in TRANSFORMERS_LABELS.items() if text == label), None)
    return {
        "color": grey or f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "linestyle": "--" if grey else "-",
        "markersize": 5, "linewidth": 1.2,
    }  # fmt: skip


def canvas() -> tuple[Any, Any]:
    """A figure, drawn without a display, and its panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def finish(figure: Any, panel: Any, file: Path) -> None:
    """Start the y axis at zero, put a legend beside the panel, and write the file."""
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.tick_params(labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(file, dpi=120)
