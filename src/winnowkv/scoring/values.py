"""What keys and values say by themselves, without attention: pure functions on tensors. Axes: see :mod:`winnowkv.types`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from winnowkv.types import Keys, Projection, Scores, Values

TOKENS_AT_ONCE = 2048  # whose projected values exist at the same time, [Hkv * G, tokens, M]


def projected_norms(values: Values, projection: Projection) -> Scores:
    """L1 norm of ``W_O v`` for each token, mean over each GQA group, ``[1, Hkv, S]``, float32.

    ``values`` ``[1, Hkv, S, D]``, ``projection`` ``[Hq, D, M]``. Source: CriticalKV (arXiv 2502.03805, section 4).
    """
    weights = projection.float().unflatten(0, (values.shape[1], -1))
    parts = []
    for part in values[0].float().split(TOKENS_AT_ONCE, 1):
        norms = [(part @ weights[:, member]).abs().sum(-1) for member in range(weights.shape[1])]
        parts.append(torch.stack(norms).mean(0))
    return torch.cat(parts, -1)[None]


def lagged_spread(states: Keys, lag: int) -> Float[Tensor, "1 Hkv P L"]:
    """Standard deviation over each token's channels, scaled to the range of the next ``lag`` tokens, ``[1, Hkv, P, lag]``.

    A token's share of its partition's (softmax). ``states``: keys or values ``[1, Hkv, (P + 1) * lag, D]`` of ``P`` partitions
    and one more that only says its range. Source: LagKV (arXiv 2504.04704).
    """
    cut: Tensor = states.float().unflatten(2, (-1, lag))
    least, most = cut[:, :, 1:].amin(-2, keepdim=True), cut[:, :, 1:].amax(-2, keepdim=True)
    return ((cut[:, :, :-1] - least) / (most - least).clamp(min=1e-6)).std(-1).softmax(-1)
