"""What a run kept, in entries, bytes and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MIB = 2**20
MAX_RUNS = 4  # of layers with equal lengths that are listed one by one


@dataclass
class Report:
    """What one prompt (or one padded batch of prompts) left in the cache.

    Entries and bytes are of all layers and heads, also if several devices or processes share them.

    Attributes
    ----------
    policy, budget: as they were asked.
    quantize: ``int8`` or ``int4`` if the kept entries are stored so.
    prompt_tokens: per row, padding not counted.
    kept_entries: per row, per compressed layer: entries kept of the prompt per KV head, mean over heads
        (a float only if heads keep different numbers).
    kept_mass: per row, the share of the policy's importance scores past the sinks that stays, mean over layers and
        heads; only with ``keep_scores`` or an ``auto`` budget.
    kept_bytes, full_bytes: keys and values of the prompt's entries at the end of prefill,
        after and without eviction; padding is in neither. Quantized entries count as they are stored,
        with scales and zero points; ``full_bytes`` is always in the model's precision.
    held_bytes: storage that keys and values really occupied at the end of prefill (rows of a
        batch, and heads, are padded to the longest of the layer); ``cache.held_bytes`` says what it is now.
    peak_bytes: the most storage that keys and values occupied at any layer of prefill, which quantizes at its end.
    prefill_seconds: from the first layer's keys to the end of the last layer, compression included.
    compress_seconds: the part of it spent on scoring, eviction and quantization (on CUDA by the device's clock).
    decode_tokens: tokens read after the prompt; decode_seconds: from the first layer of the
        first of them to the last layer of the last; decode_entries: entries held of them per layer and KV head,
        fewer if a decode budget evicts.
    lookahead_tokens: tokens of the answer that were generated while the whole prompt was held.
    draft_tokens, draft_seconds: generated from a compact copy only to hear their queries, and thrown away; the time it took.
    study_tokens, study_seconds: read and written after the text to find out what of it matters, and taken back; the time.
    refitted: share of the layers' KV heads whose values were changed by least squares.
    notes: what the user should know, in sentences.
    """

    policy: str
    budget: int | float | str
    prompt_tokens: list[int] = field(default_factory=list)
    kept_entries: list[list[int | float]] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    kept_bytes: int = 0
    full_bytes: int = 0
    held_bytes: int = 0
    peak_bytes: int = 0
    prefill_seconds: float = 0.0
    compress_seconds: float = 0.0
    decode_tokens: int = 0
    decode_entries: int = 0
    decode_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    quantize: Literal["int8", "int4"] | None = None
    lookahead_tokens: int = 0
    draft_tokens: int = 0
    draft_seconds: float = 0.0
    study_tokens: int = 0
    study_seconds: float = 0.0
    refitted: float = 0.0

    @property
    def kept_fraction(self) -> float:
        """Kept bytes over full bytes."""
        return self.kept_bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def decode_ms_per_token(self) -> float:
        """Milliseconds from one token to the next, 0 before the first."""
        return 1000 * self.decode_seconds / self.decode_tokens if self.decode_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return {**asdict(self), "kept_fraction": self.kept_fraction, "decode_ms_per_token": self.decode_ms_per_token}

    @property
    def looked(self) -> list[str]:
        """What was heard of the answer before anything was evicted, what was refitted, and the study: a line, or none."""
        parts = []
        if self.lookahead_tokens:
            parts.append(f"the first {self.lookahead_tokens} tokens are the full cache's, and chose what stays")
        if self.draft_tokens:
            parts.append(f"a draft of {self.draft_tokens} tokens was heard, too, in {self.draft_seconds:.2f} s")
        if self.refitted:
            parts.append(f"values were refitted in {100 * self.refitted:.0f}% of the heads")
        if self.study_tokens:
            parts.append(f"a study of {self.study_tokens} tokens took {self.study_seconds:.2f} s")
        return ["; ".join(parts)] if parts else []

    def __str__(self) -> str:
        rows = [f"[{summary(row)}]" for row in self.kept_entries]
        precision = f" in {self.quantize}" if self.quantize else ""
        held = f", {self.decode_entries} of their entries held" if self.decode_entries < self.decode_tokens else ""
        lines = [
            f"{self.policy} at {self.budget}: kept {self.kept_bytes / MIB:.2f} of {self.full_bytes / MIB:.2f} MiB "
            f"({100 * self.kept_fraction:.1f}%){precision}, held {self.held_bytes / MIB:.2f} MiB",
            f"prompt tokens {self.prompt_tokens}, entries per layer {', '.join(rows)}",
            f"prefill {self.prefill_seconds:.2f} s (compression {self.compress_seconds:.3f} s), "
            f"{self.decode_tokens} tokens at {self.decode_ms_per_token:.1f} ms{held}",
            *self.looked,
            *self.notes,
        ]
        return "\n".join(lines)


def summary(entries: Sequence[int | float]) -> str:
    """Per-layer lengths, runs of equal ones folded: ``360 x 30``; of many runs the extremes: ``151 to 722 (mean 360) x 30``."""
    runs: list[list[float]] = []
    for count in entries:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    if len(runs) > MAX_RUNS:
        return f"{min(entries):g} to {max(entries):g} (mean {sum(entries) / len(entries):.5g}) x {len(entries)}"
    return " ".join(f"{count:g}" if times == 1 else f"{count:g} x {times:g}" for count, times in runs)
