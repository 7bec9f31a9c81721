"""ChunkKV against arXiv 2502.00299, section 3, as loops, over several scorers.

Deliberate differences: the last chunk gives its best tokens, so that the budget is met to the entry; a shorter chunk at the end
counts by its mean; no layer takes over the indices of another one.
"""

from __future__ import annotations

import math

import pytest

import winnowkv as wk
from support.policies import KV_HEADS, kept_rows, run

TOKENS, LAYERS, BUDGET = 47, 3, 21


def reference(scores: list[float], chunk: int, sinks: int, count: int) -> list[int]:
    """The best chunks by the sum of their scores while they fit, then the best tokens of the next; sinks before all."""
    ranked = [math.inf] * sinks + scores[sinks:]
    chunks = [list(range(begin, min(begin + chunk, len(scores)))) for begin in range(0, len(scores), chunk)]
    order = sorted(chunks, key=lambda part: (-sum(ranked[at] for at in part) / len(part), part[0]))
    found = list(range(sinks))
    for part in order:
        part = [at for at in sorted(part, key=lambda at: (-ranked[at], at)) if at not in found]
        found += part[: count - len(found)]
    return sorted(found)


@pytest.mark.parametrize("chunk", [1, 4, 10, 60])
@pytest.mark.parametrize(
    ("inner", "sinks", "window"),
    [
        ("snapkv:observe=4:kernel=3", 0, 4),
        ("snapkv:observe=6:sinks=3:kernel=1", 3, 6),
        ("knorm", 0, 0),
        ("tova", 0, 1),
        ("criticalkv:of=snapkv:observe=4", 0, 4),
    ],
)
def test_whole_chunks_stay_as_in_the_reference(inner: str, sinks: int, window: int, chunk: int) -> None:
    selection, _ = run(f"chunkkv:chunk={chunk}:of={inner}", TOKENS, LAYERS, BUDGET)
    for scores, rows in zip(selection.scores, kept_rows(selection), strict=True):
        assert scores.shape[-1] == TOKENS - window
        for head in range(KV_HEADS):
            own = scores[0, head % scores.shape[1]].tolist()
            recent = list(range(TOKENS - window, TOKENS))
            assert rows[head] == reference(own, chunk, sinks, BUDGET - window) + recent


def test_a_chunk_of_one_token_changes_nothing() -> None:
    ours, theirs = (
        run(spec, TOKENS, LAYERS, BUDGET)[0] for spec in ("chunkkv:chunk=1:of=snapkv:observe=4", "snapkv:observe=4")
    )
    assert kept_rows(ours) == kept_rows(theirs)


def test_layers_get_what_the_inner_policy_gives_them() -> None:
    ours, theirs = (run(spec, TOKENS, LAYERS, BUDGET)[0] for spec in ("chunkkv:of=pyramidkv", "pyramidkv"))
    lengths = [[len(rows[0]) for rows in kept_rows(each)] for each in (ours, theirs)]
    assert lengths[0] == lengths[1]
    assert len(set(lengths[0])) > 1


def test_what_the_inner_policy_keeps_in_all_layers_stays() -> None:
    """The sentences of winnow, though they are no chunks."""
    selection, _ = run("chunkkv:chunk=7:of=winnow:observe=4:samples=16:least=9", TOKENS, LAYERS, BUDGET)
    assert selection.common is not None
    for rows in kept_rows(selection):
        assert all(set(selection.common.flatten().tolist()) <= set(row) for row in rows)


def test_options_out_of_bounds_are_refused() -> None:
    with pytest.raises(wk.PolicyError, match="chunkkv: chunk=0 is too small, it must be at least 1"):
        wk.policy("chunkkv:chunk=0")
