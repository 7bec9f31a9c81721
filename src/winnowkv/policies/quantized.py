"""The whole cache in fewer bits: what eviction is compared with at equal bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from winnowkv.errors import PolicyError
from winnowkv.policies.full import Full
from winnowkv.types import Quantization


@dataclass(frozen=True, kw_only=True)
class Int8(Full):
    """Keep every entry, in 8 bits: ``full:quantize=int8`` by a name of its own.

    It needs the package optimum-quanto.

    Formula
    -------
    ``code = round((x - zero) / step)`` with a ``zero`` and a ``step`` for each group of 64: keys in groups of consecutive
    entries of one channel, values in groups of channels of one entry.

    Departures
    ----------
    From KIVI, whose axes these are: it stores 2 bits in groups of 32 and leaves the newest tokens in full precision; here the
    whole prompt is stored in 8 bits, and what comes after it in full precision.
    """

    name: ClassVar[str] = "int8"
    source: ClassVar[str] = "keys per channel, values per token: KIVI, arXiv 2402.02750, section 3"
    scope: ClassVar[str] = "everything, in 8 bits"
    purpose: ClassVar[str] = "half of the memory at hardly any loss: nothing is evicted"

    quantize: Quantization | None = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize != self.name:
            raise PolicyError(f"{self.name}: quantize={self.quantize} contradicts the name: use full:quantize={self.quantize}")


@dataclass(frozen=True, kw_only=True)
class Int4(Int8):
    """Keep every entry, in 4 bits: ``full:quantize=int4`` by a name of its own.

    It needs the package optimum-quanto.

    Formula
    -------
    ``code = round((x - zero) / step)`` with a ``zero`` and a ``step`` for each group of 64: keys in groups of consecutive
    entries of one channel, values in groups of channels of one entry.

    Departures
    ----------
    From KIVI, whose axes these are: it stores 2 bits in groups of 32 and leaves the newest tokens in full precision; here the
    whole prompt is stored in 4 bits, and what comes after it in full precision.
    """

    name: ClassVar[str] = "int4"
    scope: ClassVar[str] = "everything, in 4 bits"
    purpose: ClassVar[str] = "28% of the memory at a small loss: nothing is evicted"

    quantize: Quantization | None = "int4"
