"""What a model's cache is made of, seen on a run without weights.

A formula over a config's fields goes wrong where layers differ, where keys are larger than values, or where heads have other
names. So the model is built without storage, reads two tokens into a real :class:`CompactCache`, and the cache's layers say
what they hold. What the cache refuses is refused here in the same words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.reading import prefill
from winnowkv.errors import UnsupportedModelError
from winnowkv.memory.plan import LayerShape, Shape
from winnowkv.models.info import Fingerprint, position_limit


def read_shape(config: PreTrainedConfig, itemsize: int) -> Shape:
    """The shape of a config's model in numbers of ``itemsize`` bytes; takes a second for 70 billion parameters.

    Raises UnsupportedModelError for a model that compact caches cannot serve, or that cannot run without weights.
    """
    name = type(config).__name__.removesuffix("Config")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError:
        raise UnsupportedModelError(f"{name} is no decoder-only language model that transformers knows") from None
    try:
        layers = _layers(config.get_text_config(decoder=True))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{name}: what its cache holds cannot be seen without weights ({reason}): load it and read the report of a run"
        ) from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Shape(layers, itemsize, parameters, position_limit(model), Fingerprint.of(model))


def _layers(config: PreTrainedConfig) -> tuple[LayerShape, ...]:
    # Fake tensors and not meta ones: older releases ask the device for its autocast mode, and meta has none.
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        cache = CompactCache(model, "full", 1)
        prefill(model, torch.ones(1, 2, dtype=torch.long), cache)
    known = [*cache.compact_layers, *cache.sliding_layers]
    for index, layer in enumerate(cache.layers):
        if layer not in known and getattr(layer, "keys", layer) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: layer {index} keeps a {type(layer).__name__}; only full attention and sliding "
                "windows can be planned"
            )
    # A layer that reads another's keys and values has none itself.
    return tuple(_shape(layer) for layer in cache.layers if getattr(layer, "keys", None) is not None)


def _shape(layer: Any) -> LayerShape:
    kv_heads, key_size, value_size = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
    return LayerShape(kv_heads, key_size, value_size, layer.sliding_window if layer.is_sliding else None)
