"""Wrappers: how they are written in a spec and in Python, and what they take over from the policy they wrap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import winnowkv as wk
from support.cases import CASES, Case
from support.models import PROMPT
from support.policies import KV_HEADS, bind, decided, drawn_model, drawn_states, kept_rows, run
from support.profiles import PROFILES
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import names, policy, policy_class
from winnowkv.policies.adakv import AdaKV
from winnowkv.policies.chunkkv import ChunkKV
from winnowkv.policies.compose import Wrapper
from winnowkv.policies.criticalkv import CriticalKV
from winnowkv.policies.snapkv import SnapKV

WRAPPERS = [name for name in names() if issubclass(policy_class(name), Wrapper)]
SELECTING = [name for name in WRAPPERS if policy_class(name).own_selector is True]  # else it is what the inner policy says
FLAGS = ("sinks", "observe", "quantize", "evicts", "uses_task", "uses_structure", "needs_profile", "wants_profile")
MODEL = drawn_model(4)


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("adakv", AdaKV(of=SnapKV())),
        ("adakv:floor=0.1", AdaKV(of=SnapKV(), floor=0.1)),
        ("adakv:of=snapkv:observe=4", AdaKV(of=SnapKV(observe=4))),
        ("adakv:floor=0.1:of=snapkv:observe=4:kernel=3", AdaKV(of=SnapKV(observe=4, kernel=3), floor=0.1)),
        ("chunkkv:chunk=4:of=knorm", ChunkKV(of=policy("knorm"), chunk=4)),
        ("criticalkv:first=0.3:of=adakv:floor=0:of=snapkv", CriticalKV(of=AdaKV(of=SnapKV(), floor=0), first=0.3)),
        ("adakv:of=criticalkv:of=snapkv:observe=4", AdaKV(of=CriticalKV(of=SnapKV(observe=4)))),
        ("adakv:of=compresskv:heads=random:3:observe=4", AdaKV(of=policy("compresskv", heads="random:3", observe=4))),
    ],
)
def test_what_follows_of_belongs_to_the_inner_policy(spec: str, made: wk.Policy) -> None:
    assert policy(spec) == made
    assert hash(policy(spec)) == hash(made)


def test_a_wrapper_in_python_equals_its_spec() -> None:
    assert wk.adakv("snapkv") == wk.adakv() == policy("adakv") == wk.adakv(SnapKV())
    assert wk.adakv("snapkv:observe=4", floor=0.1) == policy("adakv:floor=0.1:of=snapkv:observe=4")
    assert wk.chunkkv("knorm", chunk=4) == policy("chunkkv:chunk=4:of=knorm") == policy("chunkkv", of="knorm", chunk=4)
    assert wk.criticalkv(wk.adakv("expected")) == policy("criticalkv:of=adakv:of=expected")
    assert policy("adakv:of=snapkv", of="tova") == wk.adakv("tova")  # what the call says wins


@pytest.mark.parametrize("case", [case for case in CASES if "profile" not in case.spec], ids=str)
def test_a_spec_comes_back_as_the_same_policy(case: Case) -> None:
    assert policy(policy(case.spec).spec) == policy(case.spec)


def test_the_spec_names_what_differs_from_the_defaults_and_always_the_inner_policy() -> None:
    assert wk.adakv("snapkv").spec == "adakv:of=snapkv"
    assert wk.adakv("snapkv:observe=4", floor=0.1).spec == "adakv:floor=0.1:of=snapkv:observe=4"
    assert wk.criticalkv(wk.adakv("tova", floor=0.5), first=0.3).spec == "criticalkv:first=0.3:of=adakv:floor=0.5:of=tova"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("adakv:of=snapkw", r"policy 'snapkw' is unknown\. Did you mean 'snapkv'\?"),
        ("adakv:of=", "policy '' is unknown"),
        ("adakv:of=snapkv:kernal=3", r"snapkv has no option 'kernal'\. Did you mean 'kernel'\?"),
        ("adakv:of=snapkv:floor=0.1", "snapkv has no option 'floor'"),  # own options come first
        ("adakv:observe=4", r"adakv has no option 'observe'.*Options: of, floor"),
        ("adakv:flor=0.1:of=snapkv", r"adakv has no option 'flor'\. Did you mean 'floor'\?"),
        ("adakv:of=snapkv:kernel=four", "snapkv: kernel='four' is not of type int"),
        ("adakv:floor=much:of=snapkv", "adakv: floor='much' is not of type float"),
        ("adakv:of=snapkv:kernel=4", "snapkv: kernel=4 must be odd"),
        ("chunkkv:chunk=0:of=snapkv", "chunkkv: chunk=0 is too small"),
        (
            "criticalkv:of=adakv:of=snapkv:observe",
            "'observe' is not option=value; write it as snapkv:option=value",
        ),
        ("adakv:of", "'of' is not option=value; write it as adakv:option=value"),
    ],
)
def test_errors_name_the_policy_whose_option_it_is(spec: str, says: str) -> None:
    with pytest.raises(wk.PolicyError, match=says):
        policy(spec)


@pytest.mark.parametrize("given", [3, None, ["snapkv"]])
def test_an_inner_policy_of_another_kind_is_refused(given: Any) -> None:
    with pytest.raises(wk.PolicyError, match=r"adakv: of=.* is not of type Policy"):
        policy("adakv", of=given)


# --- what is taken over ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inner", [name for name in names() if name not in WRAPPERS])
def test_a_wrapper_is_what_its_inner_policy_is(wrapper: str, inner: str) -> None:
    """But for what it changes; or it is refused, if it would leave nothing of the inner policy."""
    of = policy(inner)
    if of.own_selector and wrapper in SELECTING:
        with pytest.raises(wk.PolicyError, match=f"{wrapper}: of='{inner}' selects tokens in a way of its own"):
            policy(f"{wrapper}:of={inner}")
        return
    made = policy(f"{wrapper}:of={inner}")
    assert all(getattr(made, flag) == getattr(of, flag) for flag in FLAGS)
    assert made.per_head == (wrapper == "adakv" or of.per_head)
    assert made.needs_projection == (wrapper == "criticalkv" or of.needs_projection)
    assert made.own_selector == (wrapper in SELECTING or of.own_selector)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inner", [name for name in names() if name not in WRAPPERS])
@pytest.mark.parametrize("budget", [20, 45])
def test_every_wrapper_over_every_policy_is_exact(wrapper: str, inner: str, budget: int) -> None:
    if policy_class(inner).own_selector and wrapper in SELECTING:
        return
    tokens, layers, prompt = 90, 5, wk.PromptInfo(90, 5, 20, wk.TaskProfile("localization"))
    made = decided(f"{wrapper}:of={inner}", layers)
    least = made.minimum_budget(prompt)
    if made.evicts and budget < least:
        with pytest.raises(wk.BudgetError, match=f"keep at least {least} entries"):
            bind(made, tokens, layers, budget, "localization")
        budget = least
    selection = PromptSelection(bind(made, tokens, layers, budget, "localization"))
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        selection.observe(drawn_states(selection.bound, layer, generator))
    if not made.evicts:
        assert selection.kept == [None] * layers
        return
    assert sum(len(row) for rows in kept_rows(selection) for row in rows) == KV_HEADS * layers * budget
    for rows in kept_rows(selection):
        for row in rows:
            assert row == sorted(set(row))
            assert set(range(made.sinks)) <= set(row) <= set(range(tokens))


def test_a_wrapper_is_stored_as_its_inner_policy() -> None:
    made = wk.criticalkv(wk.adakv("snapkv:observe=4")).stored_as("int8")
    assert made.quantize == "int8"
    assert made.spec == "criticalkv:of=adakv:of=snapkv:observe=4:quantize=int8"
    assert made == policy("criticalkv:of=adakv:of=snapkv:observe=4:quantize=int8")
    assert made.stored_as(None) == wk.criticalkv(wk.adakv("snapkv:observe=4"))


def test_the_inner_policy_checks_model_and_budget() -> None:
    prompt = wk.PromptInfo(PROMPT, 4, 9)
    for spec, says in (
        ("adakv:of=snapkv:observe=8:sinks=2", "snapkv: a budget of 9 entries .*keep at least 10 entries"),
        ("criticalkv:of=expected:sinks=9", "below 9 sinks and the last token: keep at least 10 entries"),
    ):
        made = policy(spec)
        assert made.minimum_budget(prompt) == 10
        for refuses in (made.check_budget, made.check_prompt):
            with pytest.raises(wk.BudgetError, match=says):
                refuses(prompt)
    with pytest.raises(wk.ProfileError):
        policy("adakv:of=compresskv").check(MODEL, None)
    with pytest.raises(wk.ProfileError):
        policy(f"criticalkv:of=adakv:of=compresskv:profile={PROFILES}/none.json").check(MODEL, None)
    with pytest.raises(wk.PolicyError, match="compresskv: 9 heads a layer are asked for, the model has 4"):
        policy("chunkkv:of=compresskv:heads_per_layer=9").check(MODEL, None)


def test_the_inner_policy_says_what_the_user_should_know() -> None:
    prompt = wk.PromptInfo(PROMPT, 4, 40)
    assert policy("adakv:of=winnow").bind(MODEL, prompt).notes == policy("winnow").bind(MODEL, prompt).notes != ()
    short = replace(prompt, tokens=8, budget=4)
    assert "observation window of 8" in policy("adakv:of=snapkv:observe=8").bind(MODEL, short).notes[0]


@pytest.mark.parametrize("inner", ["snapkv:observe=4", "h2o", "expected:samples=16", "winnow:observe=4:samples=16", "tova"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_asks_for_the_inner_policys_queries(wrapper: str, inner: str) -> None:
    ours, theirs = (bind(spec, PROMPT, 4, 40) for spec in (f"{wrapper}:of={inner}", inner))
    assert torch.equal(ours.query_positions(), theirs.query_positions())
    assert ours.query_span() == theirs.query_span()
    assert ours.parts.scorer.nearby_queries == theirs.parts.scorer.nearby_queries
    assert ours.parts.allocator == theirs.parts.allocator
    assert [ours.parts.scorer.leader(at) for at in range(4)] == [theirs.parts.scorer.leader(at) for at in range(4)]


def test_wrappers_may_be_written_in_either_order() -> None:
    """Ada-KV selects and CriticalKV scores: neither sees which of the two is outside."""
    specs = ("criticalkv:of=adakv:of=snapkv:observe=4", "adakv:of=criticalkv:of=snapkv:observe=4")
    ours, theirs = (run(spec, PROMPT, 4, 20)[0] for spec in specs)
    assert kept_rows(ours) == kept_rows(theirs)


@pytest.mark.parametrize(
    "spec",
    [
        "adakv:of=adakv", "adakv:of=chunkkv", "chunkkv:of=adakv:floor=0", "adakv:of=criticalkv:of=chunkkv",
        "chunkkv:of=criticalkv:of=headkv", "adakv:of=windowkv",
    ],
)  # fmt: skip
def test_a_wrapper_that_would_undo_the_inner_policy_is_refused(spec: str) -> None:
    name, _, inner = spec.partition(":of=")
    with pytest.raises(wk.PolicyError, match=f"which {name} would replace: .*such as {name}:of=snapkv") as error:
        policy(spec)
    assert f"of='{inner.split(':')[0]}" in str(error.value)
