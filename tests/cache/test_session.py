"""The session of a prompt: what it tells the policy and the layers, the share of the scores, and rules of a policy's own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.batch import BATCH_LENGTHS, padded
from support.cases import Case
from support.chunks import CEILING, CHUNK, TOKENS
from support.decode_reference import slow_logits
from support.models import PROMPT, prompt
from support.reference import compact_logits, positions, same_positions
from winnowkv.cache.generated import DECODE_BLOCK
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.cache.stacked import stack
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.chunk_eviction import ChunkEviction
from winnowkv.policies.decode_eviction import DecodeEviction
from winnowkv.policies.parts import Allocator, LayerStates, QueryFreeScorer, Scorer

LIMIT = 64  # the decode budget


# Rules of a policy's own: the newest entries stay, of what was generated and between chunks


class ByPosition(QueryFreeScorer):
    """Later is better."""

    def score(self, states: LayerStates) -> Tensor:
        context = states.keys.shape[2] - self.window
        return torch.arange(context, dtype=torch.float32).expand(1, 1, -1)


@dataclass(frozen=True)
class NewestGenerated(DecodeEviction):
    """Of the tokens after the prompt the newest."""

    def select(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, valid: Tensor | None, budget: int) -> Tensor:
        assert queries.shape[2] == self.observe
        assert values.shape == keys.shape
        entries = keys.shape[2]
        return torch.arange(entries - budget, entries).expand(*keys.shape[:2], -1)


class NewestHeld(ChunkEviction):
    """The first token and the newest, whatever any query attends to."""

    samples, least = 4, 2

    def scorer(self, held: int) -> Scorer:
        return ByPosition(held)

    def select(self, scores: Tensor, held: Tensor, entries: int) -> Tensor:
        assert scores.shape == (1, 1, len(held))
        assert bool((held.diff() > 0).all())
        return torch.tensor([0, *range(len(held) - entries + 1, len(held))])


@dataclass(frozen=True, kw_only=True)
class Newest(TokenPolicy):
    """Keeps the newest entries by rules of its own."""

    name: ClassVar[str] = "newest"
    source: ClassVar[str] = "a test"
    scope: ClassVar[str] = "tokens"
    observe: int = 1

    def scorer(self, model: wk.ModelInfo, prompt: wk.PromptInfo) -> Scorer:
        return ByPosition(prompt.tokens, self.observe)

    def chunk_eviction(self, model: wk.ModelInfo) -> ChunkEviction:
        return NewestHeld()

    def decode_eviction(self) -> DecodeEviction:
        return NewestGenerated(observe=8, recent=8)


NEWEST = Newest()


@pytest.mark.parametrize("policy", [NEWEST, wk.criticalkv(NEWEST)], ids=["itself", "wrapped"])
def test_a_policys_own_decode_eviction_is_used(llama: PreTrainedModel, policy: wk.Policy) -> None:
    """Against masked attention over everything, in which the newest generated tokens stay."""
    cache = wk.CompactCache(llama, policy, 20, decode_budget=LIMIT)
    ids, sizes = prompt(PROMPT), [1] * (LIMIT + 2 * DECODE_BLOCK + 5)
    more = prompt(len(sizes), seed=1)
    logits = compact_logits(llama, cache, ids, [*more.split(1, dim=1)])
    assert cache.report.decode_entries == LIMIT + 5

    def newest(received: Tensor) -> Tensor:
        return torch.arange(len(received)).float()

    expected = slow_logits(llama, ids, more, sizes, positions(cache), LIMIT, choose=newest)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_an_own_rule_says_how_many_generated_tokens_are_whole(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, NEWEST, 20, decode_budget=LIMIT)
    compact_logits(llama, cache, prompt(PROMPT), [prompt(LIMIT + DECODE_BLOCK, seed=1)])
    with pytest.raises(wk.CacheError, match="only the last 8 tokens are whole"):
        cache.crop(-9)
    cache.crop(-8)


def test_an_own_rule_goes_with_stack_and_replay(llama: PreTrainedModel) -> None:
    alone = wk.CompactCache(llama, NEWEST, 20, decode_budget=LIMIT)
    logits = prefill(llama, prompt(PROMPT), alone)
    recorded = wk.CompactCache(llama, "full", 1, record=PROMPT, decode_budget=LIMIT)
    prefill(llama, prompt(PROMPT), recorded)
    replayed, stacked = recorded.replay(NEWEST, 20), stack([alone, alone])
    assert {layer.decode_eviction for layer in replayed.compact_layers + stacked.compact_layers} == {NEWEST.decode_eviction()}
    expected = list(greedy(llama, alone, logits, 150))
    assert list(greedy(llama, replayed, logits, 150)) == expected
    rows = [logits.repeat(2, 1).argmax(-1)]
    for seen in range(PROMPT, PROMPT + 149):
        rows.append(extend(llama, stacked, rows[-1][:, None], [seen] * 2)[:, -1].argmax(-1))
    assert torch.stack(rows, 1).tolist() == [expected] * 2


def test_a_cache_with_a_rule_that_a_file_cannot_hold_is_not_saved(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = wk.CompactCache(llama, NEWEST, 20, decode_budget=LIMIT)
    logits = prefill(llama, prompt(PROMPT), cache)
    with pytest.raises(wk.CacheError, match=r"own rule \(NewestGenerated\) cannot be saved"):
        wk.save_cache(cache, llama, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    # Without a decode budget the rule is not used, and nothing stands in the way.
    cache = wk.CompactCache(llama, NEWEST, 20)
    prefill(llama, prompt(PROMPT), cache)
    wk.save_cache(cache, llama, tmp_path / "cache")
    loaded = wk.load_cache(tmp_path / "cache", llama)
    assert list(greedy(llama, loaded, logits, 12)) == list(greedy(llama, cache, logits, 12))


@pytest.mark.parametrize("policy", [NEWEST, wk.chunkkv(NEWEST, chunk=1)], ids=["itself", "wrapped"])
def test_a_policys_own_chunk_eviction_is_used(llama: PreTrainedModel, policy: wk.Policy) -> None:
    cache = wk.CompactCache(llama, policy, 20)
    sizes, seen = cache.begin_chunks(TOKENS, CHUNK, CEILING), 0
    for part in prompt(TOKENS).split(sizes, 1):
        with torch.no_grad():
            llama(input_ids=part, past_key_values=cache)
        cache.end_chunk()
        seen += part.shape[1]
        if CEILING < seen < TOKENS:
            expected = [0, *range(seen - CEILING + 1, seen)]
            assert [layer.positions[0][0].tolist() for layer in cache.compact_layers] == [expected] * 5
    assert [layer.positions[0][0].tolist() for layer in cache.compact_layers] == [[*range(TOKENS - 20, TOKENS)]] * 5


# What the policy is shown


@dataclass(frozen=True, kw_only=True)
class Watched(TokenPolicy):
    """Scores by position; notes what it was shown."""

    name: ClassVar[str] = "watched"
    source: ClassVar[str] = "a test"
    scope: ClassVar[str] = "tokens"
    observe: int = 3
    shown: list[LayerStates] = field(default_factory=list)

    def scorer(self, model: wk.ModelInfo, prompt: wk.PromptInfo) -> Scorer:
        return WatchedScorer(prompt.tokens, self.observe, shown=self.shown)


@dataclass(frozen=True, kw_only=True)
class WatchedScorer(Scorer):
    shown: list[LayerStates]

    def query_positions(self) -> Tensor:
        return torch.tensor([0, 5, self.tokens - 1])

    def score(self, states: LayerStates) -> Tensor:
        self.shown.append(
            replace(states, queries=states.queries.clone(), keys=states.keys.clone(), values=states.values.clone())
        )
        return torch.arange(states.keys.shape[2] - self.window, dtype=torch.float32).expand(1, 1, -1)


def test_each_layer_is_shown_once_in_order_with_the_queries_that_were_asked_for(llama: PreTrainedModel) -> None:
    policy, recorded = Watched(), wk.CompactCache(llama, "full", 1, record=PROMPT)
    prefill(llama, prompt(PROMPT), wk.CompactCache(llama, policy, 20))
    prefill(llama, prompt(PROMPT), recorded)
    assert [states.layer for states in policy.shown] == list(range(5))
    for states, (queries, scale), layer in zip(policy.shown, recorded.recording.layers, recorded.compact_layers, strict=True):
        assert states.scale == scale
        assert states.projection is None
        assert torch.equal(states.queries, queries[:, :, [0, 5, PROMPT - 1]])
        for mine, theirs in zip((states.keys, states.values), layer.entries_in_use(), strict=True):
            assert torch.equal(mine, theirs)


def test_rows_of_a_padded_batch_are_shown_one_by_one_without_padding(llama: PreTrainedModel) -> None:
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    together, singles = Watched(), [Watched() for _ in rows]
    ids, mask = padded(rows)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        llama(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=wk.CompactCache(llama, together, 20))
    for row, single in zip(rows, singles, strict=True):
        prefill(llama, row, wk.CompactCache(llama, single, 20))
    assert [states.layer for states in together.shown] == [layer for layer in range(5) for _ in rows]
    for at, states in enumerate(together.shown):
        alone = singles[at % 3].shown[at // 3]
        for name in ("queries", "keys", "values"):
            torch.testing.assert_close(getattr(states, name), getattr(alone, name), rtol=0, atol=1e-4)


def test_a_replay_and_chunks_show_the_same_as_a_live_prompt(llama: PreTrainedModel) -> None:
    live, replayed, chunked = Watched(), Watched(), Watched()
    prefill(llama, prompt(TOKENS), wk.CompactCache(llama, live, 20))
    recorded = wk.CompactCache(llama, "full", 1, record=TOKENS)
    prefill(llama, prompt(TOKENS), recorded)
    recorded.replay(replayed, 20)
    prefill(llama, prompt(TOKENS), wk.CompactCache(llama, chunked, 20), chunk=CHUNK)
    for other in (replayed, chunked):
        assert [states.layer for states in other.shown] == list(range(5))
        for mine, theirs in zip(other.shown, live.shown, strict=True):
            for name in ("queries", "keys", "values"):
                torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=1e-4)


def test_a_projection_is_shown_to_those_that_ask_for_it(llama: PreTrainedModel) -> None:
    policy = Watched()
    prefill(llama, prompt(PROMPT), wk.CompactCache(llama, wk.criticalkv(policy), 20))
    for states, layer in zip(policy.shown, llama.model.layers, strict=True):
        weight = layer.self_attn.o_proj.weight
        assert torch.equal(states.projection, weight.t().reshape(8, 8, 64))


# The share of the scores


def test_the_kept_share_of_the_scores_is_told_only_if_they_are_kept(llama: PreTrainedModel, evicting: Case) -> None:
    with_scores, without = (wk.CompactCache(llama, **evicting.settings, keep_scores=keep) for keep in (True, False))
    for cache in (with_scores, without):
        prefill(llama, prompt(PROMPT), cache)
    assert same_positions(positions(with_scores), positions(without))
    assert without.report.kept_mass == []
    (mass,) = with_scores.report.kept_mass
    assert 0 <= mass < 1
    sinks, shares = with_scores._choices.selections[0].bound.parts.selector.sinks, []
    for layer in range(5):
        told = [with_scores.explain(layer, token) for token in range(PROMPT)]
        if told[0][0].reason == "everything kept":
            shares += [1.0, 1.0]
            continue
        for head in range(2):
            counted = [each[head] for each in told[sinks:] if each[head].score is not None]
            total = sum(one.score for one in counted)
            shares.append(sum(one.score for one in counted if one.kept) / total if total else 1.0)
    if evicting.name != "h2o" and "h2o" not in evicting.spec:  # whose recent tokens are scored, too, and do not compete
        assert mass == pytest.approx(
            sum(shares) / len(shares), abs=0.02 if evicting.name == "windowkv" else 1e-4
        )  # windowkv scores by query heads, the mean of which is told


def test_what_keeps_everything_has_the_whole_share(llama: PreTrainedModel) -> None:
    for spec, budget in (("full", 1), ("snapkv:observe=4", 72)):
        cache = wk.CompactCache(llama, spec, budget)
        prefill(llama, prompt(PROMPT), cache)
        assert cache.report.kept_mass == [1.0]


def test_a_policy_whose_layers_miss_the_budget_is_named(llama: PreTrainedModel) -> None:
    class Greedy(Allocator):
        def prefill_limits(self) -> list[int]:
            return [self.prompt.budget + 1] * self.prompt.layers

    @dataclass(frozen=True, kw_only=True)
    class TooMuch(Newest):
        name: ClassVar[str] = "too-much"

        def allocator(self, model: wk.ModelInfo, prompt: wk.PromptInfo) -> Allocator:
            return Greedy(prompt)

    with pytest.raises(wk.PolicyError, match="too-much: its layers end with 105 entries, the budget is 100"):
        prefill(llama, prompt(PROMPT), wk.CompactCache(llama, TooMuch(), 20))


def test_a_session_ends_with_its_prompt(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=4", 20)
    first = cache.session
    logits = prefill(llama, prompt(PROMPT), cache)
    assert first is not None
    assert cache.session is None
    list(greedy(llama, cache, logits, 3))
    cache.reset()
    assert cache.session not in (None, first)
