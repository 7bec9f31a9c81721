"""CUDA graphs of decode steps: the kernels of a step are recorded once and started together, not one by one by Python.

``torch.compile(mode="reduce-overhead")`` would be simpler, but it does not record a step that writes into buffers from
outside, as slots do, unless their addresses never change; slots grow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Step = Callable[..., Tensor]
Inputs = dict[str, Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class Recorded:
    """A step that is recorded at its second call with the same buffers and played back at later ones.

    Parameters
    ----------
    record: runs a function without arguments once; returns a function that plays it back, and its output. Default: a CUDA
        graph.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._record = record or record_cuda
        self._key: Hashable = None
        self._inputs: Inputs = {}
        self._play: Callable[[], None] | None = None
        self._output: Tensor
        self._broken = False

    def __call__(self, step: Step, key: Hashable, inputs: Inputs) -> Tensor:
        """The step's output for input tensors by name, as a tensor that later calls do not change.

        ``key``: addresses and shapes of everything else that the step reads or writes.
        """
        if self._broken:
            return step(**inputs)
        if key != self._key:  # compiled now, and recorded only if these buffers come again
            self._key, self._play = key, None
            self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            return step(**inputs)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        if self._play is None:
            try:
                self._play, self._output = self._record(lambda: step(**self._inputs))
            except RuntimeError as error:
                cause = str(error).strip().splitlines()[0]
                warnings.warn(f"a step cannot be recorded as a CUDA graph ({cause}): kernels start one by one", stacklevel=5)
                self._broken = True
                return step(**inputs)
        self._play()
        return self._output.clone()  # the next playback overwrites it


def record_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of a function that has run before; other threads may use the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output
