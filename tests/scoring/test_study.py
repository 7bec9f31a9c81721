"""Sums and maxima over a study's queries are those of the whole attention matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnowkv.scoring import attention as tiling
from winnowkv.scoring.attention import causal_attention
from winnowkv.scoring.study import Contribution, Evidence, Studied, projected_lengths

HEADS, KV_HEADS, SIZE, TEXT = 6, 2, 8, 40


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def passes(lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of forward passes that each come after the same text."""
    text = normal(1, KV_HEADS, TEXT, SIZE)
    return [
        (2 * normal(1, HEADS, n, SIZE, seed=n), torch.cat([text, normal(1, KV_HEADS, n, SIZE, seed=50 + n)], 2))
        for n in lengths
    ]


def studied(lengths: tuple[int, ...], share: list[Contribution] | None = None) -> tuple[Studied, Tensor]:
    """What comes of the passes, and their whole attention ``[1, Hq, q, TEXT]``."""
    found, whole = Studied(HEADS, KV_HEADS, TEXT, torch.device("cpu")), []
    for number, (queries, keys) in enumerate(passes(lengths)):
        found.add(queries, keys, 0.4, None if share is None else share[number])
        whole.append(causal_attention(queries, keys, 0.4)[..., :TEXT])
    return found, torch.cat(whole, 2)


@pytest.mark.parametrize("tile", [1, 300, 1 << 20])
@pytest.mark.parametrize("lengths", [(1,), (24,), (24, 7, 1)])
def test_sums_and_maxima_are_those_of_the_whole_attention(
    lengths: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "TILE_LOGITS", tile)
    found, whole = studied(lengths)
    assert found.queries == sum(lengths)
    torch.testing.assert_close(found.total, whole.sum(2))
    torch.testing.assert_close(found.square, whole.square().sum(2))
    torch.testing.assert_close(found.most, whole.unflatten(1, (KV_HEADS, -1)).amax((2, 3)))


def test_a_contribution_is_attention_times_value_over_hidden_state() -> None:
    lengths = (24, 7)
    values, streams = normal(HEADS, TEXT).abs(), [normal(n, seed=n).abs() + 0.1 for n in lengths]
    found, whole = studied(lengths, [Contribution(values, stream) for stream in streams])
    expected = whole * values[None, :, None] / torch.cat(streams)[:, None]
    torch.testing.assert_close(found.most, expected.unflatten(1, (KV_HEADS, -1)).amax((2, 3)))
    torch.testing.assert_close(found.square, whole.square().sum(2))


def test_projected_lengths_are_norms_of_projected_values() -> None:
    values, projection = normal(1, KV_HEADS, TEXT, SIZE), normal(HEADS, SIZE, 20)
    each = values[0].repeat_interleave(HEADS // KV_HEADS, 0)
    torch.testing.assert_close(projected_lengths(values, projection), (each @ projection).norm(dim=-1))


def test_sources_are_pooled_by_root_mean_square_or_by_the_maximum() -> None:
    (again, first), (summary, second), (facts, third) = (studied((n,)) for n in (24, 7, 5))
    squares = [part.square().mean(2) for part in (first, second, third)]
    mean = 0.7 * squares[0] + 0.3 * (squares[1] + squares[2]) / 2
    expected = mean.sqrt().unflatten(1, (KV_HEADS, -1)).mean(2)
    torch.testing.assert_close(Evidence(again, (summary, facts)).scores(), expected)
    alone = squares[0].sqrt().unflatten(1, (KV_HEADS, -1)).mean(2)
    torch.testing.assert_close(Evidence(again).scores(), alone)
    most = torch.cat([first, second, third], 2).unflatten(1, (KV_HEADS, -1)).amax((2, 3))
    torch.testing.assert_close(Evidence(again, (summary, facts), maximum=True).scores(), most)


@pytest.mark.parametrize("heads", [1, KV_HEADS, HEADS])
def test_a_policys_own_scores_count_by_the_rest_of_the_weight(heads: int) -> None:
    evidence = Evidence(studied((24,))[0])
    own = normal(1, heads, TEXT - 4, seed=3).abs() * 100
    pooled = evidence.pooled(own, 0.7)
    assert pooled.shape == own.shape
    studys = evidence.pooled(own, 1.0)
    torch.testing.assert_close(pooled - 0.7 * studys, 0.3 * own * studys.sum() / own.sum())
    torch.testing.assert_close(pooled.sum(), studys.sum())  # by it layers are compared
