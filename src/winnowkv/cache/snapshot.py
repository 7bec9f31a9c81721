"""Save a compact cache and load it in another process: a long prompt is read once, its cache kept.

One safetensors file holds keys and values of what stayed (quantized ones as they are), the
positions, and as metadata the lengths, the report and a fingerprint of the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.quantized import Quantized
from winnowkv.cache.reports import saved_report
from winnowkv.errors import CacheError
from winnowkv.models.devices import layer_devices
from winnowkv.models.head_group import HeadGroup
from winnowkv.models.info import ModelInfo
from winnowkv.policies.decode_eviction import DecodeEviction
from winnowkv.types import Quantization

SNAPSHOT_FORMAT = 1
LENGTHS = ("length", "seen", "prompt", "pads", "dropped")
QUANTIZED = ("quantized_keys", "quantized_values")
PARTS = ("codes", "scales", "zeros")


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What must be equal for a cache to fit a model: its sizes and dtype (weights are not compared)."""
    return {**ModelInfo.of(model).to_dict(), "dtype": str(model.dtype)}


def save_cache(cache: CompactCache, model: PreTrainedModel, path: str | Path) -> None:
    """Write a cache after prefill, with whatever was generated since, to one safetensors file.

    Raises
    ------
    CacheError
        Before the prompt was read, or for a model with sliding-window layers, whose state is not ours.
    """
    HeadGroup.of(model).check_alone("saving a cache")
    if len(cache.compact_layers) != len(cache.layers):
        raise CacheError("this model has layers that are not full attention: their state cannot be saved yet")
    if not cache.report.prompt_tokens:
        raise CacheError("nothing was read into this cache yet: there is nothing to save")
    eviction = cache.compact_layers[0].decode_eviction
    if cache.decode_budget is not None and eviction != DecodeEviction():
        raise CacheError(
            f"the decode budget's own rule ({type(eviction).__name__}) cannot be saved: make the cache without one"
        )
    tensors: dict[str, Tensor] = {}
    lengths = []
    for index, layer in enumerate(cache.compact_layers):
        lengths.append({name: getattr(layer, name) for name in LENGTHS})
        recent = layer.length - layer.frozen
        tensors[f"{index}.keys"] = layer.keys[:, :, :recent].contiguous()
        tensors[f"{index}.values"] = layer.values[:, :, :recent].contiguous()
        for name, part in zip(QUANTIZED, layer.quantized, strict=False):  # nothing, or keys and values
            tensors |= {f"{index}.{name}.{kind}": getattr(part, kind) for kind in PARTS}
        if layer.valid is not None:
            tensors[f"{index}.valid"] = layer.valid[..., : layer.length].contiguous()
        if layer.queries is not None:
            tensors[f"{index}.queries"] = layer.queries.contiguous()
        for row, positions in enumerate(layer.positions):
            if positions is not None:  # groups of layers share one tensor, which safetensors would refuse
                tensors[f"{index}.positions.{row}"] = positions.clone()
    about = {
        "format": SNAPSHOT_FORMAT, "model": fingerprint(model), "lengths": lengths, "decode_budget": cache.decode_budget,
        "report": cache.report.to_dict(),
    }  # fmt: skip
    save_file(tensors, path, metadata={"winnowkv": json.dumps(about)})


def load_cache(path: str | Path, model: PreTrainedModel) -> CompactCache:
    """A cache that continues from the saved one; pass it as ``past_key_values`` with the next tokens.

    Raises
    ------
    CacheError
        For a file that is not a saved cache, of a newer format, or of another model: the difference is named.
    """
    HeadGroup.of(model).check_alone("loading a cache")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["winnowkv"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CacheError(f"{path} is not a saved cache: {error}") from None
    if about["format"] > SNAPSHOT_FORMAT:
        raise CacheError(f"{path} has format {about['format']}, this version reads up to {SNAPSHOT_FORMAT}: update winnowkv")
    for name, here in fingerprint(model).items():
        if about["model"][name] != here:
            raise CacheError(f"{path} was made with another model ({name} {about['model'][name]}, here {here})")
    report = saved_report(about["report"])
    cache = CompactCache(model, "full", 1, decode_budget=about["decode_budget"])
    cache.resume(report)
    devices = layer_devices(model, range(len(cache.layers)))  # all of them are full attention
    for index, (layer, lengths) in enumerate(zip(cache.compact_layers, about["lengths"], strict=True)):
        mine = {k.removeprefix(f"{index}."): t.to(devices[index]) for k, t in tensors.items() if k.startswith(f"{index}.")}
        restore(layer, lengths, mine, report.quantize)
    return cache


def restore(layer: CompactLayer, lengths: dict[str, Any], tensors: dict[str, Tensor], stored: Quantization | None) -> None:
    """Put one layer back as it was saved."""
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    if stored is not None:
        keys, values = ({kind: tensors[f"{name}.{kind}"] for kind in PARTS} for name in QUANTIZED)
        layer.quantized = (
            Quantized(**keys, stored=stored, per_channel=True),
            Quantized(**values, stored=stored, per_channel=False),
        )
    for name in LENGTHS:
        setattr(layer, name, lengths[name])
    layer.valid, layer.queries = tensors.get("valid"), tensors.get("queries")
    layer.positions = [tensors.get(f"positions.{row}") for row in range(len(layer.pads))]
