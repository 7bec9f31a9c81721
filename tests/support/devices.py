"""Pretend devices: a machine with one device behaves like one with several, as far as mistakes go.

Tensors stay where they are and only say that they are elsewhere. As with CUDA an operation on tensors of two devices raises
RuntimeError; single numbers of the CPU, and indices of the CPU, may go everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FIRST, SECOND = (torch.device("hpu", index) for index in range(2))  # a kind that no test machine has
CPU = torch.device("cpu")
NAME = "_pretended"  # attribute of a tensor that says to be elsewhere
# What asks a tensor where it is, or says whether it is there, and may be asked of tensors of several devices.
FREE = {
    "__deepcopy__",
    "__get__",
    "__set__",
    "__delete__",
    "__repr__",
    "is_floating_point",
    "numel",
    "data_ptr",
    "size",
    "stride",
}
MOVES = {"to", "cpu", "copy_", "__setitem__"}  # may read from one device and write to another one, or index from the CPU
INDEXES = {"__getitem__", "index_put_"}
LIKE = ("__torch_function__",)


def where(tensor: Tensor) -> torch.device:
    """The device that a tensor pretends to be on."""
    return tensor.__dict__.get(NAME, CPU)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor, which from now on pretends to be on the device."""
    setattr(tensor, NAME, device)
    return tensor


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors(value)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from tensors(value)


class PretendDevices(TorchFunctionMode):
    """While this is entered tensors have the devices that were pretended, and may meet on one device only."""

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function == Tensor.device.__get__:
            return where(args[0])
        if function == Tensor.is_cpu.__get__:
            return where(args[0]) == CPU
        args = list(args)
        asked = take_device(name, args, kwargs)
        meeting = None if name in FREE else self.meeting(name, args, kwargs)
        result = function(*args, **kwargs)
        home = asked or meeting or CPU
        if name in FREE and name not in ("__deepcopy__",):
            home = where(args[0]) if args and isinstance(args[0], Tensor) else home
        for found in tensors(result):
            if not any(found is given for given in tensors((args, kwargs))):
                put(found, home)
            elif name in ("to", "cpu") and asked is not None and where(found) != asked:
                return put(found.view_as(found), asked)
        return result

    @staticmethod
    def meeting(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device | None:
        """The device on which the operation runs. Raises RuntimeError as CUDA does if tensors of two devices meet."""
        given = list(tensors((args, kwargs)))
        if not given:
            return None
        if name in MOVES | INDEXES:
            first = where(given[0])
            indices = list(tensors(args[1])) if name in ("__getitem__", "__setitem__", "index_put_") else []
            if strangers := [where(index) for index in indices if where(index) not in (CPU, first)]:
                raise RuntimeError(f"{name}: indices should be either on cpu or on the same device: {strangers[0]}, {first}")
            return first
        homes = {where(each) for each in given if each.ndim or where(each) != CPU}
        if len(homes) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, homes))}")
        return homes.pop() if homes else CPU


def take_device(name: str, args: list[Any], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names, taken out of its arguments: the work is done on the real one."""
    found = kwargs.get("device")
    if found is not None:
        kwargs["device"] = CPU
    if name == "cpu":
        found = CPU
    if name == "to" and len(args) > 1:
        if isinstance(args[1], Tensor):
            found, args[1] = where(args[1]), args[1].dtype
        elif isinstance(args[1], torch.device | str):
            found, args[1] = args[1], CPU
    return None if found is None else torch.device(found)


def spread(model: nn.Module, devices: Callable[[int], torch.device]) -> None:
    """Put each block of a decoder on a pretended device, what comes before on the first block's, after on the last one's.

    What a block gets is moved to its device, as accelerate's hooks do for ``device_map``.
    """
    decoder = model.get_decoder()
    blocks = list(decoder.layers)
    for parameter in [*model.parameters(), *model.buffers()]:
        put(parameter, devices(0))
    for index, block in enumerate([decoder.embed_tokens, *blocks, decoder.norm, model.lm_head]):
        device = devices(min(max(index - 1, 0), len(blocks) - 1))
        for parameter in [*block.parameters(), *block.buffers()]:
            put(parameter, device)
        block.register_forward_pre_hook(lambda _, args, kwargs, device=device: moved((args, kwargs), device), with_kwargs=True)


def moved(values: Any, device: torch.device) -> Any:
    """Arguments whose tensors are on the device; what is no tensor, tuple or dictionary stays, as caches do."""
    if isinstance(values, Tensor):
        return values.to(device)
    if type(values) is dict:
        return {name: moved(value, device) for name, value in values.items()}
    return type(values)(moved(value, device) for value in values) if type(values) in (tuple, list) else values
