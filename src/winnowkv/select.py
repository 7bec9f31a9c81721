"""Which tokens stay: pure functions from scores to ascending positions. Axes: see :mod:`winnowkv.types`.

Ties go to the lower index, on every device: that is why these sort stably, or ask ``topk`` for its lowest value only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from winnowkv.types import Indices, Scores, Valid, WindowScores


def top_tokens(scores: Scores, n: int) -> Indices:
    """Positions of the ``n`` best tokens of every head, ascending, ``[B, H, n]``."""
    if n == 0:
        return scores.new_zeros(*scores.shape[:-1], 0, dtype=torch.long)
    scores = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # as sort has it: not a number is the most
    least = scores.topk(n, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    better, equal = scores > least, scores == least
    stays = better | (equal & (equal.cumsum(-1) <= n - better.sum(-1, keepdim=True)))
    return stays.nonzero()[:, -1].view(*scores.shape[:-1], n)


def top_windows(windows: WindowScores, tokens: Scores, n: int, width: int) -> Indices:
    """Positions of the best review windows, filled to exactly ``n`` tokens, ascending, ``[B, H, n]``.

    Whole windows are taken from the best down while they fit; the window that no longer
    fits gives its best tokens. The published code keeps whole windows only and so passes
    its budget by up to ``width - 1`` entries.
    """
    return top_spans(windows, tokens, torch.arange(tokens.shape[-1], device=tokens.device) // width, n)


def top_spans(spans: WindowScores, tokens: Scores, owner: Tensor, n: int) -> Indices:
    """As :func:`top_windows` for spans of any lengths: ``owner`` ``[S]`` is the span that each token belongs to, ascending.

    Tokens of a negative score are taken only when there are no others.
    """
    rank = spans.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    window_rank = rank[..., owner]  # a token's window's place, 0 is best
    window_rank = torch.where(tokens < 0, spans.shape[-1], window_rank)
    # Two stable sorts: by token score first, then by window, so that within a window the better token leads.
    by_score = tokens.expand_as(window_rank).sort(dim=-1, descending=True, stable=True).indices
    by_window = window_rank.gather(-1, by_score).sort(dim=-1, stable=True).indices
    return by_score.gather(-1, by_window)[..., :n].sort(dim=-1).values


def ragged_tokens(scores: Scores, counts: Sequence[int]) -> Indices:
    """Positions of the ``counts[h]`` best tokens of each head, ascending, ``[B, H, max(counts)]``, -1 in front."""
    rows = [top_tokens(scores[:, head, None], count) for head, count in enumerate(counts)]
    return torch.cat([F.pad(row, (max(counts) - row.shape[-1], 0), value=-1) for row in rows], dim=1)


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


def columns_of(wanted: Tensor | None, held: Tensor | None, tokens: int, length: int, device: torch.device) -> Tensor:
    """Columns of a right-aligned row at which wanted prompt positions lie, ``[H, n]``; padding stays -1.

    ``wanted`` and ``held`` are positions ``[H, n]``, None for all ``tokens`` of the row's prompt;
    what is wanted is a part of what is held. ``length`` counts the row's columns.
    """
    if wanted is None:
        wanted = torch.arange(tokens, device=device)[None] if held is None else held
    if held is None:
        columns = wanted + (length - tokens)
    else:
        held = held.to(wanted.dtype).expand(max(len(held), len(wanted)), -1).contiguous()
        wanted = wanted.expand(len(held), -1).contiguous() if len(held) > len(wanted) else wanted.contiguous()
        columns = torch.searchsorted(held, wanted) + (length - held.shape[1])
    return columns.masked_fill(wanted < 0, -1)


def occupied(columns: Sequence[Tensor], heads: int) -> Valid | None:
    """Which entries of rows gathered at these columns count, ``[B, H, longest n]``; None where all do."""
    width = max(index.shape[1] for index in columns)
    if all(index.shape[1] == width for index in columns) and not any(bool((index < 0).any()) for index in columns):
        return None
    rows = [F.pad(index >= 0, (width - index.shape[1], 0)) for index in columns]
    several = any(len(row) > 1 for row in rows)
    return torch.stack([row.expand(heads if several else 1, -1) for row in rows])


def gather_entries(states: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """Keys or values ``[B, Hkv, K, D]`` at each row's columns ``[H, n]``, as ``[B, Hkv, longest n, D]``.

    Rows with fewer columns are right-aligned and zero in front, as is every column -1: not a
    number there would pass every mask.
    """
    heads, size = states.shape[1], states.shape[3]
    rows = []
    for row, index in enumerate(columns):
        if index.shape[0] == 1:  # one selection for all heads
            rows.append(states[row].index_select(1, index[0]))
        else:
            # Row by row of memory: gather() on single numbers is 16 times slower.
            each = zip(states[row], index.clamp(min=0), strict=True)
            picked = torch.stack([entries.index_select(0, wanted) for entries, wanted in each])
            rows.append(picked.masked_fill_((index < 0)[..., None], 0) if bool((index < 0).any()) else picked)
    if len(rows) == 1:
        return rows[0][None]
    width = max(picked.shape[1] for picked in rows)
    out = states.new_zeros(len(rows), heads, width, size)
    for row, picked in enumerate(rows):
        out[row, :, width - picked.shape[1] :] = picked
    return out
