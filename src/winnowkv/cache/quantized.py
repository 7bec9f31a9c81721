"""Quantization of the entries that stay: 8 or 4 bits, asymmetric, keys per channel and values per token.

The axes are KIVI's (arXiv 2402.02750, section 3): some channels of the keys are large in every
token, so a scale shared by the channels of a token would be theirs alone; values have no such
channels. Groups have 64 members, as there is a scale and a zero point for each.

Ranges and codes are optimum-quanto's, whose functions are plain torch on any device. Its packed
tensors are not used: unpacking them compiles a C++ or CUDA extension at run time (0.2.7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from winnowkv.errors import InputError
from winnowkv.types import BITS, Quantization, Valid

QUANTIZATION_GROUP = 64  # most members of a group; KIVI takes 32 for 2 bits, transformers 64
LOW_NIBBLE = 15


def quanto() -> Any:
    """The package optimum-quanto, loaded. Raises InputError if it is not installed."""
    try:
        import optimum.quanto
    except ImportError:
        raise InputError(
            "quantize= needs the package optimum-quanto, which is not installed: pip install 'optimum-quanto>=0.2.7'"
        ) from None
    return optimum.quanto


@dataclass(frozen=True)
class Quantized:
    """Keys or values ``[B, Hkv, n, D]`` in 8 or 4 bits.

    Attributes
    ----------
    codes: uint8 ``[B, Hkv, n, D]``; in 4 bits ``[B, Hkv, n, D / 2]``, the second half of the channels in the high bits.
    scales, zeros: step and smallest value of each group, in the model's dtype: ``[B, Hkv, ceil(n / 64), D]``
        per channel, ``[B, Hkv, n, groups of D]`` per token.
    stored: which of the two codings.
    per_channel: whether a group is one channel of consecutive entries; else it is channels of one entry.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    stored: Quantization
    per_channel: bool

    @property
    def entries(self) -> int:
        """Entries ``n``, padding included."""
        return self.codes.shape[2]

    @property
    def held_bytes(self) -> int:
        """Storage of codes, scales and zero points."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.codes, self.scales, self.zeros))

    def dequantize(self) -> Tensor:
        """What the codes stand for, ``[B, Hkv, n, D]`` in the model's dtype."""
        codes = self.codes if self.stored == "int8" else torch.cat([self.codes & LOW_NIBBLE, self.codes >> 4], -1)
        states = codes.float()  # in one float32 pass: bfloat16 would round twice
        views = groups(states, self.per_channel)
        sizes = [part.shape[2] for part, _ in views]
        for (part, axis), scales, zeros in zip(views, self.scales.split(sizes, 2), self.zeros.split(sizes, 2), strict=True):
            part.mul_(scales.unsqueeze(axis)).add_(zeros.unsqueeze(axis))
        return states.to(self.scales.dtype)

    def select(self, rows: Tensor) -> Quantized:
        """These rows of the batch, in this order."""
        codes, scales, zeros = (tensor.index_select(0, rows) for tensor in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros)


def quantize(states: Tensor, stored: Quantization, *, per_channel: bool, valid: Valid | None = None) -> Quantized:
    """Quantize keys or values ``[B, Hkv, n, D]``; every value comes back to within half a step.

    Padding, where ``valid`` ``[B, 1 or Hkv, n]`` is False, lies in front and does not count: a row
    of a batch gets the codes it would get alone. Raises InputError where 4 bits meet an odd head size.
    """
    if stored == "int4" and states.shape[3] % 2:
        raise InputError(f"int4 packs channels in pairs, this model's head size {states.shape[3]} is odd: use int8")
    package, dtype = quanto(), states.dtype
    qtype = package.qint8 if stored == "int8" else package.qint4
    wide = (states if valid is None else without_padding(states, valid)).float()
    codes = torch.empty(states.shape, dtype=torch.uint8, device=states.device)
    scales, zeros = [], []
    for (part, axis), (target, _) in zip(groups(wide, per_channel), groups(codes, per_channel), strict=True):
        members = part.movedim(axis, -1)
        step, shift = package.MaxOptimizer().optimize(members.flatten(0, -2), qtype, axis=0)
        # Rounded to what is stored before the codes are made from it; a constant group has no range, but needs a step.
        scale = step.to(dtype).clamp(min=torch.finfo(dtype).tiny).view(members.shape[:-1])
        zero = -shift.to(dtype).view(members.shape[:-1])
        step, shift = scale.float().unsqueeze(axis), -zero.float().unsqueeze(axis)
        target.copy_(torch.ops.quanto.quantize_affine(part, BITS[stored], 0, None, step, shift))
        scales.append(scale)
        zeros.append(zero)
    if stored == "int4":
        low, high = codes.chunk(2, -1)
        codes = low | high << 4
    return Quantized(codes, torch.cat(scales, 2), torch.cat(zeros, 2), stored, per_channel)


def groups(states: Tensor, per_channel: bool) -> list[tuple[Tensor, int]]:
    """Views of ``[B, Hkv, n, D]`` in which each group lies along one axis, and that axis.

    Entries are counted from the end, so that padding in front moves no group.
    """
    entries, size = states.shape[2:]
    if not per_channel:
        members = channel_group(size)
        return [(states.unflatten(3, (size // members, members)), 4)]
    odd = entries % QUANTIZATION_GROUP
    views = [(states[:, :, None, :odd], 3)] if odd else []
    return [*views, (states[:, :, odd:].unflatten(2, (entries // QUANTIZATION_GROUP, QUANTIZATION_GROUP)), 3)]


def channel_group(size: int) -> int:
    """Channels of one token that share a scale: the largest divisor of the head size up to 64."""
    return next(members for members in range(min(size, QUANTIZATION_GROUP), 0, -1) if size % members == 0)


def without_padding(states: Tensor, valid: Valid) -> Tensor:
    """Keys or values whose padding repeats the first entry after it: that leaves the range of its group as it is."""
    first = valid.int().argmax(-1)[..., None, None].expand(*states.shape[:2], 1, states.shape[3])
    return states.where(valid[..., None], states.gather(2, first))


def stored_bytes(entries: int, size: int, stored: Quantization, itemsize: int, *, per_channel: bool) -> int:
    """Bytes of one KV head's keys or values: codes, and a scale and a zero point of ``itemsize`` for each group."""
    count = math.ceil(entries / QUANTIZATION_GROUP) * size if per_channel else entries * (size // channel_group(size))
    return entries * size * BITS[stored] // 8 + 2 * itemsize * count
