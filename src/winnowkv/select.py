"""Which tokens stay: pure functions from scores to ascending positions. Axes: see :mod:`winnowkv.types`.

Ties go to the lower index, on every device: that is why these sort stably instead of calling ``topk``.
"""

from __future__ import annotations

import torch

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
