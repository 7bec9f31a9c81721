"""Ada-KV (arXiv 2407.11550, section 4) over several scorers, as loops.

Deliberate differences: shares are rounded by largest remainder, so that the budget is met to the entry; heads are KV heads.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.policies import KV_HEADS, best, bind, drawn_states, kept_rows, run
from support.reference import compact_logits
from winnowkv.cache.selection import PromptSelection

TOKENS, LAYERS, BUDGET = 50, 4, 18


def wins_of(scores: list[list[float]], count: int) -> list[int]:
    """How many of the best scores over all heads each head has."""
    ranked = sorted((-score, head, at) for head, row in enumerate(scores) for at, score in enumerate(row))[:count]
    return [sum(owner == head for _, owner, _ in ranked) for head in range(len(scores))]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    ("inner", "sinks", "window"),
    [
        ("snapkv:observe=6:kernel=3", 0, 6),
        ("snapkv:observe=4:kernel=1:sinks=2", 2, 4),
        ("knorm", 0, 0),
        ("keydiff:observe=3", 0, 3),
        ("pyramidkv:observe=4:slope=4", 0, 4),
        ("criticalkv:of=snapkv:observe=4", 0, 4),
        ("h2o:recent=0", 0, 0),
        ("h2o:recent=0.5", 0, BUDGET // 2),
    ],
)
def test_heads_share_a_layers_budget_by_their_part_of_the_best_scores(
    inner: str, sinks: int, window: int, floor: float
) -> None:
    selection, _ = run(f"adakv:floor={floor}:of={inner}", TOKENS, LAYERS, BUDGET)
    alone, _ = run(inner, TOKENS, LAYERS, BUDGET)
    lengths = set()
    for rows, same, found in zip(kept_rows(selection), kept_rows(alone), selection.scores, strict=True):
        scores, entries = found[0].tolist(), len(same[0])  # what the inner policy gives this layer
        mean = entries - window
        assert sum(map(len, rows)) == KV_HEADS * entries
        safe = max(int(floor * mean), sinks)
        for head, wins in enumerate(wins_of(scores, KV_HEADS * mean)):
            count = len(rows[head]) - window
            assert abs(count - (safe + wins * (mean - safe) / mean)) < 1
            ranked = [math.inf] * sinks + scores[head][sinks:]
            assert rows[head] == best(ranked, count) + list(range(TOKENS - window, TOKENS))
            lengths.add(count - mean)
    assert (len(lengths) > 1) == (floor < 1)
    if floor == 1 and not inner.startswith("h2o"):  # whose own selector keeps recent tokens besides the best
        assert kept_rows(selection) == kept_rows(alone)


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(
    "inner",
    [
        "expected:observe=4:samples=16",
        "cake:observe=4",
        "dynamickv:observe=4:every=2:ceiling=3",
        "winnow:observe=4:samples=16:least=9",
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_an_evicted_entry_does_not_come_back(inner: str, floor: float, seed: int) -> None:
    """Layers that shrink twice: rounding may give a head more of a smaller budget, which it no longer holds."""
    selection = PromptSelection(bind(f"adakv:floor={floor}:of={inner}", TOKENS, 7, BUDGET))
    generator, held, twice = torch.Generator().manual_seed(seed), {}, 0
    for layer in range(7):
        for at, kept in selection.observe(drawn_states(selection.bound, layer, generator)).items():
            rows = [set(row) - {-1} for row in kept[0].tolist()]
            twice += at in held
            assert all(now <= before for now, before in zip(rows, held.get(at, rows), strict=True))
            held[at] = rows
    assert sum(len(row) for rows in held.values() for row in rows) + 2 * TOKENS * (7 - len(held)) == KV_HEADS * 7 * BUDGET
    assert twice


@pytest.mark.parametrize("budget", [6, 20, 34])
def test_a_budget_below_the_window_keeps_what_the_inner_policy_would(budget: int) -> None:
    """The policy expected lets its window shrink."""
    for rows in kept_rows(run("adakv:of=expected", TOKENS, LAYERS, budget)[0]):
        for row in rows:
            assert {0, 1, 2, 3, *range(TOKENS - min(budget - 4, 32), TOKENS)} <= set(row)


def test_what_the_inner_policy_keeps_in_all_layers_stays_in_all_heads() -> None:
    """The sentences of winnow."""
    selection, _ = run("adakv:floor=0:of=winnow:observe=4:samples=16:least=9", TOKENS, LAYERS, BUDGET)
    assert selection.common is not None
    for rows in kept_rows(selection):
        assert all(set(selection.common.flatten().tolist()) <= set(row) for row in rows)


def test_per_head_budgets_free_what_the_longest_head_does_not_need(llama: PreTrainedModel) -> None:
    """Held bytes are the longest head's, far below the full cache."""
    cache = wk.CompactCache(llama, "adakv:floor=0:of=snapkv:observe=4", 20)
    compact_logits(llama, cache, prompt(200), [])
    report = cache.report
    assert report.kept_bytes <= report.held_bytes < report.full_bytes / 4


@pytest.mark.parametrize("floor", ["-0.1", "1.5"])
def test_options_out_of_bounds_are_refused(floor: str) -> None:
    with pytest.raises(wk.PolicyError, match=f"adakv: floor={floor} is too"):
        wk.policy(f"adakv:floor={floor}")
