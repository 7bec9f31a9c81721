"""The output projection of each attention block: what turns the heads' outputs into the layer's."""

from __future__ import annotations

from torch import nn

from winnowkv.errors import UnsupportedModelError
from winnowkv.types import Projection

PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")  # what models call the projection after the heads


def output_projections(model: nn.Module) -> dict[int, nn.Module]:
    """The projection after the heads of each attention block, by layer index.

    Raises UnsupportedModelError if a model names it in a way that is not known here.
    """
    found = {}
    for block in model.modules():
        index = getattr(block, "layer_idx", None)
        projection = next((getattr(block, name) for name in PROJECTIONS if hasattr(block, name)), None)
        if isinstance(index, int) and projection is not None:
            found[index] = projection
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its attention blocks have no output projection (looked for {', '.join(PROJECTIONS)})"
        )
    return found


def projection_weights(model: nn.Module, layers: list[int], query_heads: int) -> list[Projection]:
    """The weights ``[Hq, D, M]`` of these layers' output projections: views if the model stores them as usual.

    Raises UnsupportedModelError for a projection whose weights are not a plain matrix, such as a quantized one.
    """
    found, weights = output_projections(model), []
    for layer in layers:
        projection = found.get(layer)
        weight = getattr(projection, "weight", None)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            kind = type(projection).__name__
            raise UnsupportedModelError(f"layer {layer}: the weights of its output projection ({kind}) cannot be read")
        # Linear stores [M, Hq * D], GPT-2's Conv1D the other way round.
        matrix = weight if type(projection).__name__ == "Conv1D" else weight.t()
        weights.append(matrix.detach().unflatten(0, (query_heads, -1)))
    return weights
