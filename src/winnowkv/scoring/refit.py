"""Values refitted by least squares, so that attention over the entries that stay gives what attention over all gave."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from winnowkv.types import Indices, Keys, Queries, Values

RIDGE = 0.01  # of the mean diagonal of the normal equations
HELD_OUT = 4  # the queries of every fourth token decide, and are not fitted


def refit_values(
    own: Queries,
    heard: Queries | None,
    keys: Keys,
    values: Values,
    kept: Indices,
    scale: float,
    weight: float,
) -> tuple[Float[Tensor, "Hkv n D"], Bool[Tensor, " Hkv"]]:
    """Values that take the place of those kept, ``[Hkv, n, D]``, and which KV heads' differ from the original ones.

    Per KV head, in float32, with ``X`` the attention of the queries over the kept entries and ``Y`` their output over all:
    ``V' = V + X' (X X' + lam I)^-1 (Y - X V)``, which is ``(X'X + lam I)^-1 X' (Y - X V)`` in its dual form; whichever is
    smaller is solved. A ridge pulls towards the original values. Every fourth token is held out: a head takes the new values
    only if the output of its queries comes closer to ``Y`` with them.
    Source: design notes after Attention Matching (arXiv 2602.16284), which fits keys and biases, too.

    Parameters
    ----------
    own: queries ``[1, Hq, W, D]`` that stand in for the answer's; heard: the answer's, None if there are none.
    keys, values: of the whole prompt, ``[1, Hkv, S, D]``.
    kept: positions that stay, ``[H, n]`` ascending, with -1 in front of a shorter head's.
    weight: share of the heard queries in the sum of squares.
    """
    kv_heads, count, group = keys.shape[1], kept.shape[-1], own.shape[1] // keys.shape[1]
    kept = kept.to(keys.device).expand(kv_heads, -1)
    parts = [(own, 1.0 if heard is None else 1 - weight)] + ([] if heard is None else [(heard, weight)])
    fitted = values.new_zeros(kv_heads, count, values.shape[3])
    used = torch.zeros(kv_heads, dtype=torch.bool, device=keys.device)
    for head in range(kv_heads):
        stays = kept[head] >= 0
        columns = kept[head][stays].long()
        asking, weights = _queries_of(parts, head, kv_heads)
        if len(asking) < HELD_OUT * group:  # nothing to hold out: a policy that wants no queries, before any was heard
            fitted[head, stays] = values[0, head, columns]
            continue
        logits = asking @ keys[0, head].float().t() * scale
        whole = logits.softmax(-1) @ values[0, head].float()
        attention, before = logits[:, columns].softmax(-1), values[0, head, columns].float()
        missing = whole - attention @ before
        held = torch.arange(len(asking), device=keys.device) // group % HELD_OUT == HELD_OUT - 1
        change = ridge(attention[~held] * weights[~held, None], missing[~held] * weights[~held, None])
        after = missing[held] - attention[held] @ change
        better = (after.square().sum(-1) * weights[held].square()).sum() < (
            missing[held].square().sum(-1) * weights[held].square()
        ).sum()
        used[head] = better
        fitted[head, stays] = torch.where(better, before + change, before).to(values.dtype)
    return fitted, used


def ridge(attention: Tensor, missing: Tensor) -> Tensor:
    """The change of values ``[n, D]`` that makes up what is ``missing`` ``[q, D]`` of what ``attention`` ``[q, n]`` gives."""
    queries, entries = attention.shape
    diagonal = attention.square().sum() / entries * RIDGE + torch.finfo(torch.float32).tiny
    if queries < entries:
        system = attention @ attention.t()
        system.diagonal().add_(diagonal)
        through: Tensor = torch.linalg.solve(system, missing)
        return attention.t() @ through
    system = attention.t() @ attention
    system.diagonal().add_(diagonal)
    change: Tensor = torch.linalg.solve(system, attention.t() @ missing)
    return change


def _queries_of(parts: list[tuple[Queries, float]], head: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """All queries of one KV head's group ``[q, D]``, and the square root of each one's weight, whose mean square is 1."""
    asking, weights = [], []
    for queries, share in parts:
        if not queries.shape[2] or not share:
            continue
        mine = queries[0].unflatten(0, (kv_heads, -1))[head].transpose(0, 1).flatten(0, 1).float()
        asking.append(mine)
        weights.append(mine.new_full((len(mine),), share / len(mine)))
    if not asking:
        none = parts[0][0].new_zeros(0, parts[0][0].shape[-1], dtype=torch.float32)
        return none, none[:, 0]
    each = torch.cat(weights)
    return torch.cat(asking), (each / each.mean()).sqrt()
