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
    # Each goes to its place, and what leaves goes after all of them: nonzero() would make the host wait for an accelerator.
    places = torch.where(stays, stays.cumsum(-1) - 1, n)
    found = torch.empty(*scores.shape[:-1], n + 1, dtype=torch.long, device=scores.device)
    return found.scatter_(-1, places, torch.arange(scores.shape[-1], device=scores.device).expand_as(places))[..., :n]


def top_windows(windows: WindowScores, tokens: Scores, n: int, width: int) -> Indices:
    """Positions of the best review windows, filled to exactly ``n`` tokens, ascending, ``[B, H, n]``.

    Whole windows are taken from the best down while they fit; the window that no longer
    fits gives its best tokens. The published code keeps whole windows only and so passes
    its budget by up to ``width - 1`` entries.
    """
    return top_spans(windows, tokens, torch.arange(tokens.shape[-1], device=tokens.device) // width, n)


def top_spans(spans: WindowScores, tokens: Scores, owner: Tensor, n: int) -> Indices:
    """As :func:`top_windows` for spans of any lengths: ``owner`` ``[S]`` is the span that each token belongs to, ascending.

    Tokens of an infinite score are taken first, those of a negative one only when there are no others.
    """
    rank = spans.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    window_rank = rank[..., owner]  # a token's window's place, 0 is best
    window_rank = torch.where(tokens < 0, spans.shape[-1], window_rank)
    window_rank = torch.where(tokens == math.inf, -1, window_rank)
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
    scores = scores.clone()
    scores[..., :sinks] = float("inf")
    return scores


def with_recent(context: Indices, prompt_tokens: int, window: int) -> Indices:
    """Context positions followed by the last ``window`` positions of the prompt."""
    recent = torch.arange(prompt_tokens - window, prompt_tokens, device=context.device)
    return torch.cat([context, recent.expand(*context.shape[:-1], window)], dim=-1)


def columns_of(
    wanted: Tensor | None, held: Tensor | None, tokens: int, length: int, device: torch.device, *, dense: bool = False
) -> Tensor:
    """Columns of a right-aligned row at which wanted prompt positions lie, ``[H, n]``; padding stays -1.

    ``wanted`` and ``held`` are positions ``[H, n]``, None for all ``tokens`` of the row's prompt;
    what is wanted is a part of what is held. ``length`` counts the row's columns. ``dense``: there is no padding.
    """
    if wanted is None:
        wanted = torch.arange(tokens, device=device)[None] if held is None else held
    if held is None:
        columns = wanted + (length - tokens) if length > tokens else wanted
    else:
        heads, entries = max(len(held), len(wanted)), held.shape[1]
        held, wanted = held.long().expand(heads, -1), wanted.expand(heads, -1)
        # A table of every position's column; a missing entry, -1, goes after all.
        table = held.new_zeros(heads, tokens + 1)
        table.scatter_(1, held.remainder(tokens + 1), torch.arange(length - entries, length, device=device).expand(heads, -1))
        columns = table.gather(1, wanted.long().clamp(min=0))
    return columns if dense else columns.masked_fill(wanted < 0, -1)


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Each row's columns ``[H, n]`` in one tensor ``[B, H, longest n]``, right-aligned, with -1 in front of shorter rows."""
    width, heads = (max(index.shape[axis] for index in columns) for axis in (1, 0))
    return torch.stack([F.pad(row.expand(heads, -1), (width - row.shape[1], 0), value=-1) for row in columns])


def with_later(kept: Valid | None, before: Valid | None, begin: int, end: int, columns: Tensor) -> Valid | None:
    """Flags of the entries kept and of those after them, which stood at ``begin`` to ``end``; None if all count.

    ``kept``: flags ``[B, H, n]`` of the entries kept, ``before``: of all entries before; None if all count. ``columns``
    ``[B, H, n + end - begin]`` of the entries afterwards.
    """
    if kept is None and (before is None or bool(before[..., begin:end].all())):
        return None
    flags = torch.ones_like(columns, dtype=torch.bool)
    if kept is not None:
        flags[..., : kept.shape[-1]] = kept
    if before is not None:
        later = before[..., begin:end]
        if later.shape[1] > flags.shape[1]:
            flags = flags.repeat(1, later.shape[1], 1)
        flags[..., flags.shape[-1] - (end - begin) :] = later
    return flags


def gather_entries(states: Sequence[Tensor], columns: Tensor) -> list[Tensor]:
    """Keys and values ``[B, Hkv, K, D]`` at these columns ``[B, 1 or Hkv, n]``, none of them -1, each ``[B, Hkv, n, D]``."""
    batch, heads, held, _ = states[0].shape
    begins = torch.arange(0, batch * heads * held, held, device=columns.device).view(batch, heads, 1)
    rows = (columns + begins).flatten()
    # Row by row of memory: gather() on single numbers is 16 times slower.
    return [part.flatten(0, 2).index_select(0, rows).view(batch, heads, -1, part.shape[3]) for part in states]
