"""The axis legend and the tensor aliases of the whole package, stated once.

==== =====================================================================
axis meaning
==== =====================================================================
B    batch rows (1 wherever a policy works: one request at a time)
Hq   query heads
Hkv  KV heads; query head ``h`` belongs to KV head ``h // G``
G    GQA group size, ``Hq / Hkv``
H    score heads: ``Hkv``, or 1 if all heads share one score
S    prompt tokens
W    queries of the observation window, the last ``W`` of the prompt
C    context tokens that compete for a place, ``S - W``
D    head size
M    hidden size of the model
n    entries kept
R    review windows (WindowKV), ``ceil(C / width)``
==== =====================================================================

Importance scores are non-negative and higher is kept. Indices are token
positions of the prompt, unique and ascending along their last axis; if heads of
a layer keep different numbers, the shorter ones are padded in front with -1.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

Between = Callable[[int], None]  # called between the layers of a forward pass, with its tokens

Queries = Float[Tensor, "B Hq W D"]
Keys = Float[Tensor, "B Hkv S D"]
Values = Float[Tensor, "B Hkv S D"]
Projection = Float[Tensor, "Hq D M"]
HeadScores = Float[Tensor, "B Hq C"]
Scores = Float[Tensor, "B H C"]
WindowScores = Float[Tensor, "B H R"]
Indices = Int[Tensor, "B H n"]
Padding = Bool[Tensor, "B S"]
Valid = Bool[Tensor, "B H S"]
Spans = tuple[tuple[int, int], ...]  # (start, end) of token positions, end not included, ascending and apart
# Entries per KV head of a layer, mean over its heads: a fraction if heads keep different numbers.
Entries = int | Fraction
# How the entries that stay are stored, and the bits of a number then.
Quantization = Literal["int8", "int4"]
BITS: dict[str, int] = {"int8": 8, "int4": 4}

__all__ = [
    "BITS", "Entries", "HeadScores", "Indices", "Keys", "Padding", "Projection", "Quantization", "Queries", "Scores", "Spans",
    "Valid", "Values", "WindowScores",
]  # fmt: skip
