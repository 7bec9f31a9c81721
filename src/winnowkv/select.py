"""Which tokens stay: pure functions from scores to ascending positions. Axes: see :mod:`winnowkv.types`.

Ties go to the lower index, on every device: that is why these sort stably instead of calling ``topk``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnowkv.types import Indices, Scores, WindowScores


def top_tokens(scores: Scores, n: int) -> Indices:
    """Positions of the ``n`` best tokens of every head, ascending, ``[B, H, n]``."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :n].sort(dim=-1).values


def top_windows(windows: WindowScores, tokens: Scores, n: int, width: int) -> Indices:
    """Positions of the best review windows, filled to exactly ``n`` tokens, ascending, ``[B, H, n]``.

    Whole windows are taken from the best down while they fit; the window that no longer
    fits gives its best tokens. The published code keeps whole windows only and so passes
    its budget by up to ``width - 1`` entries.
    """
    count = tokens.shape[-1]
    rank = windows.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    owner = torch.arange(count, device=tokens.device) // width
    window_rank = rank[..., owner]  # a token's window's place, 0 is best
    # Two stable sorts: by token score first, then by window, so that within a window the better token leads.
    by_score = tokens.expand_as(window_rank).sort(dim=-1, descending=True, stable=True).indices
    by_window = window_rank.gather(-1, by_score).sort(dim=-1, stable=True).indices
    return by_score.gather(-1, by_window)[..., :n].sort(dim=-1).values


def with_sinks(scores: Scores, sinks: int) -> Scores:
    """Scores in which the first ``sinks`` tokens win against everything."""
    if not sinks:
        return scores
    first = torch.arange(scores.shape[-1], device=scores.device) < sinks
    return scores.masked_fill(first, float("inf"))


def with_recent(context: Indices, prompt_tokens: int, window: int) -> Indices:
    """Context positions followed by the last ``window`` positions of the prompt."""
    recent = torch.arange(prompt_tokens - window, prompt_tokens, device=context.device)
    return torch.cat([context, recent.expand(*context.shape[:-1], window)], dim=-1)


def gather_entries(states: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """Keys or values ``[B, Hkv, K, D]`` at each row's columns ``[H, n]``, as ``[B, Hkv, longest n, D]``.

    Rows with fewer columns are right-aligned and zero in front: not a number there would pass every mask.
    """
    heads, size = states.shape[1], states.shape[3]
    rows = []
    for row, index in enumerate(columns):
        if index.shape[0] == 1:  # one selection for all heads
            rows.append(states[row].index_select(1, index[0]))
        else:
            rows.append(states[row].gather(1, index.long()[..., None].expand(heads, -1, size)))
    if len(rows) == 1:
        return rows[0][None]
    width = max(picked.shape[1] for picked in rows)
    out = states.new_zeros(len(rows), heads, width, size)
    for row, picked in enumerate(rows):
        out[row, :, width - picked.shape[1] :] = picked
    return out
