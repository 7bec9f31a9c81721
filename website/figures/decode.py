"""The time of one decode step against the length of the prompt, for one request and for eight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from website.figures.bench import CACHES, read_steps
from website.figures.style import End, canvas, caption, dress, label_ends, save
from website.records import Record

RECORDS = ("bench",)


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw it. Raises InputError if the record is missing or has no table of steps."""
    record = records["bench"]
    steps = read_steps(record)
    figure = canvas(3.9)
    for number, batch in enumerate(sorted({step.batch for step in steps})):
        panel = figure.add_axes((0.075 + 0.5 * number, 0.225, 0.275, 0.68))
        dress(
            panel,
            "prompt tokens",
            "" if number else "ms for a token",
            "one request" if batch == 1 else f"{batch} requests at once",
        )
        mine = [step for step in steps if step.batch == batch]
        contexts = sorted({step.context for step in mine})
        panel.set_xscale("log", base=2)
        panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
        panel.set_xlim(contexts[0] / 1.12, contexts[-1] * 1.12)
        panel.set_ylim(0, 1.08 * max(step.ms for step in mine))
        ends = []
        for name, look in CACHES.items():
            if line := sorted((step.context, step.ms) for step in mine if step.cache == name):
                panel.plot(*zip(*line, strict=True), **look.fields)
                ends.append(End(*line[-1], name, look.colour, look.width > 2))
        label_ends(panel, ends)
    plain = "full cache: transformers' dynamic, static and quantized one"
    caption(figure, record, more=f"medians, steps of all caches in turns in one process; {plain}")
    return save(figure, folder, "decode")
