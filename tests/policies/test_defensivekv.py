"""DefensiveKV against arXiv 2510.13334, section 4, and the authors' code, as loops.

Deliberate difference: their code keeps the tokens that hold 90% of the attention before values count;
here values count for all.
"""

from __future__ import annotations

import math

import pytest
import torch

import winnowkv as wk
from support.policies import HEADS, KV_HEADS, best, kept_rows, projected_norm, run
from winnowkv.policies import LayerStates

TOKENS, LAYERS, BUDGET = 30, 2, 12
GROUP = HEADS // KV_HEADS


def attention(states: LayerStates, head: int, query: int, window: int) -> list[float]:
    """What one query of the window pays to each token of the context."""
    at = TOKENS - window + query
    keys = states.keys[0, head // GROUP].double()
    logits = [float(states.queries[0, head, query].double() @ keys[token]) * states.scale for token in range(at + 1)]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights][: TOKENS - window]


def smooth(row: list[float], kernel: int) -> list[float]:
    """Mean over neighbours; the row keeps its sum."""
    half = kernel // 2
    means = [sum(row[max(at - half, 0) : at + half + 1]) / kernel for at in range(len(row))]
    return [mean * sum(row) / sum(means) for mean in means]


def reference(states: LayerStates, window: int, kernel: int) -> list[list[float]]:
    """Worst case over queries and group, not below its mean, times the head's share of the projected values' norms."""
    context, scores = TOKENS - window, []
    for kv in range(KV_HEADS):
        asking = [(head, query) for head in range(kv * GROUP, (kv + 1) * GROUP) for query in range(window)]
        rows = [smooth(attention(states, head, query, window), kernel) for head, query in asking]
        worst = [max(row[at] for row in rows) for at in range(context)]
        mean = sum(worst) / context
        scores.append([max(most, mean) for most in worst])
    for at in range(context):
        norms = [projected_norm(states, kv, at) for kv in range(KV_HEADS)]
        for kv in range(KV_HEADS):
            scores[kv][at] *= norms[kv] / sum(norms)
    return scores


@pytest.mark.parametrize(("window", "kernel", "sinks"), [(4, 3, 0), (6, 5, 2), (3, 1, 0)])
def test_scores_and_one_top_k_over_all_heads_are_those_of_the_reference(window: int, kernel: int, sinks: int) -> None:
    selection, layers = run(f"defensivekv:observe={window}:kernel={kernel}:sinks={sinks}", TOKENS, LAYERS, BUDGET)
    lengths = set()
    for states, rows, found in zip(layers, kept_rows(selection), selection.scores, strict=True):
        scores = reference(states, window, kernel)
        torch.testing.assert_close(found[0].double(), torch.tensor(scores, dtype=torch.float64), rtol=1e-4, atol=1e-7)
        count = KV_HEADS * (BUDGET - window)
        flat = best([score for row in scores for score in row], count)
        context = TOKENS - window
        shares = [sum(at // context == kv for at in flat) for kv in range(KV_HEADS)]
        for kv in range(KV_HEADS):
            ranked = [math.inf] * sinks + scores[kv][sinks:]
            kept = len(rows[kv]) - window
            if not sinks:  # the top-k itself; sinks are a floor
                assert kept == shares[kv]
            assert rows[kv] == best(ranked, kept) + list(range(context, TOKENS))
            lengths.add(kept)
        assert sum(map(len, rows)) == KV_HEADS * BUDGET
    assert len(lengths) > 1


def test_a_token_that_one_query_needs_counts_as_one_that_all_need() -> None:
    """The worst case and not the mean: snapkv sees a quarter of it. What no query needs counts by the mean."""
    from winnowkv.scoring.attention import worst_case_attention

    queries, keys = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, TOKENS, 4)
    queries[..., 0], queries[0, 0, 2, 1] = 20.0, 60.0
    keys[0, 0, 9, 0], keys[0, 0, 5, 1] = 1.0, 1.0
    scores = worst_case_attention(queries, keys, 1.0, TOKENS - 4, 1)[0, 0]
    assert float(scores[5]) == pytest.approx(float(scores[9]), abs=1e-3)
    others = torch.cat([scores[:5], scores[6:9], scores[10:]])
    torch.testing.assert_close(others, scores.min().expand_as(others))
    assert float(others[0]) == pytest.approx(2 / (TOKENS - 4), rel=1e-2)


@pytest.mark.parametrize("option", ["observe=0", "kernel=0", "kernel=4"])
def test_options_out_of_bounds_are_refused(option: str) -> None:
    with pytest.raises(wk.PolicyError, match=f"defensivekv: {option}"):
        wk.policy(f"defensivekv:{option}")
