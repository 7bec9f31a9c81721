"""What attention asks of a cache: any object that answers is served, compact caches and slots among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import winnowkv as wk
from support.batch import padded
from support.models import PROMPT, prompt
from winnowkv.attention.hooks import COMPACT_OFFSET, PADDING, AttentionCache, Observer, tag_states, winnow_attention
from winnowkv.attention.routing import acquire, release
from winnowkv.attention.sdpa import attend
from winnowkv.engine.slots import Slots


class Answers:
    """The least that attention needs: notes what it was asked, and answers as it was told to."""

    def __init__(self, valid: Tensor | None = None, *, watch: bool = True) -> None:
        self.valid, self.watch = valid, watch
        self.asked: list[tuple[Any, ...]] = []

    def valid_entries(self, layer_idx: int, padding: Tensor | None, added: int) -> Tensor | None:
        self.asked.append(("valid", layer_idx, padding, added))
        return self.valid

    def shared(self, layer_idx: int, by: int) -> None:
        self.asked.append(("shared", layer_idx, by))

    def observer(self, layer_idx: int) -> Observer | None:
        self.asked.append(("observer", layer_idx))
        return self.observe if self.watch else None

    def observe(self, queries: Tensor, scale: float) -> None:
        self.asked.append(("observed", queries, scale))


def drawn(queries: int = 3, entries: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, entries, 8, generator=generator)
    return query, key, value


def asked_of(cache: AttentionCache, mask: Tensor | None = None, **options: Any) -> Tensor:
    """One call of the attention socket with keys of this cache."""
    query, key, value = drawn()
    output, weights = winnow_attention(nn.Identity(), query, *tag_states(key[:], value[:], cache, 5), mask, **options)
    assert weights is None
    return output


@pytest.mark.parametrize("kind", [wk.CompactCache, Slots, Answers])
def test_compact_caches_and_slots_answer_what_attention_asks(kind: type) -> None:
    asked = [name for name in vars(AttentionCache) if not name.startswith("_")]
    assert asked == ["valid_entries", "shared", "observer"]
    for name in asked:
        theirs, mine = (list(inspect.signature(getattr(each, name)).parameters) for each in (AttentionCache, kind))
        assert len(mine) == len(theirs), f"{kind.__name__}.{name} takes {mine}, attention passes {theirs}"


def test_a_cache_is_asked_for_valid_entries_before_attention_and_shown_the_queries_after_it() -> None:
    cache, mask = Answers(), torch.ones(2, 1, 1, 9, dtype=PADDING)
    output = asked_of(cache, mask, scaling=0.3)
    query, key, value = drawn()
    torch.testing.assert_close(output, attend(query, key, value, 0.3).transpose(1, 2))
    valid, observer, (name, queries, scale) = cache.asked
    assert (valid[0], valid[1], valid[3]) == ("valid", 5, 3)
    assert torch.equal(valid[2], torch.ones(2, 9, dtype=torch.bool))
    assert observer == ("observer", 5)
    assert (name, scale) == ("observed", 0.3)
    assert torch.equal(queries, query)


def test_without_an_observer_nothing_is_shown_and_the_usual_scale_is_taken() -> None:
    cache = Answers(watch=False)
    output = asked_of(cache)
    query, key, value = drawn()
    torch.testing.assert_close(output, attend(query, key, value, 8**-0.5).transpose(1, 2))
    assert [name for name, *_ in cache.asked] == ["valid", "observer"]


def test_entries_that_a_cache_does_not_count_are_not_attended_to() -> None:
    valid = torch.ones(2, 2, 9, dtype=torch.bool)
    valid[0, 1, :4] = valid[1, 0, 2] = False
    output = asked_of(Answers(valid))
    query, key, value = drawn()
    torch.testing.assert_close(output, attend(query, key, value, 8**-0.5, valid).transpose(1, 2))
    assert not torch.allclose(output, asked_of(Answers()))


def test_keys_without_a_tag_go_to_the_frameworks_own_attention() -> None:
    query, key, value = drawn(9)
    module = nn.Identity()
    module.num_key_value_groups, module.is_causal = 2, True
    output, _ = winnow_attention(module, query, key, value, None)
    torch.testing.assert_close(output, attend(query, key, value, 8**-0.5).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_tag_is_on_what_was_returned_and_not_on_the_storage() -> None:
    key = drawn()[1]
    tagged, _ = tag_states(key[:], key[:], Answers(), 0)
    assert tagged.data_ptr() == key.data_ptr()
    with pytest.raises(wk.InputError, match="2D attention_mask"):
        winnow_attention(nn.Identity(), drawn()[0], tagged, tagged, torch.ones(1, 1, 3, 9))
    assert not any(name.startswith("_winnow") for name in vars(key))


class Third(DynamicCache):
    """A cache of another kind that comes through our attention: holds everything, counts padding itself."""

    def __init__(self, watch: Callable[[int, Tensor], None] | None, config: Any) -> None:
        super().__init__(config=config)
        self.watch = watch

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return tag_states(keys[:], values[:], self, layer_idx)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return super().get_mask_sizes(*args, **kwargs)[0], COMPACT_OFFSET

    def valid_entries(self, layer_idx: int, padding: Tensor | None, added: int) -> Tensor | None:
        return None if padding is None else padding.bool()[:, None]

    def observer(self, layer_idx: int) -> Observer | None:
        watch = self.watch
        return None if watch is None else lambda queries, scale: watch(layer_idx, queries)


@pytest.mark.parametrize("watched", [True, False])
def test_a_third_kind_of_cache_is_served_by_a_routed_model(model: PreTrainedModel, watched: bool) -> None:
    ids, mask = padded([prompt(PROMPT), prompt(50, seed=1)])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    seen: list[tuple[int, int]] = []
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        routing = acquire(model)
        try:
            cache = Third((lambda layer, queries: seen.append((layer, queries.shape[2]))) if watched else None, model.config)
            logits = [
                model(
                    input_ids=ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=places[:, part],
                    past_key_values=cache,
                ).logits
                for part in (slice(0, 60), slice(60, 71), slice(71, PROMPT))
            ]
        finally:
            release(routing)
    torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    layers = range(model.config.num_hidden_layers)
    assert seen == ([(layer, tokens) for tokens in (60, 11, 1) for layer in layers] if watched else [])
