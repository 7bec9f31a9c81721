"""Law 2: kept entries sum to the budget exactly; positions are unique, in range, ascending, with sinks and window."""

from __future__ import annotations

from fractions import Fraction
from importlib.metadata import entry_points

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import CASES, QUANTIZED, Case
from support.models import PROMPT, prompt
from support.policies import HEADS, KV_HEADS, decided
from support.reference import compact_logits, positions
from winnowkv.cache.session import PrefillPlan
from winnowkv.policies import names as policy_names
from winnowkv.policies.expected import Expected

SIZE = 4


def test_every_built_in_policy_has_a_case() -> None:
    """A policy added to the package without a case here would be exempt from all laws."""
    mine = {entry.name for entry in entry_points(group="winnowkv.policies") if entry.value.startswith("winnowkv.")}
    assert mine <= {case.name for case in CASES + QUANTIZED}


def budget_values() -> st.SearchStrategy[int | float]:
    """Budgets in both units, small and large."""
    return st.one_of(st.integers(1, 110), st.floats(0.01, 1.0).map(lambda x: round(x, 4)))


def specs() -> st.SearchStrategy[tuple[str, str | None]]:
    """Policies with options over the whole range that is allowed."""
    small = st.integers(0, 5)
    observe = st.integers(1, 20)
    kernel = st.sampled_from([1, 3, 7])
    pooling = st.sampled_from(["avg", "max"])
    snap = st.builds("sinks={}:observe={}:kernel={}:pooling={}".format, small, observe, kernel, pooling)
    slope = st.sampled_from([1, 1.5, 14, 100])
    samples = st.one_of(st.integers(4, 24), st.integers(25, 300))
    ahead = st.builds("sinks={}:samples={}:ahead={}".format, small, samples, st.integers(1, 300))
    return st.one_of(
        st.builds("random:sinks={}:observe={}:seed={}".format, small, st.integers(0, 20), small).map(no_task),
        st.builds("streaming:sinks={}:observe={}".format, small, st.integers(0, 20)).map(no_task),
        st.builds("snapkv:{}:group_by={}".format, snap, st.sampled_from(["mean", "max"])).map(no_task),
        st.builds("pyramidkv:{}:slope={}".format, snap, slope).map(no_task),
        st.builds(
            "dynamickv:{}:every={}:ceiling={}:floor={}".format,
            snap,
            st.integers(1, 5),
            st.sampled_from([1, 1.3, 10]),
            st.sampled_from([0, 0.1, 1, 2]),
        ).map(no_task),
        st.builds("h2o:sinks={}:observe={}:recent={}".format, small, small, st.sampled_from([0, 0.3, 0.5, 1])).map(no_task),
        st.builds("tova:sinks={}:observe={}".format, small, observe).map(no_task),
        st.builds("cake:sinks={}:observe={}:tau1={}".format, small, st.integers(2, 20), st.sampled_from([0.5, 1, 3])).map(
            no_task
        ),
        st.builds("adakv:{}:floor={}".format, snap, st.sampled_from([0, 0.2, 1])).map(no_task),
        st.builds(
            "headkv:{}:beta={}:temperature={}".format, snap, st.sampled_from([1, 1.2, 9]), st.sampled_from([0, 1, 3])
        ).map(no_task),
        st.builds(
            "compresskv:{}:heads={}:heads_per_layer={}:budgets={}:indices={}:least={}:most={}".format,
            snap,
            st.sampled_from(["srh", "traditional", "all", "random:2"]),
            st.integers(1, HEADS),
            st.sampled_from(["error", "uniform"]),
            st.sampled_from(["shared", "per-kv-head"]),
            st.sampled_from([0, 4, 32]),
            st.sampled_from([1, 1.5, 3]),
        ).map(no_task),
        st.builds("expected:{}:observe={}".format, ahead, st.integers(0, 20)).map(no_task),
        st.tuples(
            st.builds(
                "winnow:{}:observe={}:share={}:least={}:heads={}:top={}:longest={}:peak={}:progressive={}".format,
                ahead,
                st.one_of(observe, st.just("context")),
                st.sampled_from([0, 0.25, 1]),
                st.sampled_from([0, 1, 8, 40]),
                st.one_of(st.just("none"), st.integers(1, 2 * HEADS)),
                st.integers(1, 9),
                st.integers(1, 40),
                st.sampled_from([0, 0.35, 0.8, 1]),
                st.sampled_from(["true", "false"]),
            ),
            st.sampled_from([None, "localization", "localization", "aggregation"]),
        ),
        st.tuples(
            st.one_of(
                st.builds(
                    "windowkv:sinks={}:observe={}:window={}:top={}:group={}:slope={}".format,
                    small,
                    observe,
                    st.integers(1, 12),
                    st.integers(1, 12),
                    st.integers(1, 4),
                    slope,
                ),
                st.builds("windowkv:preset={}".format, st.sampled_from(["paper", "repo"])),
            ),
            st.sampled_from(["localization", "aggregation"]),
        ),
    )


def no_task(spec: str) -> tuple[str, str | None]:
    return spec, None


def entries_of(kept: Tensor | None, tokens: int) -> Fraction:
    """Entries per KV head of one layer, mean over its heads."""
    return Fraction(tokens) if kept is None else Fraction(int((kept >= 0).sum()), kept.shape[1])


def drive(plan: PrefillPlan, policy: wk.Policy, tokens: int, layers: int, seed: int, constant: bool) -> None:
    """Feed every layer; check on the way that what a layer holds only ever shrinks, to a part of itself."""
    generator = torch.Generator().manual_seed(seed)
    held: list[Tensor | None] = []
    for layer in range(layers):
        keys = torch.randn(1, KV_HEADS, tokens, SIZE, generator=generator)
        queries = torch.randn(1, HEADS, len(policy.wanted(tokens)), SIZE, generator=generator)
        if constant:  # all scores tie
            queries = torch.zeros_like(queries)
        held.append(None)
        for index, now in plan.observe(queries, keys, 0.5).items():
            assert index <= layer
            for head in range(now.shape[1]):
                before = range(-1, tokens) if held[index] is None else [-1, *held[index][0, head].tolist()]
                assert set(now[0, head].tolist()) <= set(before), "an evicted entry came back"
            held[index] = now
    assert all(a is b for a, b in zip(held, plan.kept, strict=True))


def check_positions(kept: Tensor, policy: wk.Policy, tokens: int, budget: int) -> None:
    """One layer's positions ``[H, n]``."""
    assert kept.shape[0] in (1, KV_HEADS)
    if policy.name not in ("adakv", "headkv"):
        assert int(kept.min()) >= 0, "only budgets per head pad"
    rows = [[position for position in row if position >= 0] for row in kept.tolist()]
    assert max(map(len, rows)) == kept.shape[1], "padded further than the longest head"
    for row, padded in zip(rows, kept.tolist(), strict=True):
        assert padded == [-1] * (len(padded) - len(row)) + row, "padding is not in front"
        assert row == sorted(set(row)), "not ascending, or one entry twice"
        assert all(position < tokens for position in row)
        assert row[: policy.sinks] == list(range(policy.sinks)), "a sink is missing"
        # Those of the family of expected take what a small budget leaves.
        stays = min(policy.observe, budget - policy.sinks) if isinstance(policy, Expected) else policy.observe
        assert row[len(row) - stays :] == list(range(tokens - stays, tokens)), "the recent window is not whole"


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    spec=specs(),
    tokens=st.integers(1, 90),
    layers=st.integers(1, 9),
    budget=budget_values(),
    seed=st.integers(0, 5),
    constant=st.booleans(),
)
@example(spec=("dynamickv:observe=4:sinks=5:every=3", None), tokens=40, layers=7, budget=9, seed=0, constant=True)
@example(spec=("pyramidkv:observe=4", None), tokens=40, layers=1, budget=4, seed=0, constant=False)
def test_every_policy_is_exact_for_any_prompt_and_budget(
    spec: tuple[str, str | None], tokens: int, layers: int, budget: int | float, seed: int, constant: bool
) -> None:
    name, task = spec
    policy = decided(name, task, layers)
    entries = wk.Budget.of(budget).entries(tokens)
    try:
        plan = PrefillPlan(policy, wk.Prompt(tokens, layers, entries))
    except wk.BudgetError:
        assert entries < policy.minimum_budget()
        return
    drive(plan, policy, tokens, layers, seed, constant)
    if entries >= tokens or tokens <= policy.observe:
        assert all(kept is None for kept in plan.kept)
        assert (plan.note is not None) == (entries < tokens)
        return
    assert entries >= policy.minimum_budget()
    assert sum(entries_of(kept, tokens) for kept in plan.kept) == entries * layers
    for kept in plan.kept:
        if kept is not None:
            check_positions(kept[0], policy, tokens, entries)


@pytest.mark.parametrize("constant", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("budget", [1, 20, 33, 34, 40, 71, 0.5, 0.77])
def test_each_case_is_exact(case: Case, budget: int | float, constant: bool) -> None:
    """The cases of the other laws, one by one: hypothesis need not have met them."""
    policy = decided(case.spec, case.task, 7)
    entries = wk.Budget.of(budget).entries(PROMPT)
    if case.name != "full" and entries < policy.minimum_budget():
        with pytest.raises(wk.BudgetError, match="keep at least"):
            PrefillPlan(policy, wk.Prompt(PROMPT, 7, entries))
        return
    plan = PrefillPlan(policy, wk.Prompt(PROMPT, 7, entries))
    drive(plan, policy, PROMPT, 7, 0, constant)
    if case.name == "full":
        assert plan.kept == [None] * 7
        return
    assert sum(entries_of(kept, PROMPT) for kept in plan.kept) == 7 * entries
    for kept in plan.kept:
        if kept is not None:
            check_positions(kept[0], policy, PROMPT, entries)


@pytest.mark.parametrize("layers", [1, 4, 30])
@pytest.mark.parametrize("name", [name for name in policy_names() if wk.policy(name).evicts])
def test_default_options_are_exact(name: str, layers: int) -> None:
    """No more than sinks and window, little more, and all but one token."""
    policy, tokens = decided(name, "localization", layers), 100
    least = policy.minimum_budget()
    for budget in (least, least + 1, least + 30, tokens - 1):
        plan = PrefillPlan(policy, wk.Prompt(tokens, layers, min(budget, tokens - 1)))
        drive(plan, policy, tokens, layers, 0, False)
        assert sum(entries_of(kept, tokens) for kept in plan.kept) == min(budget, tokens - 1) * layers
        for kept in plan.kept:
            if kept is not None:
                check_positions(kept[0], policy, tokens, min(budget, tokens - 1))


@pytest.mark.parametrize("budget", [40, 71, 0.6, 0.999])
def test_kept_entries_of_a_model_sum_to_the_budget(model: PreTrainedModel, evicting: Case, budget: int | float) -> None:
    cache = wk.CompactCache(model, evicting.spec, budget, task=evicting.task)
    compact_logits(model, cache, prompt(PROMPT), [])
    report, layers = cache.report, model.config.num_hidden_layers
    entries = budget if isinstance(budget, int) else int(budget * PROMPT)
    assert sum(report.kept_entries[0]) == pytest.approx(entries * layers, abs=1e-9)
    assert report.prompt_tokens == [PROMPT]
    for layer, kept, count in zip(cache.compact_layers, positions(cache), report.kept_entries[0], strict=True):
        assert count == float(PROMPT if kept is None else Fraction(int((kept >= 0).sum()), len(kept)))
        assert layer.length == (PROMPT if kept is None else kept.shape[-1])
        if kept is not None:
            check_positions(kept, cache.policies[0], PROMPT, entries)


def test_a_prompt_no_longer_than_the_window_is_kept_and_noted(model: PreTrainedModel) -> None:
    cache = wk.CompactCache(model, "snapkv:observe=8", 4)
    compact_logits(model, cache, prompt(8), [])
    assert cache.report.kept_entries == [[8] * model.config.num_hidden_layers]
    assert "observation window of 8" in cache.report.notes[0]


def test_a_budget_below_the_window_names_the_limit(model: PreTrainedModel) -> None:
    cache = wk.CompactCache(model, "snapkv:observe=8:sinks=2", 9)
    with pytest.raises(wk.BudgetError, match="at least 10"):
        compact_logits(model, cache, prompt(40), [])
