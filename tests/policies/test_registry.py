"""The registry, specs of policies, and what every policy keeps of drawn queries and keys."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import winnowkv as wk
from support.cases import CASES, QUANTIZED, STUDIED, Case
from support.policies import KV_HEADS, SIZE, bind, decided, drawn_model, drawn_states
from winnowkv.budget import Budget
from winnowkv.cache.selection import PromptSelection
from winnowkv.errors import BudgetError, PolicyError
from winnowkv.policies import LayerStates, Policy, PromptInfo, names, policy, policy_class, registry, split_policies
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.compose import Wrapper
from winnowkv.policies.expected import Expected
from winnowkv.policies.parts import Allocator
from winnowkv.prompt.task import TaskProfile

BUILT_IN = sorted(registry.BUILT_IN)
LOCALIZATION = TaskProfile("localization")
MODEL = drawn_model(4)


# --- finding -------------------------------------------------------------------------------------------------------


def test_the_built_ins_are_there() -> None:
    assert set(BUILT_IN) <= set(names())
    for name in BUILT_IN:
        kind = policy_class(name)
        assert kind.name == name
        assert kind.source
        assert kind.scope


def test_every_registered_policy_has_a_case() -> None:
    """A policy added to the package without a case would be exempt from all laws."""
    mine = {name for name in names() if policy_class(name).__module__.startswith("winnowkv.")}
    assert mine == set(BUILT_IN) == {case.name for case in CASES + QUANTIZED + STUDIED}


def test_every_wrapper_is_a_case_over_several_policies() -> None:
    """So that laws about what a wrapper changes do not hold for snapkv only."""
    for name in (name for name in BUILT_IN if issubclass(policy_class(name), Wrapper)):
        inner = {case.spec.split("of=")[1].split(":")[0] for case in CASES if case.name == name}
        assert len(inner) > 1, name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newest(TokenPolicy):
    """A policy that is in no package, with an option of its own."""

    name: ClassVar[str] = "newest"
    observe: int = 4
    steps: int = 1


def test_a_policy_class_is_known_by_its_name_once_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(PolicyError, match="policy 'newest' is unknown"):
        policy("newest")
    assert wk.register_policy(Newest) is Newest
    assert "newest" in names()
    assert policy("newest:steps=3") == Newest(steps=3)
    assert policy("adakv:of=newest:steps=3").of == Newest(steps=3)  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match="Did you mean 'newest'"):
        policy("newst")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Newest):
        """Takes the place of the first, as when a cell of a notebook is run again."""

    wk.register_policy(Other)
    assert policy_class("newest") is Other
    assert names().count("newest") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("snapkv", "Taken: 'snapkv' is the name of a built-in policy"),
        ("a:b", "Taken: the name 'a:b' must be letters"),
        ("a,b", "Taken: the name 'a,b' must be letters"),
        ("", "Taken: the name '' must be letters"),
        (None, "Taken: the name None must be letters"),
    ],
)
def test_a_name_that_no_spec_can_say_is_refused(monkeypatch: pytest.MonkeyPatch, name: Any, words: str) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(PolicyError, match=f"^{words}"):
        registry.register_policy(type("Taken", (TokenPolicy,), {"name": name}))
    assert registry._registered == {}


@pytest.mark.parametrize("given", [Newest(), int, "newest"])
def test_what_is_no_policy_class_cannot_be_registered(given: Any) -> None:
    with pytest.raises(PolicyError, match=r"is not a subclass of Policy: derive from TokenPolicy"):
        registry.register_policy(given)


@pytest.mark.parametrize("name", BUILT_IN)
def test_policies_are_frozen_and_take_options_by_name_only(name: str) -> None:
    made = policy(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.sinks = 9  # type: ignore[misc]
    with pytest.raises(TypeError):
        policy_class(name)(1)  # type: ignore[call-arg]
    assert made == policy(name)
    assert hash(made) == hash(policy(name))


@pytest.mark.parametrize(("typo", "meant"), [("windowkw", "windowkv"), ("snap", "snapkv"), ("pyramid", "pyramidkv")])
def test_an_unknown_policy_suggests_the_nearest_and_lists_all(typo: str, meant: str) -> None:
    with pytest.raises(PolicyError, match=rf"policy '{typo}' is unknown\. Did you mean '{meant}'\?") as error:
        policy(typo)
    for name in BUILT_IN:
        assert name in str(error.value)


def test_a_far_off_name_gets_no_suggestion() -> None:
    with pytest.raises(PolicyError) as error:
        policy("zzzzzzzzzz")
    assert "Did you mean" not in str(error.value)


# --- options -------------------------------------------------------------------------------------------------------


def test_a_spec_equals_the_flat_construction() -> None:
    assert policy("windowkv:group=6:window=8") == policy("windowkv", group=6, window=8)
    assert policy("snapkv:pooling=avg:kernel=5") == policy("snapkv", pooling="avg", kernel=5)
    assert policy("pyramidkv:slope=14") == policy("pyramidkv", slope=14) == policy("pyramidkv", slope=14.0)
    assert policy("windowkv:group=3", group=4).group == 4  # what the call says wins
    assert policy("windowkv:task=none").task is None


def test_a_finished_policy_passes_through_and_takes_no_options() -> None:
    made = policy("snapkv")
    assert policy(made) is made
    with pytest.raises(PolicyError, match=r"\['kernel'\].*dataclasses\.replace"):
        policy(made, kernel=3)


def test_an_unknown_option_suggests_the_nearest_and_lists_the_options() -> None:
    with pytest.raises(PolicyError, match=r"snapkv has no option 'kernal'\. Did you mean 'kernel'\?") as error:
        policy("snapkv", kernal=5)
    assert str(error.value).endswith(
        "Options: sinks, observe, quantize, lookahead, draft, rounds, heard, refit, preset, kernel, pooling, group_by"
    )
    with pytest.raises(PolicyError, match="has no option 'name'"):  # class variables are no options
        policy("snapkv:name=x")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("snapkv", {"kernel": "five"}, "snapkv: kernel='five' is not of type int"),
        ("snapkv:kernel=", {}, "snapkv: kernel='' is not of type int"),
        ("snapkv:kernel=5.0", {}, "snapkv: kernel='5.0' is not of type int"),
        ("snapkv", {"kernel": 5.0}, "snapkv: kernel=5.0 is not of type int"),
        ("snapkv", {"kernel": True}, "snapkv: kernel=True is not of type int"),
        ("snapkv", {"kernel": None}, "snapkv: kernel=None is not of type int"),
        ("snapkv", {"kernel": [5]}, r"snapkv: kernel=\[5\] is not of type int"),
        ("pyramidkv:slope=steep", {}, "pyramidkv: slope='steep' is not of type float"),
        ("snapkv:pooling=median", {}, "snapkv: pooling='median' must be one of avg, max"),
        ("windowkv:task=qa", {}, "windowkv: task='qa' must be one of localization, aggregation"),
        ("windowkv:preset=mine", {}, "windowkv: preset='mine' must be one of paper, repo"),
    ],
)
def test_an_ill_typed_option_names_value_and_type(spec: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=f"^{message}$"):
        policy(spec, **options)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("snapkv:kernel=6", "kernel=6 must be odd"),
        ("snapkv:kernel=0", "kernel=0 is too small, it must be at least 1"),
        ("snapkv:kernel=-3", "kernel=-3 is too small"),
        ("snapkv:observe=0", "observe=0 is too small, it must be at least 1"),
        ("pyramidkv:observe=0", "observe=0 is too small"),
        ("dynamickv:observe=0", "observe=0 is too small"),
        ("streaming:sinks=-1", "sinks=-1 is too small, it must be at least 0"),
        ("random:observe=-1", "observe=-1 is too small"),
        ("full:sinks=-1", "sinks=-1 is too small"),
        ("pyramidkv:slope=0.5", "slope=0.5 is too small, it must be at least 1"),
        ("dynamickv:every=0", "every=0 is too small"),
        ("dynamickv:ceiling=0.9", "ceiling=0.9 is too small"),
        ("dynamickv:floor=-0.1", "floor=-0.1 is too small"),
        ("windowkv:group=0", "group=0 is too small"),
        ("windowkv:window=0", "window=0 is too small"),
        ("windowkv:observe=0", "observe=0 is too small"),
        ("windowkv:top=-1", "top=-1 is too small"),
        ("windowkv:sinks=-1", "sinks=-1 is too small"),
        ("pyramidkv:slope=nan", "slope=nan must be a finite number"),
        ("windowkv:slope=inf", "slope=inf must be a finite number"),
        ("dynamickv:ceiling=inf", "ceiling=inf must be a finite number"),
        ("dynamickv:floor=nan", "floor=nan must be a finite number"),
    ],
)
def test_an_option_out_of_range_is_refused_where_it_is_made(spec: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words) as error:
        policy(spec)
    assert str(error.value).startswith(spec.partition(":")[0] + ":")


@pytest.mark.parametrize("spec", ["snapkv:kernel", "snapkv:=5", "snapkv:"])
def test_a_broken_spec_says_how_to_write_it(spec: str) -> None:
    with pytest.raises(PolicyError, match="is not option=value; write it as snapkv:option=value"):
        policy(spec)


def test_lists_of_specs_are_split_at_commas() -> None:
    assert split_policies(" full, windowkv:group=6:top=4 ,,snapkv,") == ["full", "windowkv:group=6:top=4", "snapkv"]
    for empty in ("", " ", ",,"):
        with pytest.raises(PolicyError, match="no policy was named"):
            split_policies(empty)


# --- tasks ---------------------------------------------------------------------------------------------------------


def test_windowkv_needs_a_task() -> None:
    with pytest.raises(PolicyError, match=r"task='localization'.*task='aggregation'"):
        policy("windowkv").bind(MODEL, PromptInfo(90, 4, 40))
    with pytest.raises(PolicyError, match=r"task='localization'.*task='aggregation'"):
        policy("windowkv").check(MODEL, TaskProfile())
    policy("windowkv").check(MODEL, None)  # a prompt's task is classified later
    for task in (TaskProfile(), LOCALIZATION):  # a task given as an option wins
        selector = policy("windowkv", task="aggregation").bind(MODEL, PromptInfo(90, 4, 40, task)).parts.selector
        assert selector == policy("windowkv").bind(MODEL, PromptInfo(90, 4, 40, TaskProfile("aggregation"))).parts.selector
        assert selector != policy("windowkv").bind(MODEL, PromptInfo(90, 4, 40, LOCALIZATION)).parts.selector


@pytest.mark.parametrize(
    ("preset", "task", "numbers"),
    [
        ("paper", "localization", (16, 8, 8)), ("paper", "aggregation", (32, 16, 8)),
        ("repo", "localization", (32, 8, 4)), ("repo", "aggregation", (16, 8, 8)),
    ],
)  # fmt: skip
def test_windowkv_presets_have_the_published_numbers(preset: str, task: str, numbers: tuple[int, int, int]) -> None:
    prompt = PromptInfo(90, 4, 40, TaskProfile.of(task))
    for options, expected in (({}, numbers), ({"window": 5}, (numbers[0], 5, numbers[2]))):
        parts = policy("windowkv", preset=preset, **options).bind(MODEL, prompt).parts
        assert (parts.scorer.window, parts.selector.width, parts.selector.top) == expected


def test_policies_without_a_task_ignore_it_and_unknown_tasks_are_named() -> None:
    without_task = [name for name in BUILT_IN if "task" not in {field.name for field in dataclasses.fields(policy_class(name))}]
    assert len(without_task) > 15
    for name in without_task:
        assert not policy(name).uses_task
        kept = [keep(name, 90, 4, 40, task=task).kept for task in (None, LOCALIZATION, "aggregation")]
        assert str(kept[0]) == str(kept[1]) == str(kept[2])
    with pytest.raises(PolicyError, match="task 'qa' is unknown: it is one of localization, aggregation"):
        TaskProfile.of("qa")


# --- third parties -------------------------------------------------------------------------------------------------


def distribution(folder: Path, entry: str, module: str) -> None:
    """A distribution as pip would leave it: a module and its metadata."""
    sys.modules.pop("winnow_outside", None)  # another test's module of the same name
    info = folder / "winnow_outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: winnow-outside\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[winnowkv.policies]\n{entry}\n", encoding="utf-8")
    (folder / "winnow_outside.py").write_text(module, encoding="utf-8")


def test_a_policy_of_another_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(
        tmp_path,
        "outside = winnow_outside:Outside",
        "from dataclasses import dataclass\n"
        "from typing import Any, ClassVar\n"
        "import torch\n"
        "from winnowkv.policies.base import TokenPolicy\n"
        "from winnowkv.policies.parts import Scorer\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Outside(TokenPolicy):\n"
        "    name: ClassVar[str] = 'outside'\n"
        "    observe: int = 2\n"
        "    stride: int = 2\n"
        "    def scorer(self, model, prompt):\n"
        "        return Strides(prompt.tokens, self.observe, stride=self.stride)\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Strides(Scorer):\n"
        "    stride: int\n"
        "    def score(self, states):\n"
        "        return (torch.arange(self.tokens - self.window) % self.stride == 0).float().expand(1, 1, -1)\n",
    )
    assert "outside" not in names()
    monkeypatch.syspath_prepend(tmp_path)
    assert "outside" in names()
    made = wk.policy("outside:stride=3")
    assert (type(made).__module__, made.stride) == ("winnow_outside", 3)
    with pytest.raises(PolicyError, match=r"outside has no option 'strid'\. Did you mean 'stride'\?"):
        wk.policy("outside:strid=3")
    assert keep(made, 10, 1, 5).kept[0].tolist() == [[[0, 3, 6, 8, 9]]]


def test_a_policy_of_another_package_with_a_built_in_name_loses_and_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "snapkv = winnow_outside:SnapKV", "raise AssertionError('it is not even imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    says = "policy 'snapkv' of 'winnow_outside:SnapKV' has the name of a built-in one, which wins"
    with pytest.warns(UserWarning, match=says):
        found = names()
    assert found == BUILT_IN
    assert policy_class("snapkv").__module__ == "winnowkv.policies.snapkv"
    assert policy("snapkv").spec == "snapkv"


def test_installed_packages_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every prompt: it takes as long as a layer of prefill. Only a name that is not there is looked for again."""
    looked = []
    monkeypatch.setattr(registry, "entry_points", lambda **of: looked.append(of) or entry_points(**of))
    names()
    for _ in range(3):
        policy("snapkv"), policy_class("windowkv")
    assert len(looked) == 1
    with pytest.raises(PolicyError, match="is unknown"):
        policy("unheard-of")
    assert len(looked) == 2


def test_an_entry_point_that_is_no_policy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "impostor = winnow_outside:Impostor\nnumber = winnow_outside:NUMBER"
    distribution(tmp_path, entries, "class Impostor:\n    pass\nNUMBER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in (("impostor", "winnow_outside:Impostor"), ("number", "winnow_outside:NUMBER")):
        with pytest.raises(PolicyError, match=f"'{name}': the entry point '{value}' is not a subclass of Policy"):
            policy(name)


# --- what is kept of drawn queries and keys -------------------------------------------------------------------------------


def keep(
    made: str | Policy, tokens: int, layers: int, budget: int, seed: int = 0, task: TaskProfile | str | None = None
) -> PromptSelection:
    """The policy over random states of layers."""
    generator = torch.Generator().manual_seed(seed)
    selection = PromptSelection(bind(made, tokens, layers, budget, task))
    for layer in range(layers):
        selection.observe(drawn_states(selection.bound, layer, generator))
    return selection


def innermost(made: Policy) -> Policy:
    """The policy itself, or what a wrapper wraps at last."""
    return innermost(made.of) if isinstance(made, Wrapper) else made


def test_a_budget_below_sinks_and_window_is_refused_with_the_number_that_works(evicting: Case) -> None:
    made, prompt = decided(evicting.spec, 4), PromptInfo(200, 4, 200, TaskProfile.of(evicting.task))
    least, inner = made.minimum_budget(prompt), innermost(made)
    if not isinstance(inner, Expected):  # which lets the window shrink to what the budget leaves
        assert least >= max(made.sinks + made.observation_window(prompt), 1)
    with pytest.raises(BudgetError, match=rf"{inner.name}: a budget of {least - 1} entries.*at least {least} entries"):
        bind(made, 200, 4, least - 1, evicting.task)
    keep(made, 200, 4, least, task=evicting.task)


def test_a_prompt_within_budget_or_window_is_kept_whole(evicting: Case) -> None:
    made = decided(evicting.spec, 4)
    assert keep(made, 40, 4, 40, task=evicting.task).kept == [None] * 4
    window = made.observation_window(PromptInfo(200, 4, 200, TaskProfile.of(evicting.task)))
    if window > 1:  # D8: the published DynamicKV crashes here
        selection = keep(made, window, 4, window - 1, task=evicting.task)
        assert selection.kept == [None] * 4
        assert f"the prompt of {window} tokens" in selection.notes[0]


def test_full_keeps_everything_at_any_budget() -> None:
    selection = keep("full", 50, 3, 1)
    assert selection.kept == [None] * 3
    assert selection.notes == ()


def test_the_same_prompt_keeps_the_same_and_the_global_generator_is_not_touched(evicting: Case) -> None:
    made, task = decided(evicting.spec, 5), evicting.task
    state = torch.get_rng_state()
    first = keep(made, 90, 5, 50, task=task)
    keep(made, 70, 5, 45, seed=1, task=task)  # another prompt between them
    again = keep(made, 90, 5, 50, task=task)
    for a, b in zip(first.kept, again.kept, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_draws_anew_for_each_layer_and_seed() -> None:
    one, other = keep(policy("random"), 90, 2, 40), keep(policy("random:seed=1"), 90, 2, 40)
    assert not torch.equal(one.kept[0], one.kept[1])
    assert not torch.equal(one.kept[0], other.kept[0])


@pytest.mark.parametrize("window", [0, 3, 6])
def test_streaming_keeps_sinks_and_recent_tokens_with_or_without_a_window(window: int) -> None:
    kept = keep(policy("streaming", observe=window), 40, 2, 10).kept[1]
    assert kept.tolist() == [[[0, 1, 2, 3, 34, 35, 36, 37, 38, 39]]]


def test_windowkv_followers_share_their_leaders_selection() -> None:
    shorter = 0
    for budget in (38, 39, 40, 41):
        selection = keep("windowkv:group=3:observe=8", 120, 8, budget, task=LOCALIZATION)
        for layer in range(8):
            leader = selection.bound.parts.scorer.leader(layer)
            assert leader == 3 * (layer // 3)
            ours, theirs = (set(selection.kept[at].flatten().tolist()) for at in (layer, leader))
            assert ours <= theirs  # the same, or one token less by rounding
            assert len(theirs) - len(ours) <= 1
            shorter += ours != theirs
    assert shorter > 0  # rounding does tell a follower from its leader here


def test_an_allocation_that_misses_the_total_is_refused() -> None:
    class More(Allocator):
        def prefill_limits(self) -> list[int]:
            return [self.prompt.budget + 1] * self.prompt.layers

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Greedy(type(policy("random"))):  # type: ignore[misc]
        def allocator(self, model: wk.ModelInfo, prompt: PromptInfo) -> Allocator:
            return More(prompt)

    with pytest.raises(PolicyError, match="end with 82 entries, the budget is 80"):
        keep(Greedy(), 90, 2, 40)


def test_a_policy_without_a_scorer_of_its_own_says_so() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unfinished(TokenPolicy):
        name: ClassVar[str] = "unfinished"

    states = LayerStates(0, torch.zeros(1, 1, 0, SIZE), *[torch.zeros(1, KV_HEADS, 9, SIZE)] * 2, 1.0)
    with pytest.raises(TypeError, match=r"does not define score\(\)"):
        bind(Unfinished(), 9, 1, 3).parts.scorer.score(states)


def test_fractions_and_entries_reach_a_prompt_alike() -> None:
    entries = Budget.of("0.4").entries(100)
    assert keep(policy("random"), 100, 2, entries).kept[0].shape[-1] == 40


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("adakv:of=" * 3000 + "snapkv", "is too long"),
        ("adakv:of=" * 9 + "snapkv", "8 policies in it"),
        ("snapkv:observe=" + "9" * 5000, "observe='999.*is not of type int"),
        ("snapkv:observe=" + "9" * 400, "must be a finite number"),
        (f"snapkv:observe={2**63}", "must be a finite number"),
        ("random:seed=" + "9" * 400, "must be a finite number"),
        ("pyramidkv:slope=1e999", "must be a finite number"),
        ("snapkv:observe=8:observe=16", "observe stands twice"),
        ("x" * 8000, "is unknown"),
        ("snapkv:" + "x" * 8000 + "=1", "has no option"),
        ("\udc80", "is unknown"),
        ("compresskv:heads=" + "9" * 5000, "heads='9999.* must be srh"),
        ("compresskv:heads=random:" + "9" * 5000, "must be srh"),
        ("snapkv:quantize=" + "x" * 5000, "must be one of"),
        (None, "is no name"),
        (3, "is no name"),
        (["snapkv"], "is no name"),
    ],
)
def test_specs_of_any_kind_are_refused_in_one_short_sentence(spec: Any, words: str) -> None:
    with pytest.raises(PolicyError, match=words) as refused:
        policy(spec)
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_an_option_in_python_is_checked_as_one_in_a_spec() -> None:
    for value in (10**400, float("nan"), float("inf")):
        with pytest.raises(PolicyError, match=r"must be a finite number|is not of type"):
            policy("snapkv", observe=value)
        with pytest.raises(PolicyError, match="must be a finite number"):
            policy("pyramidkv", slope=value)
