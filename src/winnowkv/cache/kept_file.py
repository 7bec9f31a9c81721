"""What was kept of a prompt as JSON and as a safetensors file, and read back from both.

JSON is for people and pages: positions as lists, reasons as a letter a token, scores with four digits. A safetensors file holds
the tensors as they are, by name and layer (``positions.0``, ``reasons.0``, ``scores.0``, ``thresholds.0``, ``ids``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save_file
from torch import Tensor

from winnowkv.cache.kept import REASONS, SCORE_DIGITS, KeptTokens
from winnowkv.errors import InputError
from winnowkv.files import Fail, decode, first_fault, parse_json, read_bytes, reason, replacing, write_text

KEPT_FORMAT: Literal[1] = 1
# A letter for each reason, in the order of REASONS.
LETTERS = {
    "everything kept": "a", "protected": "p", "sink": "s", "recent window": "r", "shared by all layers": "l", "score": "i",
    "its span": "w", "evicted": ".", "evicted between chunks": "c",
}  # fmt: skip
ALPHABET = "".join(LETTERS[name] for name in REASONS)
SUFFIXES = (".json", ".safetensors")
PARTS = ("positions", "reasons", "scores", "thresholds")
Numbers = list[float | None]


class Header(BaseModel):
    """What both files say beside the tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    policy: str
    budget: int | float | str
    tokens: int = Field(ge=1, le=2**31 - 1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)


class KeptJson(Header):
    """The JSON file. Lists of a layer hold one list for all heads, or one for each."""

    ids: list[int] | None
    entries: list[list[int]]
    positions: list[list[list[int]] | None]
    reasons: list[list[str]] | None
    scores: list[list[Numbers]] | None
    thresholds: list[Numbers] | None
    letters: dict[str, str]
    kept_fraction: float


def to_dict(kept: KeptTokens) -> dict[str, Any]:
    """Everything as plain data, ready for JSON."""
    return {
        **header(kept),
        "kept_fraction": kept.kept_fraction,
        "letters": {letter: name for name, letter in LETTERS.items()},
        "ids": None if kept.ids is None else list(kept.ids),
        "entries": kept.entries,
        "positions": [None if held is None else unpadded(held) for held in kept.positions],
        "reasons": None if kept.reasons is None else [spelled(part) for part in kept.reasons],
        "thresholds": None if kept.thresholds is None else [numbers(part) for part in kept.thresholds],
        "scores": None if kept.scores is None else [[numbers(row) for row in part] for part in kept.scores],
    }  # fmt: skip


def unpadded(positions: Tensor) -> list[list[int]]:
    """Positions ``[H, n]`` as a list a head, without what stands in front of the shorter ones."""
    return [[at for at in row if at >= 0] for row in positions.tolist()]


def header(kept: KeptTokens) -> dict[str, Any]:
    """What is not a tensor."""
    return {
        "format": KEPT_FORMAT, "policy": kept.policy, "budget": kept.budget, "tokens": kept.tokens, "layers": kept.layers,
        "heads": kept.heads,
    }  # fmt: skip


def spelled(reasons: Tensor) -> list[str]:
    """Reasons ``[H, S]`` as a text a head, a letter a token."""
    table = bytes(ord(letter) for letter in ALPHABET)
    return [bytes(row.tolist()).translate(table.ljust(256, b"?")).decode() for row in reasons]


def numbers(scores: Tensor) -> Numbers:
    """Scores with a few digits; None where there is none."""
    return [None if math.isnan(score) else float(f"{score:.{SCORE_DIGITS}g}") for score in scores.tolist()]


def save(kept: KeptTokens, path: Path) -> None:
    """Write the file that the path's ending names. Raises InputError if it cannot be written."""
    suffix = known_suffix(path)

    def fail(why: str) -> InputError:
        return InputError(f"{path} {why}")

    if suffix == ".json":
        write_text(path, json.dumps(to_dict(kept), separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n", fail)
        return
    tensors = {
        f"{name}.{layer}": part.contiguous().clone()
        for name in PARTS
        for layer, part in enumerate(getattr(kept, name) or ())
        if part is not None
    }
    tensors["ids"] = torch.tensor([] if kept.ids is None else list(kept.ids), dtype=torch.int64)
    with replacing(path, fail) as scratch:
        try:
            save_file(tensors, scratch, metadata={"winnowkv": json.dumps(header(kept), allow_nan=False)})
        except SafetensorError as error:  # a full disk, in the library's words
            raise fail(f"cannot be written: {reason(error)}") from None


def load(path: Path) -> KeptTokens:
    """Read what :func:`save` wrote. Raises InputError for any other file."""
    suffix = known_suffix(path)

    def fail(why: str) -> InputError:
        return InputError(f"{path} does not say what was kept of a prompt: {why}")

    data = read_bytes(path, lambda why: InputError(f"{path} {why}"))
    try:
        kept = from_json(data, fail) if suffix == ".json" else from_tensors(data, fail)
    except ValidationError as error:
        raise fail(first_fault(error)) from None
    if fault := contents_fault(kept):
        raise fail(fault)
    return kept


def known_suffix(path: Path) -> str:
    """The path's ending. Raises InputError for one that names no format."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} must end in {' or '.join(SUFFIXES)}: the ending says what is written, or read")
    return path.suffix.lower()


def from_json(data: bytes, fail: Fail) -> KeptTokens:
    """What a JSON file says, its shapes not checked yet."""
    made = KeptJson.model_validate(parse_json(decode(data, fail), fail))
    check_counts(made, fail)
    reasons = None
    if made.reasons is not None:
        if unknown := {letter for layer in made.reasons for row in layer for letter in row} - set(ALPHABET):
            raise fail(f"the letter {min(unknown)!r} stands for no reason")
        reasons = tuple(matrix([list(map(ALPHABET.index, row)) for row in layer], torch.uint8) for layer in made.reasons)
    scores, thresholds = made.scores, made.thresholds
    return KeptTokens(
        made.policy, made.budget, made.tokens, made.heads,
        tuple(None if layer is None else ragged(layer) for layer in made.positions),
        None if made.ids is None else tuple(made.ids),
        reasons,
        None if scores is None else tuple(matrix([with_nan(row) for row in layer], torch.float32) for layer in scores),
        None if thresholds is None else tuple(torch.tensor(with_nan(row), dtype=torch.float32) for row in thresholds),
    )  # fmt: skip


def check_counts(made: KeptJson, fail: Fail) -> None:
    """Raise the error of lists that are not as many as there are layers, or not as long as each other."""
    for name in ("positions", "entries", "reasons", "scores", "thresholds"):
        part = getattr(made, name)
        if part is not None and len(part) != made.layers:
            raise fail(f"{name} of {len(part)} layers, there are {made.layers}")
    for name in ("reasons", "scores"):
        for layer in getattr(made, name) or ():
            if any(len(row) != made.tokens for row in layer):
                raise fail(f"{name} of another number than {made.tokens} tokens")


def with_nan(values: Numbers) -> list[float]:
    """None as not a number."""
    return [math.nan if value is None else value for value in values]


def matrix(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Rows of one length as a tensor."""
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), -1)


def ragged(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of positions as a tensor, -1 in front of the shorter ones; what no position can be becomes -2."""
    width = max(map(len, rows), default=0)
    safe = [[at if 0 <= at < 2**31 else -2 for at in row] for row in rows]
    return torch.tensor([[-1] * (width - len(row)) + row for row in safe], dtype=torch.int32).reshape(len(rows), width)


def from_tensors(data: bytes, fail: Fail) -> KeptTokens:
    """What a safetensors file says, its shapes not checked yet."""
    end = 8 + int.from_bytes(data[:8], "little")
    table = parse_json(decode(data[8:end], fail), fail) if 8 < end <= len(data) else None
    about = table.get("__metadata__") if isinstance(table, dict) else None
    if not isinstance(about, dict) or "winnowkv" not in about:
        raise fail("it has no header of winnowkv's, or is cut off")
    made = Header.model_validate(parse_json(about["winnowkv"], fail))
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise fail(reason(error)) from None
    found: dict[str, Any] = {}
    for name in PARTS:
        each = [tensors.pop(f"{name}.{layer}", None) for layer in range(made.layers)]
        if name != "positions" and any(part is None for part in each):
            if any(part is not None for part in each):
                raise fail(f"{name} of some layers only")
            found[name] = None
        else:
            found[name] = tuple(each)
    ids = tensors.pop("ids", torch.zeros(0, dtype=torch.int64))
    if tensors or ids.dtype != torch.int64 or ids.ndim != 1:
        raise fail(f"the tensor {min(tensors, default='ids')} is none of its own, or of another kind")
    return KeptTokens(made.policy, made.budget, made.tokens, made.heads, ids=tuple(ids.tolist()) or None, **found)


def contents_fault(kept: KeptTokens) -> str | None:
    """What does not fit together, in words; None if everything does."""
    if kept.ids is not None and len(kept.ids) != kept.tokens:
        return f"{len(kept.ids)} token ids of {kept.tokens} tokens"
    scored = [part is None for part in (kept.reasons, kept.scores, kept.thresholds)]
    if len(set(scored)) > 1:
        return "scores, thresholds and reasons go together, and one of them is missing"
    for layer, held in enumerate(kept.positions):
        if held is not None and (fault := positions_fault(held, kept)):
            return f"layer {layer}: {fault}"
    kinds = {"reasons": torch.uint8, "scores": torch.float32, "thresholds": torch.float32}
    for name, dtype in kinds.items():
        for layer, part in enumerate(getattr(kept, name) or ()):
            shape = (len(part),) if name == "thresholds" else (len(part), kept.tokens)
            if part.dtype != dtype or part.shape != shape or len(part) not in (1, kept.heads):
                return f"layer {layer}: {name} are of another kind or number"
            if name == "reasons" and int(part.max()) >= len(REASONS):
                return f"layer {layer}: a reason is unknown"
    return None


def positions_fault(held: Tensor, kept: KeptTokens) -> str | None:
    """What is wrong with a layer's positions."""
    if held.dtype != torch.int32 or held.ndim != 2 or len(held) not in (1, kept.heads):
        return "positions are of another kind, or of another number of heads"
    if held.numel() and (int(held.min()) < -1 or int(held.max()) >= kept.tokens):
        return f"a position is none of 0 to {kept.tokens - 1}"
    before, after = held[:, :-1], held[:, 1:]
    return None if bool(((after > before) | (after == -1) & (before == -1)).all()) else "positions are not ascending"
