"""Handoff of a prompt that vLLM reads: what is heard in its worker becomes the context that our own cache would give.

vLLM is not here. A prompt's states are those of a tiny model's recorded prefill, handed out as a worker would see them: in
passes, between the tokens of other requests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import winnowkv as wk
from support.models import TINY, WINDOW, hybrid, prompt, tiny_model
from winnowkv.contexts.flat import FlatStates, context_rotation, flat_states
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import BudgetError, CacheError, InputError, PolicyError, UnsupportedModelError
from winnowkv.integrations.vllm.choosing import weightless
from winnowkv.integrations.vllm.handoff import Asked, Handoff, HandoffPass, HandoffScheduling, Tickets, go_on
from winnowkv.integrations.vllm.listening import HeardLayer
from winnowkv.integrations.vllm.recording import Recorder, rows_of

TOKENS, BLOCK = 72, 8
BLOCKS = (5, 2, 11, 7, 3, 20, 4, 9, 14)  # of the request, in the order of its tokens
SNAP = "snapkv:observe=8:kernel=3"
POLICIES = (SNAP, "keydiff", "knorm", "streaming", "tova", "h2o", "random", "full")
GIB = 1 << 30
States = tuple[Tensor, Tensor, Tensor]  # queries, keys, values [S, heads, D]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A tiny model with 5 layers."""
    made = tiny_model("llama")
    made.config.architectures = ["LlamaForCausalLM"]
    return made


@pytest.fixture(scope="module")
def read(model: PreTrainedModel) -> tuple[list[States], float]:
    """All queries, keys and values of a prompt, by layer, and what attention multiplies its logits by."""
    cache = wk.CompactCache(model, "full", record=TOKENS)
    model(prompt(TOKENS), past_key_values=cache)
    assert cache.recording is not None
    states = [
        (queries[0].transpose(0, 1), layer.keys[0, :, :TOKENS].transpose(0, 1), layer.values[0, :, :TOKENS].transpose(0, 1))
        for (queries, _), layer in zip(cache.recording.layers, cache.compact_layers, strict=True)
    ]
    return states, cache.recording.layers[0][1]


def ours(model: PreTrainedModel, policy: str, budget: int | float) -> FlatStates:
    """The entries that our own cache keeps of the same prompt."""
    cache = wk.CompactCache(model, policy, budget)
    model(prompt(TOKENS), past_key_values=cache)
    return flat_states(cache)


def passes(asked: Asked, *sizes: int, start: int = 0, ticket: str = "t", request: str = "r") -> list[HandoffPass]:
    """The passes of a prompt that comes in chunks of these sizes."""
    found = []
    for count in sizes:
        ids = tuple(prompt(TOKENS)[0].tolist()) if start + count == TOKENS else ()
        found.append(HandoffPass(request, ticket, asked, TOKENS, start, count, BLOCKS, BLOCK, ids))
        start += count
    return found


def show(recorder: Recorder, read: tuple[list[States], float], step: HandoffPass, *, seed: int = 0) -> None:
    """One forward pass of a worker: the request's tokens of this pass, those of others around them, padding after all."""
    drawn = torch.Generator().manual_seed(seed)
    recorder.begin([step])
    for number, states in enumerate(read[0]):
        others = [torch.randn(5, *part.shape[1:], generator=drawn) for part in states]
        rows = [torch.cat([other[:3], part[step.start : step.end], other]) for part, other in zip(states, others, strict=True)]
        slots = torch.tensor([800, 801, 802, *step.slots(), 900, 901, -1, -1, -1])
        recorder.hear(f"layer.{number}", *rows, slots)
    recorder.finish()


def recorder_of(model: PreTrainedModel, read: tuple[list[States], float], store: ContextStore, limit: int = GIB) -> Recorder:
    """One that hears all layers of a model."""
    made = Recorder(model.config, store, limit)
    made.layers = {f"layer.{number}": HeardLayer(number, read[1]) for number in range(len(read[0]))}
    return made


def answer(store: ContextStore, ticket: str = "t") -> dict[str, Any]:
    """What a worker left."""
    found = Tickets(store).take(ticket)
    assert found is not None
    return found


def close(found: FlatStates, expected: FlatStates) -> bool:
    """Whether two contexts are the same."""
    same = found.seen == expected.seen and found.keys.shape == expected.keys.shape
    return same and torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)


@pytest.mark.parametrize("sizes", [(TOKENS,), (30, 42), (8, 8, 8, 47, 1)], ids=["whole", "two", "five"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_handed_off_is_what_our_own_cache_keeps(
    model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path, policy: str, sizes: tuple[int, ...]
) -> None:
    store = ContextStore(tmp_path)
    recorder = recorder_of(model, read, store)
    for step in passes(Asked(policy=policy, budget=24), *sizes):
        show(recorder, read, step)
    found = answer(store)
    expected = ours(model, policy, 24)
    assert close(store.states(found["winnow_context"]), expected)
    assert (found["kept"], found["seen"]) == (expected.kept, TOKENS)
    assert store.context(found["winnow_context"]).tokens == tuple(prompt(TOKENS)[0].tolist())
    assert recorder.held_bytes == 0


def test_a_known_question_looks(model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path) -> None:
    store, task = ContextStore(tmp_path), Asked(question=20, tail=4).task(TOKENS)
    show(recorder_of(model, read, store), read, passes(Asked(budget=40, question=20, tail=4), TOKENS)[0])
    cache = wk.CompactCache(model, "snapkv", 40, task=task)
    model(prompt(TOKENS), past_key_values=cache)
    found = store.states(answer(store)["winnow_context"])
    assert close(found, flat_states(cache))
    assert not close(found, ours(model, "snapkv", 40))


@pytest.mark.parametrize("sizes", [(TOKENS,), (30, 42), (60, 2, 10)], ids=["whole", "two", "inside the window"])
def test_layers_that_slide_keep_their_last_tokens(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    model, store = hybrid(), ContextStore(tmp_path)
    model.config.architectures = ["Gemma3ForCausalLM"]
    whole = wk.CompactCache(model, "full", record=TOKENS)
    model(prompt(TOKENS), past_key_values=whole)
    assert whole.recording is not None
    queries = iter(whole.recording.layers)
    states, layers = [], {}
    for number, layer in enumerate(whole.layers):
        slides = layer in whole.sliding_layers
        keys, values = layer.keys[0, :, :TOKENS].transpose(0, 1), layer.values[0, :, :TOKENS].transpose(0, 1)
        if slides:  # what was before its window is not seen
            keys, values = (torch.cat([torch.randn(TOKENS - len(part), *part.shape[1:]), part]) for part in (keys, values))
        asked, scale = (torch.randn(TOKENS, 8, 16)[None].transpose(1, 2), 1.0) if slides else next(queries)
        states.append((asked[0].transpose(0, 1), keys, values))
        layers[f"layer.{number}"] = HeardLayer(number, scale, WINDOW if slides else None)
    recorder = Recorder(model.config, store, GIB)
    recorder.layers = layers
    for step in passes(Asked(policy=SNAP, budget=24), *sizes):
        show(recorder, (states, 1.0), step)
    assert close(store.states(answer(store)["winnow_context"]), ours(model, SNAP, 24))
    show(recorder, (states, 1.0), passes(Asked(policy=SNAP, budget=WINDOW - 2), TOKENS)[0])
    assert f"a budget of {WINDOW - 1} fits" in answer(store)["winnow_error"]


@pytest.mark.parametrize("again", [0, 16, 40], ids=["from the start", "from a cached block", "from where it was"])
def test_a_preempted_prompt_goes_on_from_what_was_heard(
    model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path, again: int
) -> None:
    store, asked = ContextStore(tmp_path), Asked(policy=SNAP, budget=0.5)
    recorder = recorder_of(model, read, store)
    for step in passes(asked, 24, 16):
        show(recorder, read, step)
    moved = tuple(reversed(BLOCKS))  # its blocks are others then
    for step in passes(asked, 20, TOKENS - 20 - again, start=again):
        show(recorder, read, replace(step, blocks=moved))
    assert close(store.states(answer(store)["winnow_context"]), ours(model, SNAP, 0.5))


def test_two_prompts_in_one_pass_do_not_mix(model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path) -> None:
    store, asked = ContextStore(tmp_path), Asked(policy=SNAP, budget=24)
    recorder = recorder_of(model, read, store)
    one = passes(asked, TOKENS)[0]
    other = replace(one, request="q", ticket="u", tokens=40, count=40, blocks=tuple(range(30, 35)), ids=one.ids[:40])
    order = torch.randperm(TOKENS + 40, generator=torch.Generator().manual_seed(3))
    recorder.begin([one, other])
    for number, states in enumerate(read[0]):
        rows = [torch.cat([part, part[:40].flip(1)])[order] for part in states]
        recorder.hear(f"layer.{number}", *rows, torch.tensor([*one.slots(), *other.slots()])[order])
    recorder.finish()
    assert close(store.states(answer(store)["winnow_context"]), ours(model, SNAP, 24))
    assert answer(store, "u")["seen"] == 40


def test_tokens_that_were_not_heard_are_refused(
    model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path
) -> None:
    store = ContextStore(tmp_path)
    recorder = recorder_of(model, read, store)
    for step in passes(Asked(policy=SNAP, budget=24), 20, TOKENS - 36, start=16):
        show(recorder, read, step)
    assert "tokens 0 to 15" in (why := answer(store)["winnow_error"])
    assert "cache_salt" in why
    assert not store.ids()
    assert recorder.held_bytes == 0


def test_tokens_at_other_slots_are_refused(model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    recorder = recorder_of(model, read, store)
    step = passes(Asked(policy=SNAP, budget=24), TOKENS)[0]
    recorder.begin([step])
    recorder.hear("layer.0", *read[0][0], torch.arange(TOKENS))
    recorder.finish()
    assert "not where vLLM said" in answer(store)["winnow_error"]


def test_what_is_held_is_limited(model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path) -> None:
    store, asked = ContextStore(tmp_path), Asked(policy=SNAP, budget=24)
    queries, keys, _ = read[0][0]
    held = len(read[0]) * 4 * (2 * keys.numel() + 8 * queries[0].numel())  # keys, values and the window's queries, in float32
    enough = recorder_of(model, read, store, held)
    seen = []
    for step in passes(asked, 40, 31, 1):
        show(enough, read, step)
        seen.append(enough.held_bytes)
    assert "winnow_context" in answer(store)
    assert held - len(read[0]) * 4 * (2 * keys[0].numel() + queries[0].numel()) == seen[1]
    assert seen[2] == 0
    short = recorder_of(model, read, store, held - 1)
    for step in passes(asked, 40, 32):
        show(short, read, step)
    assert f"{held:,} bytes" in (why := answer(store)["winnow_error"])
    assert "handoff_gib" in why
    show(short, read, passes(asked, TOKENS)[0])  # refused until it is over, though it would fit now
    short.forget(["r"])
    show(short, read, passes(asked, TOKENS)[0])  # at once nothing is held
    assert "winnow_context" in answer(store)


def test_a_request_that_is_over_is_forgotten(model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path) -> None:
    recorder = recorder_of(model, read, ContextStore(tmp_path))
    show(recorder, read, passes(Asked(policy=SNAP, budget=24), 40)[0])
    assert recorder.held_bytes
    recorder.forget(["other", "r"])
    assert not recorder.held_bytes


@pytest.mark.parametrize("ends", [[], [9, 20, 33, 41, 55]], ids=["spans", "sentences"])
@pytest.mark.parametrize("sizes", [(TOKENS,), (30, 42)], ids=["whole", "two"])
@pytest.mark.parametrize("policy", ["winnow:equal=true:sinks=1:observe=4", "expected:equal=true:sinks=1:observe=4"])
def test_layers_may_wait_for_each_other(
    model: PreTrainedModel,
    read: tuple[list[States], float],
    tmp_path: Path,
    policy: str,
    sizes: tuple[int, ...],
    ends: list[int],
) -> None:
    store, asked = ContextStore(tmp_path), Asked(policy=policy, budget=32, question=12, tail=2, ends=ends)
    recorder = recorder_of(model, read, store)
    for step in passes(asked, *sizes):
        show(recorder, read, step)
    cache = wk.CompactCache(model, policy, 32, task=asked.task(TOKENS))
    model(prompt(TOKENS), past_key_values=cache)
    assert close(store.states(answer(store)["winnow_context"]), flat_states(cache))


def test_a_prompt_that_is_held_in_its_only_pass_is_limited(
    model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path
) -> None:
    store = ContextStore(tmp_path)
    recorder = recorder_of(model, read, store, 1000)
    show(recorder, read, passes(Asked(policy="winnow:equal=true:sinks=1:observe=4", budget=32), TOKENS)[0])
    assert "handoff_gib" in answer(store)["winnow_error"]
    show(recorder, read, passes(Asked(policy="snapkv", budget=32), TOKENS, request="next")[0])
    assert "winnow_context" in answer(store)


def test_a_part_that_fails_ends_its_request_alone(
    model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path
) -> None:
    store = ContextStore(tmp_path)
    recorder = recorder_of(model, read, store)
    for policy, budget in (("pyramidkv", 40), ("snapkv", 8)):  # the scheduler would have refused the first
        show(recorder, read, passes(Asked(policy=policy, budget=budget), TOKENS, request=policy)[0])
        assert "same number of entries" in (why := answer(store)["winnow_error"]) or "keep at least 32" in why
    show(recorder, read, passes(Asked(policy=SNAP, budget=24), TOKENS, request="next")[0])
    assert "winnow_context" in answer(store)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"policy": "snapkv:quantize=int8"}, PolicyError, "quantize="),
        ({"policy": "snapkv:lookahead=8"}, PolicyError, "lookahead="),
        ({"policy": "kvzip"}, PolicyError, "studies the text"),
        ({"policy": "criticalkv"}, PolicyError, "output projections"),
        ({"policy": "adakv:of=snapkv"}, PolicyError, "same number of entries"),
        ({"policy": "pyramidkv"}, PolicyError, "same number of entries"),
        ({"policy": "winnow"}, PolicyError, "winnow:equal=true"),
        ({"policy": "compresskv"}, PolicyError, "calibration profile"),
        ({"policy": "winnow:profile=/etc/passwd"}, PolicyError, "calibration profile"),
        ({"policy": "snapvk"}, PolicyError, "Did you mean 'snapkv'"),
        ({"budget": 0}, BudgetError, "budget"),
        ({"budget": "auto"}, InputError, "budget"),
        ({"budget": float("nan")}, BudgetError, "budget"),
        ({"budget": float("inf")}, BudgetError, "budget"),
        ({"budget": True}, InputError, "budget"),
        ({"question": -1}, InputError, "question"),
        ({"window": 3}, InputError, "window"),
        (7, InputError, "winnow_compress"),
    ],
)
def test_what_cannot_be_asked_for(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Asked.read(given)


def test_rows_are_found_by_their_slots() -> None:
    step = HandoffPass("r", "t", Asked(), 20, 6, 4, (3, 1, 2), 8)
    assert step.slots() == [30, 31, 8, 9]
    assert rows_of(step, torch.tensor([5, 30, 31, 8, 9, -1, -1])) == slice(1, 5)
    rows = rows_of(step, torch.tensor([9, 5, 8, 31, -1, 30]))
    assert isinstance(rows, Tensor)
    assert rows.tolist() == [5, 3, 2, 0]
    with pytest.raises(CacheError, match="not where vLLM said"):
        rows_of(step, torch.tensor([30, 31, 8]))


@pytest.mark.parametrize("options", [{}, {"rope_type": "llama3"}, {"rope_type": "yarn"}], ids=["plain", "llama3", "yarn"])
def test_a_model_without_weights_rotates_as_the_real_one(options: dict[str, Any]) -> None:
    scaled = {"factor": 4.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 5000.0, **options, **(scaled if options else {})}
    for kind, config in ((LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)):
        made = config(num_hidden_layers=2, rope_parameters=rope, **TINY)
        bare = weightless(made)
        assert all(weight.is_meta for weight in bare.parameters())
        assert context_rotation(bare) == context_rotation(kind(made))


def test_a_model_that_cannot_be_moved_is_refused_at_the_start(tmp_path: Path) -> None:
    dynamic = LlamaConfig(
        num_hidden_layers=1, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, **TINY
    )
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        Recorder(dynamic, ContextStore(tmp_path), GIB)


def request_of(name: str, params: dict[str, Any] | None, tokens: int = 20, **more: Any) -> SimpleNamespace:
    """A request as vLLM's scheduler has it."""
    ids = list(range(1, tokens + 1))
    return SimpleNamespace(request_id=name, kv_transfer_params=params, prompt_token_ids=ids, **more)


def scheduled(new: dict[str, int], cached: dict[str, int], counts: dict[str, int]) -> SimpleNamespace:
    """A step as vLLM's scheduler plans it: by request the tokens computed before, and those of the step."""
    blocks = SimpleNamespace(get_block_ids=lambda name: ([sum(map(ord, name)), 1, 2],))
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=start) for name, start in new.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
        num_scheduled_tokens=counts,
        kv_connector_block_state=blocks,
    )


def plan(side: HandoffScheduling, *step: dict[str, int]) -> list[tuple[str, int, int, bool]]:
    """The passes of a step."""
    found: Sequence[HandoffPass] = side.passes(scheduled(*step))
    assert all((len(each.ids) == each.tokens) == each.last for each in found)
    return [(each.request, each.start, each.count, each.last) for each in found]


def test_the_scheduler_names_the_passes_of_a_prompt(tmp_path: Path) -> None:
    tickets = Tickets(ContextStore(tmp_path))
    side = HandoffScheduling(tickets, 8)
    side.add(request_of("plain", None))
    side.add(request_of("odd", "winnow_compress"))  # type: ignore[arg-type]
    assert plan(side, {"plain": 0}, {}, {"plain": 20}) == []
    side.add(request_of("a", {"winnow_compress": {}}))
    assert plan(side, {"a": 0}, {"plain": 20}, {"a": 8, "plain": 1}) == [("a", 0, 8, False)]
    assert plan(side, {}, {"a": 8}, {"a": 8}) == [("a", 8, 8, False)]
    assert plan(side, {}, {"a": 0}, {"a": 8}) == [("a", 0, 8, False)]  # after a preemption
    assert plan(side, {}, {"a": 8, "plain": 21}, {"a": 14, "plain": 1}) == [("a", 8, 12, True)]  # two are not the prompt's
    assert plan(side, {}, {"a": 20}, {"a": 1}) == []
    assert plan(side, {}, {"a": 0}, {"a": 21}) == []  # preempted after its prompt was read: it is stored already
    assert side.finished(request_of("plain", None)) is None


def test_an_answer_is_what_the_worker_left(tmp_path: Path) -> None:
    tickets = Tickets(ContextStore(tmp_path))
    side, a = HandoffScheduling(tickets, 8), request_of("a", {"winnow_compress": {}})
    side.add(a)
    (step,) = side.passes(scheduled({"a": 0}, {}, {"a": 20}))
    tickets.put(step.ticket, {"winnow_context": "c"})
    assert side.finished(a) == {"winnow_context": "c"}
    assert tickets.take(step.ticket) is None
    assert side.finished(a) is None
    side.add(a)
    side.passes(scheduled({"a": 0}, {}, {"a": 8}))
    found = side.finished(a)
    assert found is not None
    assert "ended before" in found["winnow_error"]


@pytest.mark.parametrize(
    ("request_", "refusal", "says"),
    [
        (request_of("a", {"winnow_compress": {"policy": "pyramid"}}), None, "pyramidkv"),
        (request_of("a", {"winnow_compress": {}, "winnow_context": "c"}), None, "cannot stand in one request"),
        (request_of("a", {"winnow_compress": {}}, 0), None, "token ids"),
        (request_of("a", {"winnow_compress": {}}, mm_features=[1]), None, "images"),
        (request_of("a", {"winnow_compress": {}}, lora_request=1), None, "LoRA"),
        (request_of("a", {"winnow_compress": {}}), "vLLM was started without handoff", "started without handoff"),
    ],
)
def test_a_request_that_cannot_be_handed_off_is_told_why(
    tmp_path: Path, request_: SimpleNamespace, refusal: str | None, says: str
) -> None:
    side = HandoffScheduling(Tickets(ContextStore(tmp_path)), 8, refusal)
    side.add(request_)
    assert side.passes(scheduled({"a": 0}, {}, {"a": 20})) == ()
    found = side.finished(request_)
    assert found is not None
    assert says in found["winnow_error"]


def test_every_prompt_has_a_salt_of_its_own() -> None:
    asked = Handoff(SNAP, 64)
    one, other = asked.prompt([5, 6, 7]), asked.prompt([5, 6, 7])
    assert one.salt != other.salt
    assert one.ids == other.ids == [5, 6, 7]
    assert one.inputs == {"prompt_token_ids": [5, 6, 7], "cache_salt": one.salt}
    assert Asked.read(json.loads(json.dumps(one.body))["kv_transfer_params"]["winnow_compress"]) == one.asked
    assert one.body["max_tokens"] == 1
    with pytest.raises(InputError, match="no tokens"):
        asked.prompt([])
    with pytest.raises(PolicyError, match="lookahead"):
        Handoff("snapkv:lookahead=4").prompt([1])


def test_the_second_request_goes_on_from_the_first(
    model: PreTrainedModel, read: tuple[list[States], float], tmp_path: Path
) -> None:
    store = ContextStore(tmp_path)
    show(recorder_of(model, read, store), read, passes(Asked(policy=SNAP, budget=24), TOKENS)[0])
    found = answer(store)
    after = go_on(found, store, [9])
    assert after.ids == [*store.context(found["winnow_context"]).placeholders, 9]
    assert len(after.ids) == 25
    with pytest.raises(InputError, match="was not compressed: too long"):
        go_on({"winnow_error": "too long"}, store, [9])
    with pytest.raises(InputError, match="names no context"):
        go_on(None, store, [9])
