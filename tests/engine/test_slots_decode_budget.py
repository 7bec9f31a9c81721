"""Rows with a decode budget decode in slots as their own caches do alone, and take no more memory than was said."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import winnowkv as wk
from support.families import FAMILIES
from support.models import DEVICE, hybrid, prompt
from support.slots import assert_same
from winnowkv.cache.forks import fork
from winnowkv.cache.generated import DECODE_BLOCK
from winnowkv.cache.reading import extend, greedy, prefill
from winnowkv.engine.cuda_graphs import Recorded
from winnowkv.engine.slot_row import DecodeLimit
from winnowkv.engine.slots import Slots
from winnowkv.engine.step import greedy_rows
from winnowkv.policies.decode_eviction import DecodeEviction

SNAP, RAGGED = "snapkv:observe=4:kernel=3", "adakv:floor=0:of=snapkv:observe=4:sinks=2"
LIMIT = DecodeLimit(64, DecodeEviction())
EIGHT = DecodeEviction(observe=8, recent=8)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"
)


@dataclass(frozen=True)
class Asked:
    """One request: a prompt, tokens that are read at once after it, and ``steps`` tokens that are read one by one in slots."""

    tokens: int
    steps: int
    policy: str = SNAP
    limit: int | None = 64
    turn: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def read(self, model: PreTrainedModel, seed: int) -> wk.CompactCache:
        """Its cache, a fork if it has a turn."""
        cache = wk.CompactCache(model, self.policy, 16, decode_budget=self.limit)
        if self.more:  # as a policy of one's own has it
            for layer in cache.compact_layers:
                layer.decode_eviction = self.more["eviction"]
        prefill(model, prompt(self.tokens, seed=seed), cache)
        if self.turn:
            cache = fork(cache)
            extend(model, cache, prompt(self.turn, seed=40 + seed), [self.tokens])
        return cache

    def new(self, seed: int) -> Tensor:
        """The tokens that are read one by one, ``[steps]``."""
        return prompt(self.steps, seed=20 + seed)[0]


# Rows that join and leave while others go on: several budgets and none, ragged heads, a rule of a policy's own, and turns that
# end before, within and at the end of a block, of which the last ones bring queries along.
REQUESTS = (
    Asked(40, 200, RAGGED),
    Asked(19, 60, "full", None),
    Asked(46, 146, SNAP, 80, more={"eviction": EIGHT}),
    Asked(30, 70, turn=110),
    Asked(33, 90, turn=200),
    Asked(21, 66, limit=None),
    Asked(25, 20, "full", turn=63),
)


def alone(model: PreTrainedModel, seed: int, asked: Asked) -> Tensor:
    """The logits after each of a request's tokens, ``[steps, vocabulary]``: its own cache."""
    cache, seen = asked.read(model, seed), asked.tokens + asked.turn
    tokens = asked.new(seed).split(1)
    steps = [extend(model, cache, token[None], [seen + at])[0] for at, token in enumerate(tokens)]
    return torch.cat(steps)


def together(model: PreTrainedModel, slots: Slots, requests: tuple[Asked, ...], rows: int, room: int = 500) -> list[Tensor]:
    """The same in slots, up to ``rows`` at a time."""
    waiting, active = list(range(len(requests))), list[int]()
    logits: list[list[Tensor]] = [[] for _ in requests]
    while waiting or active:
        while waiting and len(active) < rows:
            active.append(waiting.pop(0))
            slots.place(requests[active[-1]].read(model, active[-1]), room)
        newest = torch.stack([requests[one].new(one)[len(logits[one])] for one in active])
        for one, line in zip(active, slots.step(newest), strict=True):
            logits[one].append(line)
        for at in reversed(range(len(active))):
            if len(logits[active[at]]) == requests[active[at]].steps:
                slots.drop(at)
                active[at] = active[-1]
                active.pop()
    return [torch.stack(lines) for lines in logits]


def family(name: str) -> PreTrainedModel:
    if not FAMILIES[name].exists:
        pytest.skip(f"this release of transformers has no {name}")
    return FAMILIES[name].build()


@pytest.mark.parametrize("name", ["Phi", "Gemma 2", "gpt-oss", "Gemma 4 text, shared KV"])
def test_rows_decode_as_alone_whatever_the_model(name: str) -> None:
    """Grouped heads and none, sliding windows between, softcapped logits, sinks, layers that read an earlier one's keys."""
    model, some = family(name), REQUESTS[1:4]
    expected = [alone(model, seed, asked) for seed, asked in enumerate(some)]
    assert_same(together(model, Slots(model), some, 3), expected)


def test_rows_decode_as_alone(llama: PreTrainedModel) -> None:
    expected = [alone(llama, seed, asked) for seed, asked in enumerate(REQUESTS)]
    slots = Slots(llama)
    assert_same(together(llama, slots, REQUESTS, 4, room=6), expected)
    assert slots.held_bytes == 0


def test_what_is_evicted_shows(llama: PreTrainedModel) -> None:
    """Another choice, and none, must give other logits, or the laws above would prove little."""
    asked, other = Asked(46, 160, SNAP, 80, more={"eviction": EIGHT}), Asked(46, 160, SNAP, 80)
    expected, full = alone(llama, 0, asked), alone(llama, 0, Asked(46, 160, SNAP, None))
    (got,) = together(llama, Slots(llama), (other,), 1)
    evicted = 80 + DECODE_BLOCK
    assert_same([got[:evicted]], [expected[:evicted]])
    assert (got[evicted:] - expected[evicted:]).abs().max() > 1e-3
    assert (full[evicted:] - expected[evicted:]).abs().max() > 1e-3


def test_a_model_with_sliding_windows_keeps_its_rings() -> None:
    model, some = hybrid(), REQUESTS[1:4]
    expected = [alone(model, seed, asked) for seed, asked in enumerate(some)]
    slots = Slots(model)
    assert_same(together(model, slots, some, 2), expected)
    slots.place(some[1].read(model, 1), 500)
    assert [layer.queries is None for layer in slots.layers] == [layer.sliding_window is not None for layer in slots.layers]


def test_choices_of_one_prompt_evict_by_their_own_queries(llama: PreTrainedModel) -> None:
    asked, slots, seeds = REQUESTS[3], Slots(llama), (3, 5, 6)
    slots.place(asked.read(llama, 3), 500, rows=3)
    lines = []
    for at in range(asked.steps):
        lines.append(slots.step(torch.stack([asked.new(seed)[at] for seed in seeds])))
    for row, seed in enumerate(seeds):
        cache = asked.read(llama, 3)
        expected = [
            extend(llama, cache, token[None], [asked.tokens + asked.turn + at])[0]
            for at, token in enumerate(asked.new(seed).split(1))
        ]
        assert_same([torch.stack(lines)[:, row]], [torch.cat(expected)])


def test_greedy_rows_hold_a_decode_budget(llama: PreTrainedModel) -> None:
    caches, first, expected = [], [], []
    for row, limit in enumerate((64, None, 80)):
        for answers in (False, True):
            cache = wk.CompactCache(llama, SNAP, 16, decode_budget=limit)
            logits = prefill(llama, prompt(40 + row, seed=row), cache)
            if answers:
                expected.append(list(greedy(llama, cache, logits, 180)))
            else:
                caches.append(cache)
                first.append(logits)
    assert greedy_rows(caches, torch.cat(first), 180, lambda tokens: False) == expected


@pytest.mark.parametrize("limit", [64, None])
def test_an_attention_mask_of_later_tokens_stays(llama: PreTrainedModel, limit: int | None) -> None:
    """Entries of a turn that its mask hid never count, and each head may keep others of them."""
    mask = torch.ones(1, 40 + 90 + 60, dtype=torch.long, device=DEVICE)
    mask[:, 50:80] = 0

    def masked() -> wk.CompactCache:
        cache = Asked(40, 0, limit=limit).read(llama, 0)
        with torch.no_grad():
            llama(input_ids=prompt(90, seed=9), attention_mask=mask[:, :130], past_key_values=cache, use_cache=True)
        return cache

    own, slots = masked(), Slots(llama)
    slots.place(masked(), 500)
    for at, token in enumerate(prompt(60, seed=1)[0].split(1)):
        given = {"attention_mask": mask[:, : 131 + at], "position_ids": torch.tensor([[130 + at]], device=DEVICE)}
        with torch.no_grad():
            expected = llama(input_ids=token[None], past_key_values=own, use_cache=True, **given).logits[0]
        assert_same([slots.step(token)], [expected])


# Memory


@pytest.mark.parametrize("flexible", [None, True, False])
def test_memory_is_flat_and_what_was_said(llama: PreTrainedModel, flexible: bool | None) -> None:
    """Beside a row without a budget, eager or as compiled steps have it."""
    slots = Slots(llama, compile=flexible is not None)
    slots._compiled, slots._flexible = None, bool(flexible)
    short, cache = Asked(19, 0, limit=None).read(llama, 1), Asked(40, 0).read(llama, 0)
    entries = [layer.length for layer in cache.compact_layers]
    slots.place(short, 300)
    said = slots.bytes_with(entries, LIMIT.columns(0, 4000), observe=LIMIT.observe)
    assert said < slots.bytes_with(entries, 4000)
    slots.place(cache, 4000)
    held = []
    for token in prompt(300, seed=2)[0].split(1):
        slots.step(torch.cat([token, token]))
        held.append(slots.held_bytes)
        parts = [part for layer in slots.layers for part in (layer.keys, layer.values, layer.valid, layer.queries)]
        assert held[-1] == sum(part.untyped_storage().nbytes() for part in parts)
    flags = sum(layer.keys.shape[:3].numel() for layer in slots.layers)
    assert set(held) == {held[0]}
    assert said - flags <= held[0] <= said
    assert slots.positions == [19 + 300, 40 + 300]
    assert slots.held == [300, 64 + (300 - 128) % DECODE_BLOCK]
    slots.drop(1)
    assert all(layer.queries is None for layer in slots.layers), "no row has a decode budget, queries are held still"


def test_a_row_needs_as_many_columns_as_it_holds_at_once(llama: PreTrainedModel) -> None:
    """A block's last entry is attended to before the block goes."""
    slots = Slots(llama)
    for asked, room, wanted in (
        (Asked(40, 0), 4000, 16 + 128),
        (Asked(40, 0), 50, 16 + 50),
        (Asked(40, 0, turn=100), 4000, 16 + 128),
        (Asked(40, 0, turn=100), 5, 16 + 105),
        (Asked(40, 0, limit=None), 4000, 16 + 4000),
    ):
        slots.place(asked.read(llama, 0), room)
        assert {layer.keys.shape[2] for layer in slots.layers} == {wanted}
        slots.drop(0)


def test_room_grows_up_to_the_budget(llama: PreTrainedModel) -> None:
    slots, seen = Slots(llama), []
    slots.place(Asked(40, 0).read(llama, 0), 10)
    for token in prompt(220, seed=2)[0].split(1):
        slots.step(token)
        seen.append(slots.layers[0].keys.shape[2] - 16)
    assert list(dict.fromkeys(seen)) == [10, 74, 128]


# Compiled steps


def recorded(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands for a CUDA graph: plays a step back with the tensors that it was recorded with."""
    output = run()
    return lambda: output.copy_(run()), output


def test_recorded_steps_write_queries_where_each_row_wants_them(llama: PreTrainedModel) -> None:
    """As on a GPU: buffers of fixed shapes, a step that is played back, indices that are filled before each."""
    expected = [alone(llama, seed, asked) for seed, asked in enumerate(REQUESTS[:4])]
    slots = Slots(llama, compile=True)
    slots._compiled, slots._flexible, slots._recorded = llama, False, Recorded(recorded)
    assert_same(together(llama, slots, REQUESTS[:4], 3), expected)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(DEVICE != "cpu", reason="only on the CPU")
def test_compiled_steps_hold_a_decode_budget(llama: PreTrainedModel) -> None:
    torch._dynamo.reset()
    llama.model.layers = llama.model.layers[:2]
    llama.config.num_hidden_layers = 2
    some = REQUESTS[1:5]
    expected = [alone(llama, seed, asked) for seed, asked in enumerate(some)]
    slots = Slots(llama, compile=True)
    counters = torch._dynamo.utils.counters["stats"]
    for observe in (0, 32):
        slots.warm_up(2, 40, 200, observe)
    before = counters["unique_graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(together(llama, slots, some, 2), expected)
    assert counters["unique_graphs"] == before, "two graphs with queries and two without serve all sizes"
