"""Law 9 for SnapKV, PyramidKV and StreamingLLM: Zefan-Cai/KVCache-Factory, pyramidkv_utils.py.

Faults and choices of the published code, by the ids of the vectors' JSON: P1 floored pyramid steps and the
fall-back to equal budgets; P2 selection for each KV head is that repository's addition (our default, too).
"""

from __future__ import annotations

import pytest
import torch

from support import golden
from support.golden import Case, cases, heads, positions, published_pyramidkv_budgets, same
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import LayerStates, Policy, policy
from winnowkv.scoring.allocate import pyramid
from winnowkv.scoring.attention import group_reduce, pool, window_attention

SNAPKV, PYRAMIDKV, STREAMING = cases("snapkv"), cases("pyramidkv"), cases("streamingllm")


def scorer(case: Case) -> Policy:
    """Our policy with the case's window, pooling and (PyramidKV) slope."""
    pooling = {"avgpool": "avg", "maxpool": "max"}[case["pooling"]]
    options = {"observe": case["window"], "kernel": case["kernel"], "pooling": pooling}
    if case["agg"]:
        options["group_by"] = case["agg"]
    if case["beta"]:
        options["slope"] = case["beta"]
    return policy(case.method, **options)


def compare(case: Case, layer: int, kept: torch.Tensor | None) -> None:
    expected = case.tensor("kept")[layer]
    assert kept is None or kept.shape[1] in (1, expected.shape[0])
    for head, row in enumerate(heads(kept, case["n"], expected.shape[0])):
        tied = positions(case.tensor("may")[layer, head]) if case["may"] else None
        same(row, positions(expected[head]), tied)


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "streamingllm"])
def test_every_fault_listed_in_the_vectors_has_a_test(method: str) -> None:
    document = golden.document(method)
    assert {bug["id"] for bug in document["reference_bugs"]} == {"P1_pyramid_total", "P2_kv_head_mode"}
    assert all(case["parity_usable"] for case in document["cases"])  # nothing is skipped here


@pytest.mark.parametrize("case", SNAPKV)
def test_snapkv_parity_through_our_own_prefill(case: Case) -> None:
    selection = case.run(scorer(case), case["capacity"], per_query_head=case["granularity"] == "query_head")
    for layer, budget in enumerate(case.numbers("budgets")):
        kept = selection.kept[layer]
        assert (kept is None) == (case["n"] <= case["capacity"])
        if kept is not None:
            assert kept.shape[-1] == budget + case["window"]
        compare(case, layer, kept)


@pytest.mark.parametrize("case", STREAMING)
def test_streaming_parity_through_our_own_prefill(case: Case) -> None:
    """Their first ``capacity - window`` and last ``window`` tokens are our sinks and the rest of the budget."""
    context = case["capacity"] - case["window"]
    for ours in (policy("streaming", sinks=context), policy("streaming", sinks=context, observe=case["window"])):
        selection = PromptSelection(case.bind(ours, case["capacity"]))
        keys = torch.zeros(1, case["num_kv_heads"], case["n"], case["head_dim"])
        for layer in range(case["num_layers"]):
            queries = torch.zeros(1, case["num_heads"], ours.observe, case["head_dim"])
            selection.observe(LayerStates(layer, queries, keys, keys, case.scale))
            compare(case, layer, selection.kept[layer])
        assert (selection.kept[0] is None) == case["uncompressed"]
    if not case["uncompressed"]:
        assert case.numbers("budgets") == [context] * case["num_layers"]


@pytest.mark.parametrize("case", PYRAMIDKV)
def test_pyramidkv_published_budgets(case: Case) -> None:
    found = published_pyramidkv_budgets(case["num_layers"], case["n"], case["capacity"], case["window"], case["beta"])
    assert found == case.numbers("budgets")


@pytest.mark.parametrize("case", PYRAMIDKV)
def test_pyramidkv_parity_with_the_published_selection(case: Case) -> None:
    ours = scorer(case)
    for layer, budget in enumerate(case.numbers("budgets")):
        if case["uncompressed"]:
            kept = case.run(ours, case["capacity"]).kept[layer]
            assert kept is None
        else:
            kept = case.select(ours, 0, case.scores(ours, layer), budget + ours.observe)
        compare(case, layer, kept)


@pytest.mark.parametrize("case", PYRAMIDKV)
def test_p1_our_pyramid_is_exact_falls_and_has_no_fallback(case: Case) -> None:
    ours, budget = scorer(case), min(case["capacity"], case["n"])
    limits = case.bind(ours, budget).parts.allocator.prefill_limits()
    context = [entries - ours.observe for entries in limits]
    assert sum(context) == (budget - ours.observe) * case["num_layers"]
    assert context == sorted(context, reverse=True)
    assert max(context) <= case.context
    if budget < case["n"]:
        assert len(set(context)) > 1  # equal budgets are the published fall-back for short prompts
        selection = case.run(ours, budget)
        assert [case["n"] if kept is None else kept.shape[-1] for kept in selection.kept] == limits


@pytest.mark.parametrize(("name", "found", "target"), [("clipped", 516, 512), ("beta14", 228, 224)])
def test_p1_the_published_pyramid_misses_its_total_where_ours_does_not(name: str, found: int, target: int) -> None:
    case = golden.named("pyramidkv", name)
    assert (sum(case.numbers("budgets")), case["context_slots_target"]) == (found, target)
    mean = case["capacity"] - case["window"]
    assert sum(pyramid(case["num_layers"], mean, case["beta"], case.context)) == target


@pytest.mark.parametrize("case", cases("pyramidkv", lambda c: c["n"] >= 2 * (c["capacity"] - c["window"])))
def test_p1_where_the_published_pyramid_stands_ours_is_within_the_lost_remainder(case: Case) -> None:
    mean = case["capacity"] - case["window"]
    ours = pyramid(case["num_layers"], mean, case["beta"], case.context)
    steps = case["num_layers"] - 1  # a floored step loses less than one entry a layer
    assert all(abs(a - b) <= steps for a, b in zip(ours, case.numbers("budgets"), strict=True))


@pytest.mark.parametrize("case", cases("snapkv", lambda c: c["granularity"] == "kv_head" and c["n"] > c["capacity"]))
def test_p2_a_group_votes_before_pooling(case: Case) -> None:
    """With max pooling the order matters: mean of pooled heads keeps other tokens than the vectors hold."""
    ours = scorer(case)
    layer = 0
    attention = window_attention(case.queries(layer, ours.observe), case.keys(layer), case.scale)
    first = pool(group_reduce(attention, 2, ours.group_by), ours.kernel, ours.pooling)
    torch.testing.assert_close(case.scores(ours, layer), first, rtol=0, atol=0)
    after = group_reduce(pool(attention, ours.kernel, ours.pooling), 2, ours.group_by)
    linear = (ours.group_by, ours.pooling) == ("mean", "avg")
    assert torch.allclose(first, after, rtol=1e-5) == linear
