"""The heads of a model that tensor parallelism has spread over processes: which are here, and how to get at the others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from winnowkv.errors import UnsupportedModelError


@dataclass(frozen=True)
class HeadGroup:
    """The processes that share the heads of each layer: each has as many as the others, the first process the first ones.

    Every process reads the same prompt at the same time, so each asks for the same sums in the same order; they wait for each
    other. One process alone has all heads, and everything here gives back what it got.

    Attributes
    ----------
    rank, size: this process's number among them, and how many there are.
    processes: their ``torch.distributed`` group; None if there is one only.
    """

    rank: int = 0
    size: int = 1
    processes: Any = None

    @classmethod
    def of(cls, model: Any) -> HeadGroup:
        """Read it from a transformers model. Raises UnsupportedModelError if processes share its layers, not its heads."""
        mesh: Any = getattr(model, "_device_mesh", None)
        if mesh is None:
            return ALL_HEADS
        names = mesh.mesh_dim_names or ()
        if "pp" in names and mesh["pp"].size() > 1:
            raise UnsupportedModelError(
                f"the layers of {type(model).__name__} are spread over {mesh['pp'].size()} processes (pipeline parallelism), "
                "and layers share a budget: load it with tensor parallelism (tp_plan=) or device_map="
            )
        if (getattr(model, "_tp_size", None) or 1) == 1:
            return ALL_HEADS
        mine = mesh["tp"] if "tp" in names else mesh
        return cls(mine.get_local_rank(), mine.size(), mine.get_group())

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadGroup:
        return self  # processes cannot be copied

    def of_layer(self, here: int, heads: int) -> HeadGroup:
        """The group of a layer that has ``here`` of the model's ``heads`` in this process: all if its plan spreads none.

        Raises UnsupportedModelError if they are spread unevenly.
        """
        if self.size == 1 or here == heads:
            return ALL_HEADS
        if here * self.size != heads:
            raise UnsupportedModelError(
                f"{here} of {heads} KV heads are in this process, and {self.size} processes share them: heads must be spread "
                f"evenly, so load the model in a number of processes that divides {heads}"
            )
        return self

    def check_alone(self, what: str) -> None:
        """Raise UnsupportedModelError for ``what`` works on whole caches if this process has a part of the heads only."""
        if self.size > 1:
            raise UnsupportedModelError(
                f"{what} needs all heads of the model in one process, and {self.size} processes share them: load the model "
                "without tp_plan= (device_map= spreads it over devices), or use compress() or CompactCache"
            )

    def count(self, heads: int) -> int:
        """How many of the model's heads are in this process."""
        return heads // self.size

    def whole(self, states: Tensor, axis: int = 1) -> Tensor:
        """All heads' tensor of this process's, which has its heads along ``axis``."""
        return states if self.size == 1 else torch.cat(self._each(states), axis)

    def mine(self, states: Tensor, axis: int) -> Tensor:
        """This process's heads of all heads' tensor."""
        here = self.count(states.shape[axis])
        return states.narrow(axis, self.rank * here, here)

    def total(self, part: Tensor) -> Tensor:
        """The sum of all processes' tensors, to the same bit in each."""
        return part if self.size == 1 else torch.stack(self._each(part)).sum(0)

    def _each(self, states: Tensor) -> list[Tensor]:
        states = states.detach().contiguous()
        found = [torch.empty_like(states) for _ in range(self.size)]
        dist.all_gather(found, states, group=self.processes)
        return found


ALL_HEADS = HeadGroup()
