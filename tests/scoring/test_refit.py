"""Values refitted by least squares: against the slow way, and never worse on queries that were held out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnowkv.scoring.refit import HELD_OUT, RIDGE, refit_values, ridge

SCALE = 0.35


def states(tokens: int = 40, kv_heads: int = 2, group: int = 3, queries: int = 24, size: int = 8) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(1, kv_heads, tokens, size, generator=draw) for _ in range(2))
    own, heard = (torch.randn(1, kv_heads * group, queries, size, generator=draw) for _ in range(2))
    return own, heard, keys, values


def by_hand(own: Tensor, heard: Tensor, keys: Tensor, values: Tensor, kept: Tensor, weight: float) -> tuple[Tensor, list[bool]]:
    """One head after the other, one query after the other, by the normal equations in float64."""
    fitted, used = [], []
    group = own.shape[1] // keys.shape[1]
    for head in range(keys.shape[1]):
        place = kept[head][kept[head] >= 0]
        rows = []
        for queries, share in ((own, 1 - weight), (heard, weight)):
            mine = queries[0, head * group : (head + 1) * group].double()
            asking = [mine[member, token] for token in range(mine.shape[1]) for member in range(group)]
            rows += [(query, share / len(asking)) for query in asking]
        mean = sum(share for _, share in rows) / len(rows)
        x, y, w = [], [], []
        for query, share in rows:
            logits = keys[0, head].double() @ query * SCALE
            x.append(logits[place].softmax(0))
            y.append(logits.softmax(0) @ values[0, head].double())
            w.append((share / mean) ** 0.5)
        attention, output, weights = torch.stack(x), torch.stack(y), torch.tensor(w).double()[:, None]
        before = values[0, head, place].double()
        held = torch.tensor([at // group % HELD_OUT == HELD_OUT - 1 for at in range(len(rows))])
        a, b = (attention * weights)[~held], ((output - attention @ before) * weights)[~held]
        lam = RIDGE * (a.T @ a).diagonal().mean()
        after = before + torch.linalg.inv(a.T @ a + lam * torch.eye(len(place)).double()) @ a.T @ b
        off = [(((output - attention @ v) * weights)[held] ** 2).sum() for v in (before, after)]
        used.append(bool(off[1] < off[0]))
        fitted.append(after if used[-1] else before)
    return fitted, used


@pytest.mark.parametrize("entries", [6, 30], ids=["primal", "dual"])
@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_equals_the_normal_equations(entries: int, weight: float) -> None:
    own, heard, keys, values = states(queries=12 if entries == 30 else 24, group=1 if entries == 30 else 3)
    kept = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(h))[:entries].sort().values for h in (1, 2)])
    found, used = refit_values(own, heard, keys, values, kept, SCALE, weight)
    expected, theirs = by_hand(own, heard, keys, values, kept, weight)
    assert used.tolist() == theirs
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=0, atol=2e-4)


def test_heads_of_different_lengths_and_shared_positions() -> None:
    own, heard, keys, values = states()
    ragged = torch.tensor([[-1, -1, 3, 9, 20], [1, 2, 5, 30, 39]])
    found, _ = refit_values(own, heard, keys, values, ragged, SCALE, 0.7)
    alone, _ = refit_values(own[:, :3], heard[:, :3], keys[:, :1], values[:, :1], ragged[:1, 2:], SCALE, 0.7)
    torch.testing.assert_close(found[0, 2:], alone[0])
    shared, _ = refit_values(own, heard, keys, values, ragged[1:], SCALE, 0.7)
    torch.testing.assert_close(shared[1], found[1])


def test_values_that_are_whole_already_stay() -> None:
    """If everything stays nothing is missing, and no head takes other values."""
    own, heard, keys, values = states()
    found, used = refit_values(own, heard, keys, values, torch.arange(40)[None], SCALE, 0.7)
    assert not used.any() or (found - values[0]).abs().max() < 1e-5
    torch.testing.assert_close(found, values[0], rtol=0, atol=1e-5)


def test_what_is_fitted_comes_closer_and_noise_is_refused() -> None:
    """Where the queries that are fitted say nothing of those held out, the original values stay."""
    draw = torch.Generator().manual_seed(1)
    attention, missing = torch.rand(30, 6, generator=draw).softmax(-1), torch.randn(30, 4, generator=draw)
    change = ridge(attention, missing)
    assert (missing - attention @ change).square().sum() < missing.square().sum()
    _, heard, keys, values = states(queries=8, group=1)
    kept = torch.stack([torch.arange(0, 40, 2)] * 2)
    odd = heard.clone()
    odd[:, :, HELD_OUT - 1 :: HELD_OUT] *= -20  # looks elsewhere than the queries that are fitted
    _, used = refit_values(odd, None, keys, values, kept, SCALE, 0.0)
    assert not used.all()


def test_values_keep_their_kind_and_the_sums_are_float32() -> None:
    own, heard, keys, values = states()
    kept = torch.stack([torch.arange(0, 40, 5)] * 2)
    whole, used = refit_values(own, heard, keys, values, kept, SCALE, 0.7)
    half = [part.bfloat16() for part in (own, heard, keys, values)]
    found, _ = refit_values(*half, kept, SCALE, 0.7)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), whole, rtol=0.1, atol=0.15)
    assert used.any()
