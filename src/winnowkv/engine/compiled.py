"""A model's decode step through ``torch.compile``.

On the CPU a step of one row reads each weight once, in the order in memory, and few graphs serve all sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

MAX_COMPILED_GRAPHS = 64  # per process; torch stops compiling after 8 and runs the rest eagerly


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model's forward pass through ``torch.compile``; shapes are static unless marked (:func:`any_size`)."""
    backend = one_row if next(model.parameters()).device.type == "cpu" else "inductor"
    run = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # its older name

    def forward(**inputs: Any) -> Any:
        with torch._dynamo.config.patch({limit: MAX_COMPILED_GRAPHS}):
            return run(**inputs)

    return forward


def any_size(*tensors: Tensor) -> None:
    """Tell ``torch.compile`` that the first dimension of these tensors may change, if it is more than one."""
    for tensor in tensors:
        if len(tensor) > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def one_row(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Inductor as a backend of ``torch.compile``, with :func:`linear` in place of linear layers."""
    for node in graph.graph.nodes:
        if node.target is torch.nn.functional.linear:
            node.target = linear
    graph.recompile()
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs)
    return compiled


def linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, but for one row ``[..., 1, K]`` of bfloat16, which is a sum of products in float32. To be compiled.

    Torch's own product (oneDNN) of one row takes twice the time of a plain loop over the weights ``[N, K]``, which takes
    little more than reading them. Loops over two or more rows were no faster; other dtypes were not measured.
    """
    if given.dtype != torch.bfloat16 or given.numel() != given.shape[-1]:
        return torch.nn.functional.linear(given, weight, bias)
    sums = (weight.float() * given.reshape(1, -1).float()).sum(-1)
    if bias is not None:
        sums = sums + bias.float()
    return sums.to(given.dtype).reshape(*given.shape[:-1], len(weight))
