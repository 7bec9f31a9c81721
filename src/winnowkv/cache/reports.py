"""The one place that makes and fills a :class:`~winnowkv.report.Report`: at the end of prefill, and after each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from winnowkv.cache.auto import AutoSelection
from winnowkv.cache.compression import Compression
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.selection import PromptSelection
from winnowkv.report import Report


def new_report(compression: Compression) -> Report:
    """Of a prompt that is not read yet."""
    return Report(compression.asked, compression.budget.asked, quantize=compression.policy.quantize)


def saved_report(values: dict[str, Any]) -> Report:
    """Of a saved cache, from :meth:`Report.to_dict`; what comes after is counted afresh."""
    stored = {field.name for field in fields(Report)}
    report = Report(**{key: value for key, value in values.items() if key in stored})
    report_decode(report, 0, report.decode_entries, 0.0)
    return report


def report_prefill(
    report: Report,
    layers: Sequence[CompactLayer],
    selections: Sequence[PromptSelection | AutoSelection],
    *,
    seconds: float,
    compress_seconds: float,
    notes: Sequence[str | None] = (),
) -> None:
    """What a prompt (or batch) left in the compressed layers, and how long it took."""
    rows = range(len(layers[0].pads))
    report.prompt_tokens = [layers[0].prompt - pad for pad in layers[0].pads]
    kept = [[layer.entries(row) for layer in layers] for row in rows]
    report.kept_entries = [[n if isinstance(n, int) else float(n) for n in row] for row in kept]
    report.kept_bytes = sum(layer.kept_bytes(row) for layer in layers for row in rows)
    report.full_bytes = sum(tokens * layer.entry_bytes for tokens in report.prompt_tokens for layer in layers)
    report.held_bytes = sum(layer.held_bytes for layer in layers)
    report.prefill_seconds, report.compress_seconds = seconds, compress_seconds
    if all(isinstance(one, AutoSelection) or one.scores or not one.bound.evicts for one in selections):
        report.kept_mass = [selection.kept_mass() for selection in selections]
    said = {note for note in (*(note for one in selections for note in one.notes), *notes) if note}
    report.notes = sorted(said)


def report_decode(report: Report, tokens: int, entries: int, seconds: float) -> None:
    """``tokens`` were read after the prompt, of which ``entries`` are held, in ``seconds``."""
    report.decode_tokens, report.decode_entries, report.decode_seconds = tokens, entries, seconds
