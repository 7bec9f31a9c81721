"""A study hears what the whole attention says, leaves nothing behind, and what stays is chosen by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import DEVICE, hybrid
from support.study import attended
from support.tokenizers import ChatLetters, Letters
from winnowkv.cache.forks import fork
from winnowkv.cache.listening import AGAIN, WRITE, Ear, Teller, again_ids, read_again, weighing, write_about
from winnowkv.cache.study import Study, Studying, fitted, hear, replay_studied, study_text, text_structure, wait_for_study
from winnowkv.errors import CacheError, InputError, UnsupportedModelError
from winnowkv.policies import PromptInfo
from winnowkv.policies.studied import StudiedSentences
from winnowkv.prompt.chat import open_turn, rest_of_turn, text_begin, text_ending
from winnowkv.prompt.structure import Structure
from winnowkv.prompt.task import TaskProfile

TEXT = "The archive of Oakham was founded in 1712.\nIts first keeper wrote the history of the town; it has nine rooms."
BLIND = "winnow:observe=context:samples=16"
LEAN = Study()
SNAPKV = "snapkv:observe=4:kernel=3"


def waiting(
    model: PreTrainedModel, policy: str = SNAPKV, budget: float = 0.4, study: Study = LEAN
) -> tuple[wk.CompactCache, list[int], int]:
    """A cache that holds the text and waits for a study, the text's ids, and where it begins."""
    ids = open_turn(ChatLetters(), TEXT, chat=True)
    cache = wk.CompactCache(model, policy, budget)
    wait_for_study(cache, study, text_structure(ChatLetters(), ids))
    wk.prefill(model, torch.tensor([ids], device=DEVICE), cache)
    return cache, ids, text_begin(ChatLetters(), ids, chat=True)


def states(cache: wk.CompactCache) -> list[tuple[Tensor, Tensor]]:
    return [tuple(part.clone() for part in layer.entries_in_use()) for layer in cache.compact_layers]


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True))


def test_sentences_that_all_heads_keep_are_the_texts_own_if_they_are_known() -> None:
    """Else spans of 16 tokens. A sentence scores its mean over layers and heads, the last one gives its best tokens."""
    structure = Structure(40, 0, 0, (10, 30))
    known = StudiedSentences.of(PromptInfo(40, 2, 20, TaskProfile(structure=structure)), 4, 0.5)
    unknown = [
        StudiedSentences.of(PromptInfo(40, 2, 20, task), 4, 0.5)
        for task in (TaskProfile(), TaskProfile(structure=Structure(41, 0, 0, (10,))))
    ]
    assert known == StudiedSentences((10, 30), 64, 4, 10)
    assert unknown == [StudiedSentences((), 16, 4, 10)] * 2
    assert StudiedSentences.of(PromptInfo(40, 2, 5, TaskProfile()), 4, 0.5).room == 1
    votes = [torch.full((1, 1, 40), 0.1) for _ in range(2)]
    votes[0][..., 4:10] = 0.5
    votes[1][..., [12, 14]] = 2.0  # [10, 30): 2.3 of 20 tokens in the mean of both, more than the last ten, less than [4, 10)
    votes[1][..., 0] = 9.0  # a sink
    assert known.choose(votes, None).tolist() == [[[4, 5, 6, 7, 8, 9, 10, 11, 12, 14]]]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("chunk", [2048, 40])
def test_the_text_read_again_is_heard_as_the_whole_attention_says(model: PreTrainedModel, chunk: int, plus: bool) -> None:
    """In chunks, each over the whole text, with its instruction; by KVzip+ with values and hidden states."""
    cache, ids, begin = waiting(model)
    studying = Studying(cache.looking, len(ids), Study(chunk=chunk))
    cache.looking = studying
    passes = [[*instruction, *part] for instruction, part in again_ids(ChatLetters(), ids, begin, chunk, chat=True)]
    assert len(passes) == (1 if chunk > len(ids) else 3)
    with weighing(cache, studying.heard) if plus else torch.no_grad():
        for one in passes:
            read_again(model, cache, studying.heard, [], one)
    by_layer = [torch.cat(parts, 1) for parts in zip(*(attended(model, ids, one, plus=plus) for one in passes), strict=True)]
    for number, whole in enumerate(by_layer):
        found = studying.evidence(number).again
        assert found.queries == sum(map(len, passes)) == whole.shape[1]
        most = whole.unflatten(0, (found.kv_heads, -1)).amax((1, 2))
        torch.testing.assert_close(found.most[0].double(), most, rtol=1e-3, atol=1e-5)
        if not plus:
            torch.testing.assert_close(found.square[0].double(), whole.square().sum(1), rtol=1e-3, atol=1e-5)


def test_each_chunk_is_repeated_from_the_words_before_it() -> None:
    tokenizer = Letters()
    ids = open_turn(tokenizer, TEXT, chat=False)
    parts = list(again_ids(tokenizer, ids, 0, 40, chat=False))
    said = [tokenizer.decode(instruction) for instruction, _ in parts]
    assert [token for _, chunk in parts for token in chunk] == ids
    assert said[0].strip() == AGAIN
    assert all(TEXT[at - 8 : at].strip() in words for at, words in zip((40, 80), said[1:], strict=True))


def test_what_the_model_writes_is_greedy_and_heard_token_by_token(llama: PreTrainedModel) -> None:
    cache, ids, _ = waiting(llama)
    studying = Studying(cache.looking, len(ids), Study())
    cache.looking = studying
    instruction = rest_of_turn(ChatLetters(), text_ending(ChatLetters(), ids, chat=True), WRITE["facts"], chat=True)
    written = list(write_about(llama, cache, studying.heard, "facts", instruction, 6, frozenset()))
    asked = torch.tensor([[*ids, *instruction]], device=DEVICE)
    plain = llama.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=6)[0, asked.shape[1] :]
    assert written == plain.tolist()
    for number, whole in enumerate(attended(llama, ids, [*instruction, *written])):
        found = studying.heard.found["facts"][number]
        assert found.queries == 6
        torch.testing.assert_close(found.total[0].double(), whole[:, -6:].sum(1), rtol=1e-3, atol=1e-5)


def test_writing_ends_at_an_end_token(llama: PreTrainedModel) -> None:
    cache, ids, _ = waiting(llama)
    studying = Studying(cache.looking, len(ids), Study())
    cache.looking = studying
    first = next(write_about(llama, cache, studying.heard, "facts", ids[:5], 6, frozenset()))
    assert not list(write_about(llama, cache, studying.heard, "summary", ids[:5], 6, frozenset([first])))
    assert "summary" not in studying.heard.found


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_all_of_it_is_taken_back(llama: PreTrainedModel, kind: str) -> None:
    """Also out of sliding windows, which are shorter than what was read."""
    model = llama if kind == "llama" else hybrid()
    cache, ids, begin = waiting(model)
    before, length = states(cache), cache.get_seq_length()
    windows = [layer.keys.clone() for layer in cache.sliding_layers]
    studying = Studying(cache.looking, len(ids), Study())
    cache.looking = studying
    for instruction, chunk in again_ids(ChatLetters(), ids, begin, 2048, chat=True):
        read_again(model, cache, studying.heard, instruction, chunk)
    list(write_about(model, cache, studying.heard, "facts", ids[:5], 4, frozenset()))
    assert same(before, states(cache))
    assert cache.get_seq_length() == length
    assert all(torch.equal(old, layer.keys) for old, layer in zip(windows, cache.sliding_layers, strict=True))


def test_no_query_is_held_unless_values_are_refitted(llama: PreTrainedModel) -> None:
    """Sums and maxima need the same room for any number of queries."""
    sizes = {}
    for policy in (SNAPKV, f"{SNAPKV}:refit=true"):
        for chunk in (2048, 40):
            cache, ids, begin = waiting(llama, policy)
            studying = Studying(cache.looking, len(ids), Study())
            cache.looking = studying
            for instruction, part in again_ids(ChatLetters(), ids, begin, chunk, chat=True):
                read_again(llama, cache, studying.heard, instruction, part, int("refit" in policy))
            sizes[policy, chunk] = studying.heard.held_bytes
    assert sizes[SNAPKV, 2048] == sizes[SNAPKV, 40] == 5 * (2 * 8 + 2) * len(ids) * 4
    assert sizes[f"{SNAPKV}:refit=true", 40] > sizes[SNAPKV, 40]


def test_it_is_over_once_and_then_the_cache_is_like_any_other(llama: PreTrainedModel) -> None:
    cache, ids, begin = waiting(llama, budget=20)
    study_text(cache, ChatLetters(), ids, begin, Study(), chat=True)
    assert cache.looking is None
    assert cache.compression.policy == wk.policy(SNAPKV)
    assert sum(cache.report.kept_entries[0]) == 20 * 5
    with pytest.raises(CacheError, match="nothing that waits for a study"):
        study_text(cache, ChatLetters(), ids, begin, Study(), chat=True)


def test_a_text_that_stays_whole_gives_its_room_back(llama: PreTrainedModel) -> None:
    cache, ids, begin = waiting(llama, budget=1.0)
    before = cache.held_bytes
    study_text(cache, ChatLetters(), ids, begin, Study(), chat=True)
    assert cache.report.held_bytes == cache.held_bytes <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ("again", "poem")}, "the source 'poem' is unknown: it is one of again, summary, facts, questions"),
        ({"sources": ("summary",)}, "sources must have 'again'"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"chunk": 8}, "chunk=8 at least 16"),
        ({"sentences": 1.5}, "sentences=1.5 is a share of the budget: give a number from 0 to 1"),
    ],
)
def test_a_study_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Study(**options)
    with pytest.raises(InputError, match=r"study='long' must be one of lean, full, a wk\.Study, or None"):
        Study.of("long")


def test_chunks_fit_before_the_end_of_the_models_positions(llama: PreTrainedModel) -> None:
    """The tiny models have 1,024."""
    assert fitted(Study(), llama, 100).chunk == 1024 - 100 - 64
    assert fitted(Study(chunk=50), llama, 100).chunk == 50
    with pytest.raises(InputError, match="950 tokens of text leave 74 of the model's 1024 positions, and a study needs 80"):
        fitted(Study(), llama, 950)
    with pytest.raises(InputError, match="a study needs 160"):
        fitted(Study.of("full"), llama, 900)


def test_processes_that_share_heads_are_refused(llama: PreTrainedModel) -> None:
    from dataclasses import replace

    from winnowkv.models.head_group import HeadGroup

    cache = wk.CompactCache(llama, SNAPKV, 20)
    cache.compression = replace(cache.compression, heads=HeadGroup(0, 2))
    with pytest.raises(UnsupportedModelError, match="study= needs all heads of the model in one process"):
        wait_for_study(cache, Study())


@pytest.mark.parametrize("policy", ["kvzip", "kvzip:plus=true", BLIND, f"{BLIND}:equal=true", f"{SNAPKV}:refit=true"])
@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_one_study_of_a_recorded_text_serves_every_policy_and_budget(llama: PreTrainedModel, policy: str, kind: str) -> None:
    """As each would by a study of its own."""
    model, made = llama if kind == "llama" else hybrid(), wk.policy(policy)
    study = Study(("again", "facts"), tokens=4, sentences=0.4)
    if made.needs_study:
        study = Study()
    ids = open_turn(ChatLetters(), TEXT, chat=True)
    begin = text_begin(ChatLetters(), ids, chat=True)
    recorded = wk.CompactCache(model, "full", 1, record=len(ids))
    wk.prefill(model, torch.tensor([ids], device=DEVICE), recorded)
    reading = fork(recorded)
    assert recorded.recording is not None
    ear: Any = Ear(reading.compact_layers, [scale for _, scale in recorded.recording.layers], len(ids))
    reading.heard, options = ear, {"chat": True, "weigh": made.weighs_values, "sample": True, "tell": Teller(None, 0)}
    heard = study if made.needs_study else Study(("again", "summary", "facts"), tokens=4)
    hear(reading, ear, ChatLetters(), ids, begin, heard, **options)
    for budget in (20, 0.5):
        alone, *_ = waiting(model, policy, budget, study)
        study_text(alone, ChatLetters(), ids, begin, study, chat=True)
        shared = replay_studied(recorded, ear, study, policy, budget, text_structure(ChatLetters(), ids))
        assert same(states(alone), states(shared))
        assert alone.report.kept_entries == shared.report.kept_entries
        assert alone.report.refitted == shared.report.refitted
