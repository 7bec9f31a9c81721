"""The one place that makes and fills a :class:`~winnowkv.report.Report`: at the end of prefill, and after each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Any

import torch

from winnowkv.cache.auto import AutoSelection
from winnowkv.cache.compression import Compression
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.selection import PromptSelection
from winnowkv.models.head_group import HeadGroup
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
    heads: HeadGroup,
    *,
    seconds: float,
    compress_seconds: float,
    notes: Sequence[str | None] = (),
) -> None:
    """What a prompt (or batch) left in the compressed layers, and how long it took.

    ``heads``: the processes that share the layers' heads; entries and bytes are of all of them, and in the reports of all.
    """
    rows = range(len(layers[0].pads))
    report.prompt_tokens = [layers[0].prompt - pad for pad in layers[0].pads]
    counts = [[layer.counts(row) for layer in layers] for row in rows]
    kept = sum(layer.kept_bytes(row) for layer in layers for row in rows)
    full = sum(tokens * layer.entry_bytes for tokens in report.prompt_tokens for layer in layers)
    here = [kept, full, sum(layer.held_bytes for layer in layers), report.peak_bytes]
    sums = [number for row in counts for heads_of_layer in row for number in (sum(heads_of_layer), len(heads_of_layer))]
    report.kept_bytes, report.full_bytes, report.held_bytes, report.peak_bytes, *sums = added(
        [*here, *sums], heads, layers[0].keys.device
    )
    means = [Fraction(entries, count) for entries, count in zip(sums[::2], sums[1::2], strict=True)]
    each = [int(mean) if mean.denominator == 1 else float(mean) for mean in means]
    report.kept_entries = [each[at : at + len(layers)] for at in range(0, len(each), len(layers))]
    report.prefill_seconds, report.compress_seconds = seconds, compress_seconds
    if all(isinstance(one, AutoSelection) or one.scores or not one.bound.evicts for one in selections):
        report.kept_mass = [selection.kept_mass() for selection in selections]
    said = {note for note in (*(note for one in selections for note in one.notes), *notes) if note}
    report.notes = sorted(said)


def added(numbers: list[int], heads: HeadGroup, device: torch.device) -> list[int]:
    """Each number, summed over the processes."""
    return numbers if heads.size == 1 else heads.total(torch.tensor(numbers, device=device)).tolist()


def report_decode(report: Report, tokens: int, entries: int, seconds: float) -> None:
    """``tokens`` were read after the prompt, of which ``entries`` are held, in ``seconds``."""
    report.decode_tokens, report.decode_entries, report.decode_seconds = tokens, entries, seconds
