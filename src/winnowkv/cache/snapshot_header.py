"""What a saved cache says of itself, and what must be true of it: header, tensors, model and each other.

:class:`Header` is the schema. :func:`tensor_table` says which tensors a header means, with their shapes, before any is read;
:func:`lengths_fault` and :func:`contents_fault` say what does not fit together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.generated import DECODE_BLOCK, LEAST_DECODE_BUDGET
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.quantized import QUANTIZATION_GROUP, channel_group
from winnowkv.files import SHOWN, shown
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import rotation_numbers
from winnowkv.report import Report

QUANTIZED = ("quantized_keys", "quantized_values")
PARTS = ("codes", "scales", "zeros")
TOKENS = "tokens"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ROUNDING = 1e-5  # relative, between devices that compute the same frequencies
Table = dict[str, tuple[str, list[int]]]  # of each tensor, by name: safetensors' name of its dtype, and its shape
Count = Annotated[int, Field(ge=0, lt=2**31)]  # positions are int32
Shape = Annotated[list[Count], Field(min_length=2, max_length=2)]


class Strict(BaseModel):
    """No field too many, no value of another type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class CompactPart(Strict):
    """A compressed layer: its lengths as :class:`CompactLayer` has them, and the shapes of what is not always there."""

    kind: Literal["compact"] = "compact"
    length: Count
    seen: Count
    prompt: Count
    dropped: Count
    frozen: Count
    pads: Annotated[list[Count], Field(min_length=1)]
    positions: list[Shape | None]  # of each row, heads and entries
    valid_heads: Count | None
    queries: Count | None

    @property
    def held(self) -> int:
        """Columns of the prompt."""
        return self.length - (self.seen - self.prompt - self.dropped)


class SlidingPart(Strict):
    """A layer that slides over the last tokens."""

    kind: Literal["sliding"] = "sliding"
    seen: Count
    window: Annotated[int, Field(ge=2)]

    @property
    def held(self) -> int:
        """Tokens whose keys and values it holds."""
        return min(self.seen, self.window - 1)


class EmptyPart(Strict):
    """A layer without a cache of its own."""

    kind: Literal["empty"] = "empty"


Part = Annotated[CompactPart | SlidingPart | EmptyPart, Field(discriminator="kind")]


class Header(Strict):
    """All of a saved cache that is not a tensor; ``tokens`` is how many token ids it holds, if any."""

    model: dict[str, str | int | dict[str, list[float]]]
    layers: Annotated[list[Part], Field(min_length=1)]
    decode_budget: Annotated[int, Field(ge=LEAST_DECODE_BUDGET, lt=2**31)] | None
    tokens: Count | None
    report: Report

    @property
    def compact(self) -> list[CompactPart]:
        """The compressed layers."""
        return [part for part in self.layers if isinstance(part, CompactPart)]


class TableEntry(Strict):
    """What the file's own table of contents says of a tensor."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What must be equal for a cache to fit a model: its sizes, dtype and rotation (weights are not compared)."""
    return {**ModelInfo.of(model).to_dict(), "dtype": str(model.dtype), "rotation": rotation_numbers(model)}


def model_difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first thing in which the model of a file is another one, in words."""
    for name, mine in here.items():
        theirs = saved.get(name)
        if name != "rotation":
            if theirs != mine:
                return f"{name} {str(theirs)[:SHOWN]}, here {mine}"
            continue
        if not isinstance(theirs, dict) or set(theirs) != set(mine):
            return "its layers rotate keys by their positions in another way"
        for part, numbers in mine.items():
            pairs = [pair for pair in zip(theirs[part], numbers, strict=False) if not math.isclose(*pair, rel_tol=ROUNDING)]
            if pairs or len(theirs[part]) != len(numbers):
                found = f": {pairs[0][0]:.6g}, here {pairs[0][1]:.6g}" if pairs else ""
                return f"its keys are rotated by other angles, as another rope_theta or RoPE scaling gives ({part}{found})"
    extra = set(saved) - set(here)
    return f"{sorted(extra)[0][:SHOWN]} is nothing that is known of a model" if extra else None


def tensor_table(header: Header, like: Sequence[Any], query_heads: int) -> Table:
    """The tensors that a header means. ``like``: the layers of a cache into which the model has read a token."""
    table: Table = {}
    stored = header.report.quantize
    for index, (part, layer) in enumerate(zip(header.layers, like, strict=True)):
        if isinstance(part, EmptyPart):
            continue
        rows = len(header.compact[0].pads)
        number, heads = DTYPES[layer.keys.dtype], layer.keys.shape[1]
        sizes = layer.keys.shape[3], layer.values.shape[3]
        columns = part.held if isinstance(part, SlidingPart) else part.length - part.frozen
        for name, size in zip(("keys", "values"), sizes, strict=True):
            table[f"{index}.{name}"] = number, [rows, heads, columns, size]
        if isinstance(part, SlidingPart):
            continue
        if stored is not None:
            groups = math.ceil(part.frozen / QUANTIZATION_GROUP)
            for name, size in zip(QUANTIZED, sizes, strict=True):
                by_channel = name == QUANTIZED[0]
                scales = [rows, heads, *((groups, size) if by_channel else (part.frozen, size // channel_group(size)))]
                code_size = size if stored == "int8" else size // 2
                table[f"{index}.{name}.codes"] = "U8", [rows, heads, part.frozen, code_size]
                table |= {f"{index}.{name}.{kind}": (number, scales) for kind in PARTS[1:]}
        if part.valid_heads is not None:
            table[f"{index}.valid"] = "BOOL", [rows, part.valid_heads, part.length]
        if part.queries is not None:
            table[f"{index}.queries"] = number, [rows, query_heads, part.queries, sizes[0]]
        for row, shape in enumerate(part.positions):
            if shape is not None:
                table[f"{index}.positions.{row}"] = "I32", list(shape)
    if header.tokens is not None:
        table[TOKENS] = "I64", [header.tokens]
    return table


def table_fault(found: Mapping[str, TableEntry], meant: Table) -> str | None:
    """How the tensors of a file differ from those that its header means."""
    if missing := sorted(set(meant) - set(found)):
        return f"tensor {missing[0]} is missing"
    if extra := sorted(set(found) - set(meant)):
        return f"tensor {extra[0][:60]!r} is one too many"
    for name, (number, shape) in meant.items():
        entry = found[name]
        if entry.dtype != number or entry.shape != shape:
            return f"tensor {name} is {entry.dtype[:20]} {shown(entry.shape)}, the header says {number} {shape}"
    # Tensors of a dtype lie in the order of their names, so exchanged names, of keys and values for example, are seen.
    for number in {entry.dtype for entry in found.values()}:
        mine = [name for name, entry in found.items() if entry.dtype == number]
        if sorted(mine) != sorted(mine, key=lambda name: (found[name].data_offsets, name)):
            return f"the {number} tensors do not lie in the order of their names"
    return None


def lengths_fault(header: Header, like: Sequence[Any]) -> str | None:
    """What is wrong with a header's numbers; ``like`` as for :func:`tensor_table`."""
    if len(header.layers) != len(like):
        return f"{len(header.layers)} layers, the model has {len(like)}"
    for index, (part, layer) in enumerate(zip(header.layers, like, strict=True)):
        kind = _kind(layer)
        if part.kind != kind:
            return f"layer {index} is {part.kind}, of this model it is {kind}"
        fault = None
        if isinstance(part, CompactPart):
            fault = _compact_fault(part, header, layer.keys.shape[1])
        elif isinstance(part, SlidingPart) and (part.window, part.seen) != (layer.sliding_window, header.compact[0].seen):
            fault = f"a window of {part.window} after {part.seen} tokens"
        if fault:
            return f"layer {index}: {fault}"
    return _report_fault(header)


def _kind(layer: Any) -> str:
    if isinstance(layer, CompactLayer):
        return "compact"
    return "sliding" if getattr(layer, "is_sliding", False) else "empty"


def _compact_fault(part: CompactPart, header: Header, heads: int) -> str | None:
    first, generated = header.compact[0], part.seen - part.prompt - part.dropped
    for name in ("seen", "prompt", "dropped", "pads"):
        if getattr(part, name) != getattr(first, name):
            return f"{name} {shown(getattr(part, name))}, of another layer {shown(getattr(first, name))}"
    if generated < 0 or part.prompt < 1 or not 1 <= part.held <= part.prompt:
        return f"{part.length} entries of a prompt of {part.prompt}, {part.seen} tokens seen and {part.dropped} dropped"
    if part.dropped and header.decode_budget is None:
        return f"{part.dropped} dropped entries without a decode budget"
    if header.decode_budget is not None and generated > header.decode_budget + DECODE_BLOCK:
        return f"{generated} generated entries, the decode budget is {header.decode_budget}"
    if part.frozen != (part.held if header.report.quantize else 0):
        return f"{part.frozen} quantized entries of {part.held}"
    if max(part.pads) >= part.prompt or len(part.positions) != len(part.pads):
        return f"padding of {shown(part.pads)} in {len(part.positions)} prompts of {part.prompt}"
    for pad, shape in zip(part.pads, part.positions, strict=True):
        if shape is not None and (shape[0] not in (1, heads) or not 1 <= shape[1] <= part.held):
            return f"positions of {shape[0]} heads and {shape[1]} entries, {part.held} are held"
        if shape is None and part.prompt - pad > part.held:
            return f"a whole prompt of {part.prompt - pad} tokens in {part.held} entries"
    if part.valid_heads not in (None, 1, heads):
        return f"flags of {part.valid_heads} heads, it has {heads}"
    if part.queries is not None and (header.decode_budget is None or part.queries > DECODE_BLOCK):
        return f"{part.queries} queries kept"
    return None


def _report_fault(header: Header) -> str | None:
    report, part = header.report, header.compact[0]
    rows = len(report.prompt_tokens)
    if not rows or len(report.kept_entries) != rows or any(len(row) != len(header.compact) for row in report.kept_entries):
        return "its report counts other rows or layers"
    if not all(1 <= tokens <= part.prompt for tokens in report.prompt_tokens):
        return f"its report says prompts of {shown(report.prompt_tokens)} tokens, the cache read {part.prompt}"
    counts = [getattr(report, each.name) for each in fields(report) if each.type in ("int", "float")]
    if min(counts) < 0:
        return f"its report counts {min(counts)}"
    if header.tokens is not None and (len(part.pads) != 1 or header.tokens != part.seen - part.pads[0]):
        return f"it holds {header.tokens} token ids, the cache has seen {part.seen}"
    return None


def contents_fault(header: Header, tensors: Mapping[str, Tensor], vocabulary: int) -> str | None:
    """What is wrong with positions, flags and token ids."""
    for index, part in enumerate(header.layers):
        if isinstance(part, CompactPart):
            mine = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{index}.")}
            for row in range(len(part.pads)):
                if fault := _row_fault(part, row, mine.get(f"positions.{row}"), mine.get("valid")):
                    return f"layer {index}: {fault}"
    tokens = tensors.get(TOKENS)
    if tokens is not None and len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary):
        return f"a token id outside 0 to {vocabulary - 1}"
    return None


def _row_fault(part: CompactPart, row: int, positions: Tensor | None, valid: Tensor | None) -> str | None:
    tokens = part.prompt - part.pads[row]
    counts = torch.tensor([tokens])
    if positions is not None:
        before, after = positions[:, :-1], positions[:, 1:]
        if int(positions.min()) < -1 or int(positions.max()) >= tokens:
            return f"positions outside the prompt of {tokens} tokens"
        if not bool(((after > before) | (after == -1) & (before == -1)).all()):
            return "positions that do not ascend"
        counts = (positions >= 0).sum(-1)
    if valid is None:
        return None if bool((counts == part.held).all()) else f"{shown(counts.tolist())} entries held in {part.held} columns"
    if int(valid.view(torch.uint8).max()) > 1:
        return "flags that are neither true nor false"
    flags = valid[row, :, : part.held].int()
    if not bool((flags.sum(-1) == counts).all()) or not bool((flags.diff(dim=-1) >= 0).all()):
        return "flags that do not mark the entries that are held"
    return None
