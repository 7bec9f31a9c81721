"""Reads memory sizes such as ``24GiB``."""

from __future__ import annotations

import re
from fractions import Fraction

from winnowkv.errors import InputError
from winnowkv.files import shown

BYTES_PER_UNIT = {"B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)},
                  **{f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}}  # fmt: skip


def read_size(asked: int | str, name: str = "--memory") -> int:
    """Bytes of ``24GiB``, ``24GB``, ``512MiB`` or ``1000``. Raises InputError naming the value."""
    text = asked if isinstance(asked, str) else shown(asked)  # which prints numbers of any length
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = BYTES_PER_UNIT.get(match[2].upper() or "B") if match else None
    size = int(Fraction(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise InputError(f"{name} {shown(asked)} is not a size: write it as 24GiB, 24GB, 512MiB or plain bytes")
    return size
