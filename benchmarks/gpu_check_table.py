"""The Markdown table of gpu_check.py, a row for each cell, for docs/log.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Cell = dict[str, Any]


def table(found: Cell) -> str:
    """The Markdown table for docs/log.md, with a sentence for every step that did not end well."""
    here, versions = found["machine"], found["versions"]
    head = f"{here['accelerator'] or here['processor']}, {', '.join(f'{name} {number}' for name, number in versions.items())}"
    rows = ["| step | what | ours | beside it |", "|---|---|---|---|"]
    for step, one in found["steps"].items():
        rows += [f"| {step} | {line['cell']} | {' | '.join(row(line))} |" for line in one["lines"]]
    notes = [
        f"- {step}: {one['status']}, {one['measured']} of {one['of']} measured"
        for step, one in found["steps"].items()
        if one["status"] != "done"
    ]
    return "\n".join([f"{head}, revision {found['git']}:", "", *rows, *(["", *notes] if notes else [])])


def row(line: Cell) -> tuple[str, str]:
    """Two cells of the table: ours, and what stands beside it."""
    if reason := line.get("failed") or (isinstance(line.get("skipped"), str) and line["skipped"]):
        return ("failed: " if line.get("failed") else "skipped: ") + reason.replace("|", "/"), ""
    return ROWS[line["step"]](line)


def law_row(line: Cell) -> tuple[str, str]:
    """Tests that passed, and those that did not."""
    return f"{line['passed']} passed, {line['skipped']} skipped", ", ".join(line["wrong"]) or "none failed"


def prefill_row(line: Cell) -> tuple[str, str]:
    """Seconds of a prompt, over plain transformers."""
    return (
        f"{middle(line['prefill_s']):.3f} s",
        f"plain {middle(line['plain_s']):.3f} s, ours over it {middle(line['over_plain']):.3f}",
    )


def decode_row(line: Cell) -> tuple[str, str]:
    """Milliseconds a step, and ours over the others'."""
    if "ms" not in line:
        return f"skipped: {'; '.join(line['skipped'].values())}", ""
    mine, *others = line["ms"]
    left_out = [f"{name} left out" for name in line["skipped"]]
    beside = [f"{name} {middle(line['ms'][name]):.2f} ms ({middle(line['over'][name]):.3f})" for name in others]
    return f"{middle(line['ms'][mine]):.2f} ms, first step {line['first_step_s']:.1f} s", ", ".join([*beside, *left_out])


def serve_row(line: Cell) -> tuple[str, str]:
    """Requests and tokens a second."""
    beside = ""
    if "plain_tokens_s" in line:
        beside = f"dynamic cache: {line['plain_fits']} requests, {middle(line['plain_tokens_s']):.0f} tokens/s"
    return f"{line['fits']} requests, {middle(line['tokens_s']):.0f} tokens/s", beside


def option_row(line: Cell) -> tuple[str, str]:
    """Seconds of the prompt and of the step that chooses; bytes kept."""
    words = [f"prompt {middle(line['prefill_s']):.3f} s"]
    if "choosing_s" in line:
        words.append(f"choosing {middle(line['choosing_s']):.3f} s")
    if line["draft_tokens"]:
        words.append(f"{line['draft_seconds']:.3f} s of it a draft of {line['draft_tokens']}")
    if line["refitted"]:
        words.append(f"{line['refitted']:.0%} of heads refitted")
    kept, full = (line[name] / 2**20 for name in ("kept_bytes", "full_bytes"))
    return ", ".join(words), f"step {1000 * middle(line['after_s']):.2f} ms, {kept:.1f} of {full:.1f} MiB"


ROWS: dict[str, Callable[[Cell], tuple[str, str]]] = {
    "laws": law_row, "prefill": prefill_row, "decode": decode_row, "serve": serve_row, "options": option_row,
}  # fmt: skip


def middle(values: Cell) -> float:
    """The median of a spread."""
    return values["median"]
