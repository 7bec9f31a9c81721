"""Which tokens look: the question as the prompt's structure names it, and what stays of it; for every policy with a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.policies import KV_HEADS, bind, decided, drawn_states
from support.profiles import PROFILES
from support.tokenizers import ChatLetters
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import BoundPolicy, PromptInfo, policy_class
from winnowkv.policies.observation import WindowPolicy
from winnowkv.policies.registry import BUILT_IN
from winnowkv.policies.windowkv import QUESTION_REVIEW
from winnowkv.prompt.structure import Structure, read_structure
from winnowkv.prompt.task import TaskProfile

TOKENS, LAYERS, QUESTION, TAIL = 60, 4, 14, 5
POLICIES = {name: policy_class(name) for name in BUILT_IN if issubclass(policy_class(name), WindowPolicy)}
SPECS = [
    *POLICIES, "dynamickv:every=3:ceiling=1.5", "compresskv:indices=per-kv-head:least=4", "windowkv:window=5:group=3",
    "adakv:of=cake", "criticalkv:of=windowkv", "chunkkv:chunk=4:of=dynamickv", "criticalkv:of=adakv:of=compresskv",
]  # fmt: skip


def asking(tokens: int = TOKENS, question: int = QUESTION, tail: int = TAIL) -> TaskProfile:
    """A prompt's task and structure."""
    return TaskProfile("localization", structure=Structure(tokens, question, tail, ()))


def with_option(spec: str, option: str) -> str:
    """The spec with one option more, of the innermost policy."""
    return f"{spec}:{option}"


def looking(bound: BoundPolicy) -> range:
    """Positions whose queries are asked for, which are side by side."""
    found = bound.query_positions().tolist()
    assert found == list(range(found[0], found[-1] + 1))
    return range(found[0], found[-1] + 1)


def test_every_policy_that_the_papers_give_a_window_is_here() -> None:
    assert set(POLICIES) >= {
        "snapkv", "pyramidkv", "dynamickv", "compresskv", "windowkv", "headkv", "cake", "defensivekv", "tova",
    }  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_the_question_looks_without_the_templates_tail(spec: str) -> None:
    spec = with_option(spec, "observe=question")
    assert wk.policy(spec).uses_structure
    assert looking(bind(spec, TOKENS, LAYERS, 40, asking())) == range(TOKENS - QUESTION, TOKENS - TAIL)


@pytest.mark.parametrize("spec", SPECS)
def test_scores_are_those_of_a_prompt_that_ends_with_its_question(spec: str) -> None:
    """Whatever the template's tail is, it neither looks nor is looked at."""
    asked = bind(with_option(spec, "observe=question"), TOKENS, LAYERS, 45, asking())
    end = TOKENS - TAIL
    ended = bind(with_option(spec, f"observe={QUESTION - TAIL}"), end, LAYERS, 40, TaskProfile("localization"))
    for layer in range(LAYERS):
        states = drawn_states(asked, layer, torch.Generator().manual_seed(layer))
        cut = replace(states, keys=states.keys[:, :, :end], values=states.values[:, :, :end])
        found = asked.parts.scorer.score(states)
        assert found.shape[-1] == TOKENS - QUESTION
        if "criticalkv" not in spec:  # which looks at the budget, too
            torch.testing.assert_close(found, ended.parts.scorer.score(cut))


@pytest.mark.parametrize("name", POLICIES)
def test_the_last_tokens_look_if_no_question_is_known_or_a_window_was_asked_for(name: str) -> None:
    bare = TaskProfile("localization")
    paper = bind(name, 90, LAYERS, 50, bare).policy.observation_window(PromptInfo(90, LAYERS, 50, bare))
    last = range(90 - paper, 90)
    for spec, task in (
        (name, bare),
        (f"{name}:observe=question", bare),
        (f"{name}:observe=question", asking(91)),  # another prompt's
        (f"{name}:observe=question", asking(90, 46, 5)),  # longer than half of the prompt
        (f"{name}:observe=question", asking(90, 5, 5)),  # nothing of it looks
        (f"{name}:observe=question", asking(90, 0, 0)),
        (f"{name}:preset=paper", bare),
        (f"{name}:preset=paper", asking(90)),
    ):
        if name == "windowkv" and "paper" in spec:
            last, paper = range(74, 90), 16
        bound = bind(spec, 90, LAYERS, 50, task)
        assert looking(bound) == last, spec
        assert bound.parts.selector.recent_tokens(90 - paper, 50) == paper
    assert not wk.policy(f"{name}:preset=paper").uses_structure
    for task in (bare, asking(90)):
        assert looking(bind(f"{name}:observe=7", 90, LAYERS, 50, task)) == range(83, 90)
    assert looking(bind(f"{name}:observe=question", 90, LAYERS, 50, asking(90, 45, 5))) == range(45, 85)


@pytest.mark.parametrize("name", POLICIES)
def test_what_looks_by_default(name: str) -> None:
    """The question, but for tova, whose rule is about the last token."""
    expected = range(TOKENS - 1, TOKENS) if name == "tova" else range(TOKENS - QUESTION, TOKENS - TAIL)
    assert looking(bind(name, TOKENS, LAYERS, 40, asking())) == expected
    assert wk.policy(name).uses_structure == (name != "tova")
    assert wk.policy(f"adakv:of={name}").uses_structure == (name != "tova") if not wk.policy(name).own_selector else True


def test_windowkvs_presets_keep_their_windows() -> None:
    for preset, window in (("paper", 16), ("repo", 32)):
        bound = bind(f"windowkv:preset={preset}", 90, LAYERS, 50, asking(90))
        assert looking(bound) == range(90 - window, 90)
        asked = bind(f"windowkv:preset={preset}:observe=question", 90, LAYERS, 50, asking(90))
        assert looking(asked) == range(76, 85)
        assert (asked.parts.selector.width, asked.parts.selector.top) == (bound.parts.selector.width, bound.parts.selector.top)


def test_windowkv_reviews_in_its_own_way_if_a_question_looks_for_one_place() -> None:
    """Without a question, for aggregation, or with a preset the numbers are the published ones; options win."""

    def review(spec: str, task: TaskProfile) -> tuple[float, ...]:
        parts = bind(spec, 90, LAYERS, 50, task).parts
        return parts.selector.width, parts.selector.top, parts.scorer.group, parts.allocator.slope

    question = QUESTION_REVIEW
    assert review("windowkv", asking(90)) == question != (8, 4, 6, 14.0)
    assert review("windowkv:observe=question", asking(90)) == question
    assert review("windowkv:window=5:slope=3", asking(90)) == question._replace(window=5, slope=3.0)
    scattered = replace(asking(90), task="aggregation")
    assert review("windowkv", scattered) == (8, 8, 6, 14.0)
    assert looking(bind("windowkv", 90, LAYERS, 50, scattered)) == range(76, 85)
    for spec in ("windowkv:preset=repo", "windowkv:preset=repo:observe=question", "windowkv:observe=32"):
        assert review(spec, asking(90)) == (8, 4, 6, 14.0)
    assert review("windowkv:preset=paper:group=2", asking(90)) == (8, 8, 2, 14.0)
    assert review("windowkv", TaskProfile("localization")) == (8, 4, 6, 14.0)


def test_a_word_that_is_no_window_is_refused() -> None:
    for options in ({"observe": "questions"}, {"observe": ""}):
        with pytest.raises(wk.PolicyError, match=r"snapkv: observe='.*' must be question or a number of tokens"):
            policy_class("snapkv")(**options)
    with pytest.raises(wk.PolicyError, match="cake: observe=1 is too small, it must be at least 2"):
        wk.policy("cake:observe=1")
    with pytest.raises(wk.PolicyError, match="snapkv: preset='repo' must be one of paper"):
        wk.policy("snapkv:preset=repo")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    spec=st.sampled_from(SPECS),
    tokens=st.integers(2, 120),
    question=st.integers(0, 70),
    tail=st.integers(0, 20),
    sinks=st.integers(0, 30),
    budget=st.integers(1, 120),
    constant=st.booleans(),
)
def test_budgets_are_exact_for_any_question(
    spec: str, tokens: int, question: int, tail: int, sinks: int, budget: int, constant: bool
) -> None:
    """And a budget that the policy takes without a question it takes with any."""
    spec, task = with_option(spec, f"observe=question:sinks={sinks}"), asking(tokens, question, tail)
    try:
        bind(spec, tokens, LAYERS, budget, replace(task, structure=None))
    except wk.BudgetError:
        with pytest.raises(wk.BudgetError):
            bind(spec, tokens, LAYERS, budget, task)
        return
    selection = PromptSelection(bind(spec, tokens, LAYERS, budget, task))
    run(selection, constant)
    if not selection.bound.evicts:
        assert selection.kept == [None] * LAYERS
        return
    least = selection.bound.policy.observation_window(selection.bound.prompt)
    fewest = 2 if "cake" in spec else 1
    asks = question - tail >= fewest and tokens - question >= max(question, sinks)
    recent = min(question, max(least, budget // 2), budget - sinks) if asks else least
    for heads in kept_rows(selection):
        for head in heads:
            assert head == sorted(set(head))
            assert {*range(sinks), *range(tokens - recent, tokens)} <= set(head)
            assert head[-1] == tokens - 1
    assert entries(selection) == budget * LAYERS * KV_HEADS


def entries(selection: PromptSelection) -> int:
    """Entries of all KV heads of all layers."""
    return sum(len(head) for heads in kept_rows(selection) for head in heads)


def kept_rows(selection: PromptSelection) -> list[list[list[int]]]:
    """Positions that stay: layer, KV head, ascending."""
    everything = torch.arange(selection.bound.prompt.tokens).expand(1, 1, -1)
    kept = [everything if each is None else each for each in selection.kept]
    heads = [each[0].tolist() * (KV_HEADS // each.shape[1]) for each in kept]
    return [[[at for at in row if at >= 0] for row in rows] for rows in heads]


def positions_of(layer: Any) -> list[list[int]]:
    """Text positions that each head of a layer of a cache keeps; one list if all keep the same."""
    return [[at for at in head if at >= 0] for head in layer.positions[0].tolist()]


def run(selection: PromptSelection, constant: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        selection.observe(drawn_states(selection.bound, layer, generator, constant=constant))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("windowkv", "compresskv")])
def test_a_small_budget_keeps_the_end_of_a_long_question(name: str) -> None:
    """Half of the budget, or the paper's window; the rest of the question is lost, it does not compete with the text."""
    paper = POLICIES[name].published
    for budget in (paper + 1, 2 * paper + 6, 56):
        selection = PromptSelection(bind(f"{name}:observe=question:sinks=1", 100, LAYERS, budget, asking(100, 40, 5)))
        run(selection)
        recent = min(40, max(paper, budget // 2), budget - 1)
        for heads in kept_rows(selection):
            for head in heads:
                assert [at for at in head if at >= 60] == list(range(100 - recent, 100))


def test_the_question_looks_around_protected_spans() -> None:
    """What looks is the whole question, protected or not; what is protected stays and takes nothing from the others."""
    for spec in SPECS:
        made, task = decided(with_option(spec, "observe=question"), LAYERS), asking()
        info = wk.PromptInfo(TOKENS, LAYERS, 50, task, keep=((20, 24), (50, 52)))
        bound = made.bind(bind(spec, TOKENS, LAYERS, 50, task).model, info)
        assert looking(bound) == range(TOKENS - QUESTION, TOKENS - TAIL)
        selection = PromptSelection(bound)
        run(selection)
        assert entries(selection) == 50 * LAYERS * KV_HEADS
        for heads in kept_rows(selection):
            for head in heads:
                assert {20, 21, 22, 23, 50, 51, *range(TOKENS - QUESTION, TOKENS)} <= set(head)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("ceiling", [None, 120])
def test_the_question_looks_at_a_prompt_in_chunks(name: str, ceiling: int | None, llama: PreTrainedModel) -> None:
    """Without a ceiling the same stays as of a prompt read at once; with one, the question is found among what is left."""
    spec = f"{name}:observe=question" + (f":profile={PROFILES}" if POLICIES[name].needs_profile else "")
    kept: list[Any] = []
    for chunk in (None, 64):
        cache = wk.CompactCache(llama, spec, 60, task=asking(200, 20, 6))
        wk.prefill(llama, prompt(200), cache, **({} if chunk is None else {"chunk": chunk, "ceiling": ceiling}))
        kept.append([positions_of(layer) for layer in cache.compact_layers])
        assert sum(cache.report.kept_entries[0]) == 60 * len(cache.compact_layers)
        assert all({*range(180, 200)} <= {*head} for layer in kept[-1] for head in layer)
    if ceiling is None:
        assert kept[0] == kept[1]


def test_a_tokenizer_tells_where_the_question_is(llama: PreTrainedModel) -> None:
    """compress() reads the structure for a policy that looks from the question, and does not for another."""
    tokenizer = ChatLetters()
    text = "".join("the key of room seven is blue. "[at % 31] for at in range(70)) + "\nwho has the key?"
    messages = [{"role": "user", "content": text}]
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]])
    place = read_structure(tokenizer, ids[0].tolist())
    kept = {}
    for spec in ("snapkv", "snapkv:preset=paper", "snapkv:observe=32"):
        with wk.compress(llama, spec, 40, tokenizer=tokenizer), torch.no_grad():
            cache = llama(ids, use_cache=True).past_key_values
        kept[spec] = [positions_of(layer) for layer in cache.compact_layers]
    asked = wk.CompactCache(llama, "snapkv", 40, task=TaskProfile(structure=place))
    wk.prefill(llama, ids, asked)
    assert kept["snapkv"] == [positions_of(layer) for layer in asked.compact_layers]
    assert kept["snapkv:preset=paper"] == kept["snapkv:observe=32"] != kept["snapkv"]
