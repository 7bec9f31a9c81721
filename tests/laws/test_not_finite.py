"""Importance scores that are not finite numbers end the prompt with one error that names layer, policy and way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.auto import SPECS, profile_file
from support.batch import padded
from support.cases import Case
from support.models import PROMPT, prompt
from support.policies import bind, drawn_states
from winnowkv.cache.selection import PromptSelection, evidence
from winnowkv.models.curve import Curve

BROKEN = 127  # the token whose embedding is no number
BLIND = {"random", "streaming"}  # their scores do not come from the model


@pytest.fixture
def broken(llama: PreTrainedModel) -> PreTrainedModel:
    llama.get_input_embeddings().weight.data[BROKEN] = float("nan")
    return llama


def whole(tokens: int = PROMPT) -> torch.Tensor:
    return prompt(tokens).clamp(max=BROKEN - 1)


def spoiled(tokens: int = PROMPT) -> torch.Tensor:
    ids = whole(tokens)
    ids[0, tokens // 2] = BROKEN
    return ids


def message(name: str) -> str:
    return f"^{name}: the importance scores of layer 0 are not finite numbers, .*: load the model in bfloat16 or float32$"


def test_every_policy_that_looks_at_the_model_says_so(broken: PreTrainedModel, evicting: Case) -> None:
    cache = wk.CompactCache(broken, **evicting.settings)
    if evicting.name in BLIND:
        wk.prefill(broken, spoiled(), cache)
        return
    with pytest.raises(wk.InputError, match=message(evicting.name)):
        wk.prefill(broken, spoiled(), cache)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_layer_is_named(evicting: Case, layer: int, bad: float) -> None:
    if evicting.name in BLIND:
        return
    selection = PromptSelection(bind(evicting.spec, 90, 5, evicting.budget, evicting.task))
    generator = torch.Generator().manual_seed(0)
    leader, said = selection.bound.parts.scorer.leader(layer), ""
    for at in range(5):
        scores, votes = evidence(selection.bound, drawn_states(selection.bound, at, generator))
        if at == leader:
            scores[0, 0, 3] = bad
        try:
            selection.take(scores, votes)
        except wk.InputError as error:  # at the last layer, or where a part could not work with it
            said = str(error)
            break
    assert f"scores of layer {leader} are not finite" in said


@pytest.mark.parametrize("spec", ["winnow:observe=4:samples=16", "snapkv:observe=4", "cake:observe=4"])
def test_chunks_rows_and_replays_say_so(broken: PreTrainedModel, spec: str) -> None:
    name = spec.split(":")[0]
    with pytest.raises(wk.InputError, match=message(name)):
        wk.prefill(broken, spoiled(200), wk.CompactCache(broken, spec, 20), chunk=64)
    with pytest.raises(wk.InputError, match=f"{name}: the importance scores"):
        wk.prefill(broken, spoiled(200), wk.CompactCache(broken, spec, 20), chunk=64, ceiling=60)
    ids, mask = padded([whole(60), spoiled(50)])
    with pytest.raises(wk.InputError, match=f"^row 1 of a batch of 2: {name}: the importance scores of layer 0"):
        wk.prefill(broken, ids, wk.CompactCache(broken, spec, 20), mask)
    recorded = wk.CompactCache(broken, "full", 1, record=PROMPT)
    wk.prefill(broken, spoiled(), recorded)
    with pytest.raises(wk.InputError, match=message(name)):
        recorded.replay(spec, 20)


@pytest.mark.parametrize("spec", SPECS)
def test_auto_says_so(broken: PreTrainedModel, spec: str, tmp_path: Path) -> None:
    path = profile_file(broken, tmp_path, Curve(((0.0, 0.0), (1.0, 1.0)), 9))
    cache = wk.CompactCache(broken, spec, f"auto:0.8:{path}", task="localization")
    with pytest.raises(wk.InputError, match=message(spec.split(":")[0])):
        wk.prefill(broken, spoiled(), cache)


def test_overflow_in_half_precision_is_told(llama: PreTrainedModel) -> None:
    """Values that leave float16's range, as the norms of values do first."""
    half = llama.half()
    for layer in half.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e5
    with pytest.raises(wk.InputError, match="are not finite numbers"):
        wk.prefill(half, prompt(PROMPT), wk.CompactCache(half, "criticalkv:of=snapkv:observe=4", 20))


def test_the_model_is_usable_afterwards(broken: PreTrainedModel) -> None:
    before = broken.generate(whole(), max_new_tokens=4, do_sample=False)
    with wk.compress(broken, "winnow", 0.3), pytest.raises(wk.InputError, match="not finite"):
        broken.generate(spoiled(), max_new_tokens=4, do_sample=False)
    assert torch.equal(broken.generate(whole(), max_new_tokens=4, do_sample=False), before)
