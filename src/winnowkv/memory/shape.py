"""The shape of a model, read from the layers of its cache: from a live cache, or from a run of the model without weights.

A formula over a config's fields is wrong if layers differ, if keys are larger than values, or if a config names its heads
otherwise. So the model is built without storage and reads two tokens into a real :class:`CompactCache`, whose layers show
heads and sizes. A model that the cache refuses is refused here with the same message.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses import fake_tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.reading import prefill
from winnowkv.errors import UnsupportedModelError, WinnowError
from winnowkv.files import reason, shown
from winnowkv.memory.plan import LayerShape, Shape
from winnowkv.models.info import ModelInfo, position_limit

MOST_LAYERS = 10_000  # more is a slip, and would be built for hours


def read_shape(config: PreTrainedConfig, itemsize: int) -> Shape:
    """The shape of a config's model, with numbers of ``itemsize`` bytes; takes a second for 70 billion parameters.

    Raises UnsupportedModelError for a model that compact caches cannot serve, or that cannot run without weights.
    """
    name = type(config).__name__.removesuffix("Config")
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if type(count) is not int or not 0 < count <= MOST_LAYERS:
        raise UnsupportedModelError(f"{name}: its config says {shown(count)} layers, it must be 1 to {MOST_LAYERS}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        if type(config) in AutoModelForCausalLM._model_mapping:
            raise UnsupportedModelError(f"no model can be made of this {name}: {reason(error)}") from None
        raise UnsupportedModelError(f"{name} is not a decoder-only language model that transformers knows") from None
    except Exception as error:  # what a config with numbers that make no sense raises is anything
        raise UnsupportedModelError(f"no model can be made of this {name}: {reason(error)}") from None
    log = logging.getLogger(fake_tensor.__name__)
    try:
        log.disabled = True  # it would print a traceback beside our sentence
        layers = layers_without_weights(config.get_text_config(decoder=True))
    except WinnowError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name}: what its cache holds cannot be seen without weights ({reason(error)}): load it and read a run's report"
        ) from error
    finally:
        log.disabled = False
    return shape_of(layers, model, itemsize)


def shape_of(layers: Iterable[Any], model: PreTrainedModel, itemsize: int | None = None) -> Shape:
    """The shape of a model whose cache has these layers; ``itemsize`` bytes a number, by default as the layers hold them.

    Layers hold ``keys`` ``[B, Hkv, n, D]`` and ``values``; one that slides has a ``sliding_window``. A layer without keys reads
    those of another one and takes no memory.
    """
    holding = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    shapes = tuple(
        LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], getattr(layer, "sliding_window", None))
        for layer in holding
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = holding[0].keys.itemsize if itemsize is None else itemsize
    return Shape(shapes, size, parameters, position_limit(model), ModelInfo.of(model))


def layers_without_weights(config: PreTrainedConfig) -> list[Any]:
    """The layers of a :class:`CompactCache` into which the config's model has read two tokens, as fake tensors."""
    # Fake tensors and not meta ones: older releases ask the device for its autocast mode, and meta has none.
    with fake_tensor.FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        cache = CompactCache(model, "full", 1)
        prefill(model, torch.ones(1, 2, dtype=torch.long), cache)
    supported = [*cache.compact_layers, *cache.sliding_layers]
    for index, layer in enumerate(cache.layers):
        if layer not in supported and getattr(layer, "keys", layer) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: layer {index} keeps a {type(layer).__name__}; only full attention and sliding "
                "windows can be planned"
            )
    return list(cache.layers)
