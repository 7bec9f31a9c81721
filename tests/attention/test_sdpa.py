"""Our attention equals one softmax for any number of entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnowkv.attention import sdpa as attention


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float, valid: Tensor) -> Tensor:
    """Causal attention, KV heads repeated, one softmax."""
    group = query.shape[1] // key.shape[1]
    key, value, valid = (states.repeat_interleave(group, 1) for states in (key, value, valid))
    queries, entries = query.shape[2], key.shape[2]
    seen = torch.ones(queries, entries, dtype=torch.bool).tril(entries - queries) & valid[:, :, None]
    return (query @ key.transpose(2, 3) * scale).masked_fill(~seen, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("queries", [1, 3, 9, 20])
@pytest.mark.parametrize("block", [4, 256])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_one_softmax(queries: int, block: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    draw = torch.Generator().manual_seed(queries)
    query = torch.randn(2, 6, queries, 8, generator=draw)
    key, value = torch.randn(2, 2, 2, 20, 8, generator=draw)
    valid = torch.ones(2, 2, 20, dtype=torch.bool)
    given = None
    if padded and queries < 20:  # no head is shorter before the prompt was read
        valid[0, 1, :5] = False
        given = valid
    torch.testing.assert_close(attention.attend(query, key, value, 0.3, given), plain(query, key, value, 0.3, valid))


def test_no_mask_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Tensor, attn_mask: Tensor, **kwargs: float) -> Tensor:
        shapes.append(tuple(attn_mask.shape[-2:]))
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    attention.attend(torch.randn(1, 4, 20, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8), 0.3)
    assert shapes == [(16, 38), (16, 46), (8, 50)]
