"""Save a compact cache and load it in another process: a long prompt is read once, its cache kept.

One safetensors file holds keys and values of what stayed (quantized ones as they are), the positions, the windows of layers
that slide, the token ids if they were given, and as metadata the header (snapshot_header.py): what is not a tensor, with
what must be equal of a model. A digest over the whole file is compared before anything in it is used, so damage is noticed
anywhere. A digest is no signature: whoever can write the file can make it anew. So header and tensors are also checked
against the model and each other, and a file that passes can be gone on with, whatever wrote it.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors, save_file
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.looking import check_chosen
from winnowkv.cache.quantized import Quantized
from winnowkv.cache.reading import prefill
from winnowkv.cache.reports import saved_report
from winnowkv.cache.snapshot_header import (
    DTYPES,
    PARTS,
    QUANTIZED,
    TOKENS,
    CompactPart,
    EmptyPart,
    Header,
    Part,
    SlidingPart,
    TableEntry,
    contents_fault,
    fingerprint,
    lengths_fault,
    model_difference,
    table_fault,
    tensor_table,
)
from winnowkv.errors import CacheError, WinnowError
from winnowkv.files import Fail, decode, first_fault, parse_json, read_bytes, reason, replacing, shown
from winnowkv.models.devices import input_device
from winnowkv.models.head_group import HeadGroup
from winnowkv.models.info import ModelInfo
from winnowkv.policies.decode_eviction import DecodeEviction
from winnowkv.types import Quantization

SNAPSHOT_FORMAT = 2
NO_DIGEST = "0" * 64
DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')
READ_AGAIN = "read the prompt again and save it anew"


def save_cache(
    cache: CompactCache,
    model: PreTrainedModel,
    path: str | Path,
    *,
    tokens: Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a cache after prefill, with whatever was generated since, to one safetensors file, as a whole or not at all.

    ``tokens`` are the token ids that were read, if :func:`load_document` is to give them back: of one row, without padding.

    Raises
    ------
    CacheError
        Before the prompt was read and while it is held whole (lookahead), for another model's cache, for layers that are
        neither full attention nor a sliding window, for tokens that are not those that the cache has seen, for a file that
        exists, unless ``overwrite`` is set, and for a path that is no regular file or cannot be written. Also for a cache whose
        report does not count what it holds.
    """
    tensors, metadata = _contents(cache, model, tokens, None)
    with replacing(Path(path), lambda why: CacheError(f"{path} {why}"), overwrite=overwrite) as scratch:
        try:
            save_file(tensors, scratch, metadata=metadata)
        except SafetensorError as error:  # a full disk, in the library's words
            raise CacheError(f"{path} cannot be written: {reason(error)}") from None
        with scratch.open("r+b") as file:
            at = _digest_at(file.read(_header_end(file.read(8))))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(8 + at)
            file.write(digest.encode())


def document_bytes(cache: CompactCache, model: PreTrainedModel, tokens: Sequence[int], about: str) -> tuple[bytes, str]:
    """What :func:`save_cache` would write, and the digest in it.

    ``about``: a text that goes into the file beside the header, for whoever lists files. Raises as :func:`save_cache`.
    """
    tensors, metadata = _contents(cache, model, tokens, about)
    data = save_tensors(tensors, metadata=metadata)
    at = 8 + _digest_at(data[8 : 8 + _header_end(data)])
    digest = hashlib.sha256(data).hexdigest()
    return b"".join([data[:at], digest.encode(), data[at + len(digest) :]]), digest


def load_cache(path: str | Path, model: PreTrainedModel) -> CompactCache:
    """A cache that continues from the saved one; pass it as ``past_key_values`` with the next tokens.

    The model reads one token beforehand, which shows what its layers hold, and where.

    Raises
    ------
    CacheError
        For a file that is not a saved cache, is damaged, of an older or newer format, or of another model (the difference is
        named), and for one that does not fit together.
    """
    HeadGroup.of(model).check_alone("loading a cache")
    return _read(_whole_file(path), str(path), model)[0]


def load_document(path: str | Path, model: PreTrainedModel) -> tuple[CompactCache, list[int]]:
    """A saved cache as :func:`load_cache` gives it, and the token ids that were read into it.

    Raises CacheError as :func:`load_cache` does, and for a file that was saved without its tokens.
    """
    return document_of(_whole_file(path), str(path), model)


def document_of(
    data: bytes, what: str, model: PreTrainedModel, *, like: CompactCache | None = None
) -> tuple[CompactCache, list[int]]:
    """The same of a file's bytes, which are called ``what`` in errors.

    ``like``: a cache into which the model has read something; with it the model reads nothing here.
    """
    cache, tokens = _read(data, what, model, like)
    if tokens is None:
        raise CacheError(f"{what} holds no token ids: save the cache with tokens=, or open it with load_cache")
    return cache, tokens


def read_one(model: PreTrainedModel) -> CompactCache:
    """A cache into which a model has read one token: it shows what the layers hold, and where."""
    probe = CompactCache(model, "full", 1)
    prefill(model, torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), probe)
    return probe


def _contents(
    cache: CompactCache, model: PreTrainedModel, tokens: Sequence[int] | None, about: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, without its digest. Raises CacheError for what cannot be saved."""
    HeadGroup.of(model).check_alone("saving a cache")
    if cache.model is not model:
        raise CacheError("this cache belongs to another model: save it with the model that read it")
    if not cache.report.prompt_tokens:
        raise CacheError("nothing was read into this cache yet: there is nothing to save")
    check_chosen(cache, "saved")
    eviction = cache.compact_layers[0].decode_eviction
    if cache.decode_budget is not None and eviction != DecodeEviction():
        raise CacheError(
            f"the decode budget's own rule ({type(eviction).__name__}) cannot be saved: make the cache without one"
        )
    tensors: dict[str, Tensor] = {}
    parts: list[Part] = []
    for index, layer in enumerate(cache.layers):
        part, mine = _saved_layer(layer)
        parts.append(part)
        tensors |= {f"{index}.{name}": _alone(tensor) for name, tensor in mine.items()}
    if unknown := {tensor.dtype for tensor in tensors.values()} - set(DTYPES):
        raise CacheError(f"this cache holds numbers of {sorted(map(str, unknown))[0]}, which cannot be saved: {READ_AGAIN}")
    if tokens is not None:
        tensors[TOKENS] = _checked_tokens(tokens, cache.compact_layers[0], model)
    header = {
        "model": fingerprint(model), "layers": [part.model_dump() for part in parts], "decode_budget": cache.decode_budget,
        "tokens": None if tokens is None else len(tokens), "report": asdict(cache.report),
    }  # fmt: skip
    try:
        text = json.dumps(header, allow_nan=False)
        made = Header.model_validate_json(text)  # what could not be read again is not written
    except ValidationError as error:
        raise CacheError(f"this cache does not fit together ({first_fault(error)}): {READ_AGAIN}") from None
    except ValueError:
        raise CacheError(f"this cache's report holds a value that is not a number: {READ_AGAIN}") from None
    if fault := lengths_fault(made, cache.layers) or _counts_fault(cache):
        raise CacheError(f"this cache does not fit together ({fault}): {READ_AGAIN}")
    metadata = {"format": str(SNAPSHOT_FORMAT), "digest": NO_DIGEST, "winnowkv": text}
    return tensors, metadata | ({} if about is None else {"about": about})


def _digest_at(header: bytes) -> int:
    found = DIGEST.search(header)
    assert found is not None
    return found.start(1)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor without gaps and in storage of its own: safetensors refuses two that lie in one."""
    packed = tensor.contiguous()
    return packed.clone() if packed.untyped_storage().nbytes() > packed.nbytes else packed


def _checked_tokens(tokens: Sequence[int], layer: CompactLayer, model: PreTrainedModel) -> Tensor:
    if len(layer.pads) != 1:
        raise CacheError(f"tokens= is for one prompt, this cache holds {len(layer.pads)} rows: leave it out")
    if len(tokens) != (seen := layer.seen - layer.pads[0]):
        raise CacheError(f"tokens= holds {len(tokens)} token ids, the cache has seen {seen}: give all that were read")
    known = _vocabulary(model)
    wrong = [one for one in tokens if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < known]
    if wrong:
        raise CacheError(f"tokens= holds {shown(wrong[0])}, token ids of this model are whole numbers from 0 to {known - 1}")
    return torch.tensor(list(tokens), dtype=torch.int64)


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return len(embeddings.weight)


def _saved_layer(layer: Any) -> tuple[Part, dict[str, Tensor]]:
    """One layer as it goes into a file: its part of the header, and its tensors by name."""
    if isinstance(layer, CompactLayer):
        recent = layer.length - layer.frozen
        tensors = {"keys": layer.keys[:, :, :recent], "values": layer.values[:, :, :recent]}
        for name, part in zip(QUANTIZED, layer.quantized, strict=False):  # nothing, or keys and values
            tensors |= {f"{name}.{kind}": getattr(part, kind) for kind in PARTS}
        if layer.valid is not None:
            tensors["valid"] = layer.valid[..., : layer.length]
        if layer.queries is not None:
            tensors["queries"] = layer.queries
        for row, positions in enumerate(layer.positions):
            if positions is not None:  # groups of layers share one tensor, which safetensors would refuse
                tensors[f"positions.{row}"] = positions.clone()
        made = CompactPart(
            length=layer.length, seen=layer.seen, prompt=layer.prompt, dropped=layer.dropped, frozen=layer.frozen,
            pads=layer.pads, positions=[None if held is None else list(held.shape) for held in layer.positions],
            valid_heads=None if layer.valid is None else layer.valid.shape[1],
            queries=None if layer.queries is None else layer.queries.shape[2],
        )  # fmt: skip
        return made, tensors
    if getattr(layer, "is_sliding", False) and getattr(layer, "keys", None) is not None:
        width = layer.sliding_window - 1
        tensors = {"keys": layer.keys[:, :, -width:], "values": layer.values[:, :, -width:]}
        return SlidingPart(seen=layer.cumulative_length, window=layer.sliding_window), tensors
    if getattr(layer, "keys", layer) is None:  # it reads another layer's
        return EmptyPart(), {}
    raise CacheError(
        f"this model has a {type(layer).__name__}: only full attention and sliding windows can be saved, read the prompt again"
    )


def _read(
    data: bytes, what: str, model: PreTrainedModel, like: CompactCache | None = None
) -> tuple[CompactCache, list[int] | None]:
    HeadGroup.of(model).check_alone("loading a cache")

    def fail(why: str) -> CacheError:
        return CacheError(f"{what} {why}")

    table, header = _opened(data, fail)
    if difference := model_difference(header.model, fingerprint(model)):
        raise fail(f"was made with another model ({difference}): {READ_AGAIN}")
    probe = like or read_one(model)  # what its layers hold, and where
    fault = lengths_fault(header, probe.layers)
    fault = fault or table_fault(table, tensor_table(header, probe.layers, ModelInfo.of(model).heads))
    if not fault:
        try:
            tensors = load_tensors(data)
        except SafetensorError as error:
            raise fail(f"is not a saved cache: {reason(error)}") from None
        fault = contents_fault(header, tensors, _vocabulary(model))
    if fault:
        raise fail(f"does not fit together ({fault}): {READ_AGAIN}")
    cache = CompactCache(model, "full", 1, decode_budget=header.decode_budget)
    cache.resume(saved_report(asdict(header.report)))
    layers: list[Any] = probe.layers
    for index, (layer, part, shows) in enumerate(zip(cache.layers, header.layers, layers, strict=True)):
        mine = {name.partition(".")[2]: each for name, each in tensors.items() if name.startswith(f"{index}.")}
        _restore(layer, part, {name: each.to(shows.keys.device) for name, each in mine.items()}, header.report.quantize)
    if fault := _counts_fault(cache):
        raise fail(f"does not fit together ({fault}): {READ_AGAIN}")
    return cache, tensors[TOKENS].tolist() if TOKENS in tensors else None


def _whole_file(path: str | Path) -> bytes:
    def fail(why: str) -> CacheError:
        return CacheError(f"{path} {why}")

    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise fail("is not a saved cache: it is no regular file")
    except (OSError, ValueError) as error:
        raise fail(f"is not a saved cache: {reason(error)}") from None
    return read_bytes(path, fail)


def _header_end(first: bytes) -> int:
    return int.from_bytes(first[:8], "little")


def _opened(data: bytes, fail: Fail) -> tuple[dict[str, TableEntry], Header]:
    """The table of contents and the header of a file whose digest is right."""

    def no_cache(why: str) -> WinnowError:
        return fail(f"is not a saved cache: {why}")

    end = _header_end(data)
    if len(data) < 8 or end > len(data) - 8:
        raise no_cache("it is cut off, or no safetensors file")
    raw = data[8 : 8 + end]
    table = parse_json(decode(raw, no_cache), no_cache)
    about = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(about, dict) or not isinstance(about.get("winnowkv"), str):
        raise no_cache("winnowkv did not write it")
    made = about.get("format")
    if made is None:
        raise fail(f"was written by an older version of winnowkv, without a digest: {READ_AGAIN}")
    if made != str(SNAPSHOT_FORMAT):
        raise fail(f"has format {str(made)[:20]}, this version reads {SNAPSHOT_FORMAT}: update winnowkv")
    digests = DIGEST.findall(raw)
    if set(about) - {"about"} != {"format", "digest", "winnowkv"} or digests != [str(about["digest"]).encode()]:
        raise no_cache("its digest is missing")
    at = 8 + raw.index(digests[0])
    digest = hashlib.sha256(data[:at] + NO_DIGEST.encode())
    digest.update(memoryview(data)[at + len(NO_DIGEST) :])
    if digest.hexdigest() != about["digest"]:
        raise fail(f"is damaged, its content does not have the digest that it had: take another copy, or {READ_AGAIN}")
    parse_json(about["winnowkv"], no_cache)
    try:
        header = Header.model_validate_json(about["winnowkv"])
        return {name: TableEntry.model_validate(entry) for name, entry in table.items()}, header
    except ValidationError as error:
        raise no_cache(first_fault(error)) from None


def _restore(layer: Any, part: Part, tensors: dict[str, Tensor], stored: Quantization | None) -> None:
    """Put one layer back as it was saved."""
    if isinstance(part, EmptyPart):
        return
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    if isinstance(part, SlidingPart):
        layer.cumulative_length = part.seen
        return
    if stored is not None:
        keys, values = ({kind: tensors[f"{name}.{kind}"] for kind in PARTS} for name in QUANTIZED)
        layer.quantized = (
            Quantized(**keys, stored=stored, per_channel=True),
            Quantized(**values, stored=stored, per_channel=False),
        )
    for name in ("length", "seen", "prompt", "dropped"):
        setattr(layer, name, getattr(part, name))
    layer.pads = list(part.pads)
    layer.valid, layer.queries = tensors.get("valid"), tensors.get("queries")
    layer.positions = [tensors.get(f"positions.{row}") for row in range(len(part.pads))]


def _counts_fault(cache: CompactCache) -> str | None:
    """What the report of one prompt counts otherwise than its layers do; rows of a batch may have been chosen since."""
    report, layers = cache.report, cache.compact_layers
    if len(layers[0].pads) != 1 or len(report.prompt_tokens) != 1:
        return None
    tokens = layers[0].prompt - layers[0].pads[0]
    held = {
        "prompt_tokens": [tokens], "kept_entries": [[sum(layer.counts(0)) / len(layer.counts(0)) for layer in layers]],
        "kept_bytes": sum(layer.kept_bytes(0) for layer in layers),
        "full_bytes": sum(tokens * layer.entry_bytes for layer in layers),
    }  # fmt: skip
    found = next((name for name, value in held.items() if getattr(report, name) != value), None)
    return found and f"its report's {found} are not those of its layers"
