"""Law 2: kept entries sum to the budget exactly; positions are unique, in range, ascending, with sinks and window."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import CASES, QUANTIZED, STUDIED, Case
from support.models import PROMPT, prompt
from support.policies import HEADS, KV_HEADS, bind, drawn_states
from support.reference import compact_logits, positions
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import BoundPolicy
from winnowkv.policies.adakv import AdaptiveHeads
from winnowkv.policies.compose import Wrapper
from winnowkv.policies.expected import Expected
from winnowkv.policies.registry import BUILT_IN


def selection_of(spec: str, task: str | None, tokens: int, layers: int, budget: int) -> PromptSelection:
    """The way of one drawn prompt."""
    return PromptSelection(bind(spec, tokens, layers, budget, task))


def least_of(spec: str, task: str | None, tokens: int, layers: int) -> int:
    """The smallest budget of a policy for such a prompt."""
    return wk.policy(spec).minimum_budget(wk.PromptInfo(tokens, layers, tokens, wk.TaskProfile.of(task)))


def test_every_built_in_policy_has_a_case() -> None:
    """A policy added to the package without a case here would be exempt from all laws."""
    assert set(BUILT_IN) <= {case.name for case in CASES + QUANTIZED + STUDIED}


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
    wrapper = st.sampled_from(["adakv", "adakv:floor=0", "chunkkv:chunk=3", "criticalkv"])
    inner = st.sampled_from(["snapkv", "pyramidkv", "dynamickv"])
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
        st.builds("adakv:floor={}:of=snapkv:{}".format, st.sampled_from([0, 0.2, 1]), snap).map(no_task),
        st.builds("{}:of=expected:{}:observe={}".format, wrapper, ahead, st.integers(0, 20)).map(no_task),
        st.builds("adakv:of=pyramidkv:{}:slope={}".format, snap, slope).map(no_task),
        st.builds("{}:sinks={}:observe={}".format, st.sampled_from(["keydiff", "knorm"]), small, small).map(no_task),
        st.builds("lagkv:lag={}:sinks={}:observe={}".format, st.integers(1, 60), small, small).map(no_task),
        st.builds("defensivekv:sinks={}:observe={}:kernel={}".format, small, observe, kernel).map(no_task),
        st.builds("criticalkv:first={}:of={}:{}".format, st.sampled_from([0, 0.5, 1]), inner, snap).map(no_task),
        st.builds("chunkkv:chunk={}:of={}:{}".format, st.integers(1, 12), inner, snap).map(no_task),
        st.builds("criticalkv:of=chunkkv:of=criticalkv:of={}:{}".format, inner, snap).map(no_task),
        st.builds("{}:of=h2o:sinks={}:recent={}".format, wrapper, small, st.sampled_from([0, 0.3, 0.5, 1])).map(no_task),
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
        st.builds("{}:of=winnow:{}:observe={}:heads=none".format, wrapper, ahead, observe).map(no_task),
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


def drive(plan: PromptSelection, seed: int, constant: bool) -> None:
    """Feed every layer; check on the way that what a layer holds only ever shrinks, to a part of itself."""
    generator, tokens = torch.Generator().manual_seed(seed), plan.bound.prompt.tokens
    held: list[Tensor | None] = []
    for layer in range(plan.bound.prompt.layers):
        held.append(None)
        states = drawn_states(plan.bound, layer, generator, constant=constant)
        if constant:  # all scores tie, those by keys and values, too
            states = replace(states, keys=torch.zeros_like(states.keys), values=torch.zeros_like(states.values))
        for index, now in plan.observe(states).items():
            assert index <= layer
            for head in range(now.shape[1]):
                before = range(-1, tokens) if held[index] is None else [-1, *held[index][0, head].tolist()]
                assert set(now[0, head].tolist()) <= set(before), "an evicted entry came back"
            held[index] = now
    assert all(a is b for a, b in zip(held, plan.kept, strict=True))


def innermost(policy: wk.Policy) -> wk.Policy:
    """What a wrapper wraps in the end."""
    while isinstance(policy, Wrapper):
        policy = policy.of
    return policy


def check_positions(kept: Tensor, bound: BoundPolicy) -> None:
    """One layer's positions ``[H, n]``."""
    policy, tokens, budget = bound.policy, bound.prompt.tokens, bound.prompt.budget
    assert kept.shape[0] in (1, KV_HEADS)
    if not policy.per_head:
        assert int(kept.min()) >= 0, "only budgets per head pad"
    rows = [[position for position in row if position >= 0] for row in kept.tolist()]
    assert max(map(len, rows)) == kept.shape[1], "padded further than the longest head"
    for row, padded in zip(rows, kept.tolist(), strict=True):
        assert padded == [-1] * (len(padded) - len(row)) + row, "padding is not in front"
        assert row == sorted(set(row)), "not ascending, or one entry twice"
        assert all(position < tokens for position in row)
        assert row[: policy.sinks] == list(range(policy.sinks)), "a sink is missing"
        # Those of the family of expected take what a small budget leaves.
        window = policy.observation_window(bound.prompt)
        stays = min(window, budget - policy.sinks) if isinstance(innermost(policy), Expected) else window
        assert row[len(row) - stays :] == list(range(tokens - stays, tokens)), "the recent window is not whole"


@settings(max_examples=400, deadline=None, derandomize=True)
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
    entries, least = wk.Budget.of(budget).entries(tokens), least_of(name, task, tokens, layers)
    try:
        plan = selection_of(name, task, tokens, layers, entries)
    except wk.BudgetError:
        assert entries < least
        return
    drive(plan, seed, constant)
    if entries >= tokens or tokens <= plan.bound.policy.observation_window(plan.bound.prompt):
        assert all(kept is None for kept in plan.kept)
        assert (bool(plan.notes)) == (entries < tokens)
        return
    assert entries >= least
    assert sum(entries_of(kept, tokens) for kept in plan.kept) == entries * layers
    for kept in plan.kept:
        if kept is not None:
            check_positions(kept[0], plan.bound)


@pytest.mark.parametrize("constant", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("budget", [1, 20, 33, 34, 40, 71, 0.5, 0.77])
def test_each_case_is_exact(case: Case, budget: int | float, constant: bool) -> None:
    """The cases of the other laws, one by one: hypothesis need not have met them."""
    entries = wk.Budget.of(budget).entries(PROMPT)
    if case.name != "full" and entries < least_of(case.spec, case.task, PROMPT, 7):
        with pytest.raises(wk.BudgetError, match="keep at least"):
            selection_of(case.spec, case.task, PROMPT, 7, entries)
        return
    plan = selection_of(case.spec, case.task, PROMPT, 7, entries)
    drive(plan, 0, constant)
    if case.name == "full":
        assert plan.kept == [None] * 7
        return
    assert sum(entries_of(kept, PROMPT) for kept in plan.kept) == 7 * entries
    for kept in plan.kept:
        if kept is not None:
            check_positions(kept[0], plan.bound)


@pytest.mark.parametrize(("seed", "floor"), [(20, 0.0), (76, 0.0), (97, 0.0), (47, 0.2), (80, 0.2), (113, 0.2)])
def test_heads_that_share_a_shrinking_budget_take_nothing_back(seed: int, floor: float) -> None:
    """A head's part of fewer entries, rounded, may be larger than its part of more: not than what it still holds."""
    heads = 2 + seed % 3
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, heads, 40, generator=generator) ** (1 + seed % 7 * torch.rand(1, heads, 1, generator=generator))
    selector = AdaptiveHeads(44, 4, 2, floor=floor)
    before, alone = [set(range(44))] * heads, []
    for entries in range(43, 6, -1):
        standing = scores.clone()
        for head, held in enumerate(before):
            standing[0, head, [at for at in range(40) if at not in held]] = -1.0
        now = [set(row) - {-1} for row in selector.select(0, standing, entries)[0].tolist()]
        assert sum(map(len, now)) == heads * entries
        assert all(stays <= held for stays, held in zip(now, before, strict=True))
        alone.append([set(row) - {-1} for row in selector.select(0, scores, entries)[0].tolist()])
        before = now
    # Of these prompts the parts do grow, or the law above would prove little.
    assert any(not stays <= held for a, b in pairwise(alone) for held, stays in zip(a, b, strict=True))


@pytest.mark.parametrize("layers", [1, 4, 30])
@pytest.mark.parametrize("name", [name for name in BUILT_IN if wk.policy(name).evicts])
def test_default_options_are_exact(name: str, layers: int) -> None:
    """No more than sinks and window, little more, and all but one token."""
    tokens, least = 100, least_of(name, "localization", 100, layers)
    for budget in (least, least + 1, least + 30, tokens - 1):
        plan = selection_of(name, "localization", tokens, layers, min(budget, tokens - 1))
        drive(plan, 0, False)
        assert sum(entries_of(kept, tokens) for kept in plan.kept) == min(budget, tokens - 1) * layers
        for kept in plan.kept:
            if kept is not None:
                check_positions(kept[0], plan.bound)


@pytest.mark.parametrize("budget", [40, 71, 0.6, 0.999])
def test_kept_entries_of_a_model_sum_to_the_budget(model: PreTrainedModel, evicting: Case, budget: int | float) -> None:
    cache = wk.CompactCache(model, evicting.spec, budget, task=evicting.task)
    compact_logits(model, cache, prompt(PROMPT), [])
    report, layers = cache.report, model.config.num_hidden_layers
    entries = budget if isinstance(budget, int) else int(budget * PROMPT)
    asked = cache.compression.prompt(PROMPT, layers, wk.TaskProfile.of(evicting.task))
    bound = cache.compression.selection(asked).bound
    assert bound.prompt.budget == entries
    assert sum(report.kept_entries[0]) == pytest.approx(entries * layers, abs=1e-9)
    assert report.prompt_tokens == [PROMPT]
    for layer, kept, count in zip(cache.compact_layers, positions(cache), report.kept_entries[0], strict=True):
        assert count == float(PROMPT if kept is None else Fraction(int((kept >= 0).sum()), len(kept)))
        assert layer.length == (PROMPT if kept is None else kept.shape[-1])
        if kept is not None:
            check_positions(kept, bound)


def test_a_prompt_no_longer_than_the_window_is_kept_and_noted(model: PreTrainedModel) -> None:
    cache = wk.CompactCache(model, "snapkv:observe=8", 4)
    compact_logits(model, cache, prompt(8), [])
    assert cache.report.kept_entries == [[8] * model.config.num_hidden_layers]
    assert "observation window of 8" in cache.report.notes[0]


def test_a_budget_below_the_window_names_the_limit(model: PreTrainedModel) -> None:
    cache = wk.CompactCache(model, "snapkv:observe=8:sinks=2", 9)
    with pytest.raises(wk.BudgetError, match="at least 10"):
        compact_logits(model, cache, prompt(40), [])
