"""Tokens a second against the memory of keys and values, and what engines reach in a fixed memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes

from website.figures.bench import BARS, CACHES, PLAIN, WINNOW, Step, memory, read_engines, read_steps
from website.figures.style import INK, MIDDLE, SMALL, canvas, caption, dark, dress, save
from website.records import Record

RECORDS = ("bench",)
CONTEXT, LIMIT = 4096, 256  # tokens of a prompt, and MiB of the second table
TICKS = (10, 30, 100, 300, 1000)


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw it. Raises InputError if the record is missing or lacks a table."""
    record = records["bench"]
    figure = canvas(3.9)
    left, right = figure.add_axes((0.075, 0.245, 0.4, 0.65)), figure.add_axes((0.555, 0.245, 0.42, 0.65))
    lines(left, [step for step in read_steps(record) if step.context == CONTEXT])
    bars(right, read_engines(record))
    note = f"prompts of {CONTEXT:,} tokens in bfloat16; left: decode steps alone, 12% kept, bytes by the model's shape"
    caption(figure, record, more=note)
    return save(figure, folder, "throughput")


def lines(panel: Axes, steps: list[Step]) -> None:
    """A fixed number of requests at once: tokens a second of their steps against the bytes that they hold."""
    dress(panel, "MiB of keys and values", "tokens a second", "Steps of one and of eight requests")
    panel.set_xscale("log")
    panel.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
    panel.set_xticks([], minor=True)
    panel.set_xlim(6, 1600)
    panel.set_ylim(0, 1.2 * max(1000 * step.batch / step.ms for step in steps))
    for name, what in ((WINNOW, "winnow"), (PLAIN, "full cache")):
        look = CACHES[name]
        found = [(memory(name, CONTEXT, step.batch), 1000 * step.batch / step.ms, step) for step in steps if step.cache == name]
        panel.plot([at for at, _, _ in found], [pace for _, pace, _ in found], **look.fields)
        for at, pace, step in found:
            above = step.batch > 1
            panel.annotate(
                f"{what}, {step.batch}", (at, pace), xytext=(0, 9) if above else (9, -6), ha="center" if above else "left",
                textcoords="offset points", fontsize=MIDDLE, color=dark(look.colour),
                fontweight="bold" if look.width > 2 else "normal",
            )  # fmt: skip


def bars(panel: Axes, engines: Mapping[str, tuple[int, float]]) -> None:
    """Tokens a second of engines that have so much memory for keys and values, and how many requests run at once there."""
    dress(panel, "tokens a second", "", f"As many requests as fit into {LIMIT} MiB")
    panel.set_xlim(0, 1.55 * max(pace for _, pace in engines.values()))
    panel.set_ylim(-len(engines) + 0.4, 0.7)
    panel.set_yticks([])
    panel.grid(visible=False, axis="y")
    for place, (name, (requests, pace)) in enumerate(engines.items()):
        look = BARS[name]
        panel.barh(-place - 0.12, pace, height=0.42, color=look.colour)
        panel.text(
            2, 0.13 - place, name, fontsize=MIDDLE, va="bottom", color=INK, fontweight="bold" if look.width > 2 else None
        )
        panel.text(pace + 4, -place - 0.12, f"{pace:.0f}, {requests} requests", fontsize=SMALL + 1, va="center", color=INK)
