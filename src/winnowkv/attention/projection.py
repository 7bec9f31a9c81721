"""The output projection of each attention block: what turns the heads' outputs into the layer's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from winnowkv.errors import UnsupportedModelError
from winnowkv.types import Projection

PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")  # what models call the projection after the heads


def output_projections(model: nn.Module) -> dict[int, nn.Module]:
    """The projection after the heads of each attention block, by layer index.

    Raises UnsupportedModelError if a model names it in a way that is not known here.
    """
    found = {index: projection for index, _, projection in attention_blocks(model)}
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its attention blocks have no output projection (looked for {', '.join(PROJECTIONS)})"
        )
    return found


def attention_blocks(model: nn.Module) -> Iterator[tuple[int, nn.Module, nn.Module]]:
    """Each attention block with its layer index and the projection after its heads, as far as that is named as known here."""
    for block in model.modules():
        index = getattr(block, "layer_idx", None)
        projection = next((getattr(block, name) for name in PROJECTIONS if hasattr(block, name)), None)
        if isinstance(index, int) and projection is not None:
            yield index, block, projection


def projection_weight(projection: nn.Module | None, layer: int, query_heads: int) -> Projection:
    """The weights ``[Hq, D, M]`` of a layer's output projection: a view if the model stores them as usual.

    ``query_heads``: those of this process, and the weights are their part, if several processes share the layer's heads.
    Weights that are offloaded, to memory or to a disk, are fetched. Raises UnsupportedModelError for a projection whose weights
    are not a plain matrix, such as a quantized one.
    """
    weight = _fetched(projection)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        kind = type(projection).__name__
        raise UnsupportedModelError(f"layer {layer}: the weights of its output projection ({kind}) cannot be read")
    if hasattr(weight, "to_local"):  # a DTensor, as tensor parallelism has them
        weight = weight.to_local()
    # Linear stores [M, Hq * D], GPT-2's Conv1D the other way round.
    matrix = weight if type(projection).__name__ == "Conv1D" else weight.t()
    by_head: Projection = matrix.detach().unflatten(0, (query_heads, -1))
    return by_head


def _fetched(projection: nn.Module | None) -> Any:
    """The projection's weight, fetched from where accelerate keeps it between forward passes; None if it has none."""
    weight = getattr(projection, "weight", None)
    if projection is None or weight is None or not weight.is_meta or not hasattr(projection, "_hf_hook"):
        return weight
    from accelerate.utils import align_module_device  # there, since it made the hook

    with align_module_device(projection):
        return projection.weight
