"""Where the parts of a model work, also if they are spread over devices or offloaded (``device_map=``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def working_device(module: nn.Module) -> torch.device | None:
    """The device on which a module computes; None if it has no parameters to tell by.

    Between forward passes offloaded parameters are elsewhere: accelerate's hook knows where they will be.
    """
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if getattr(each, "offload", False) and each.execution_device is not None:
                return torch.device(each.execution_device)
        for parameter in part.parameters(recurse=False):
            return parameter.device
    return None


def input_device(model: Any) -> torch.device:
    """Where a transformers model takes its token ids."""
    return working_device(model.get_input_embeddings()) or model.device


def layer_devices(model: Any, layers: Iterable[int]) -> list[torch.device]:
    """Where the attention of each of these layers computes, and so where its keys and values are."""
    found = {}
    for block in model.modules():
        index = getattr(block, "layer_idx", None)
        if isinstance(index, int) and index not in found and (device := working_device(block)) is not None:
            found[index] = device
    return [found.get(layer) or input_device(model) for layer in layers]
