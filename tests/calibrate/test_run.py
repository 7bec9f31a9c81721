"""Calibration: scores and errors, the run on a tiny model, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.reference import masked_attention
from support.tokenizers import byte_tokenizer
from winnowkv.attention.projection import output_projections
from winnowkv.calibrate.errors import ErrorWatch
from winnowkv.calibrate.heads import traditional_scores
from winnowkv.calibrate.probe import ProbedCache
from winnowkv.calibrate.prompts import read_filler
from winnowkv.calibrate.run import Calibration, answered_by, calibrate, open_store, too_few


def test_an_answer_counts_if_most_of_its_words_are_said() -> None:
    assert answered_by("pale turquoise", "It is Pale Turquoise.")
    assert not answered_by("pale turquoise", "It is pale.")
    long = "to feed the goldfish every morning and to sweep the stairs"
    assert answered_by(long, "feed the goldfish every morning and sweep")
    assert not answered_by(long, "the the the the the the the the")


def test_traditional_scores_count_a_copied_token_once_a_head() -> None:
    places = torch.tensor([[[2, 3]], [[2, 0]], [[3, 3]]])  # three steps, one layer, two heads
    copied = traditional_scores(places, [7, 7, 8], [1, 1, 7, 8, 1], (2, 4))
    assert copied.tolist() == [[1.0, 0.5]]  # head 0 copies 7 (twice, counted once) and 8, head 1 only 8


def tiny_run(model: PreTrainedModel, asked: Calibration, folder: Path, seen: list[str]) -> wk.CalibrationProfile:
    words = byte_tokenizer(bos=False)
    store = open_store(folder, "tiny", model, False, asked)
    try:
        return calibrate(asked, "tiny", model, words, read_filler(), chat=False, store=store, advance=seen.append)
    finally:
        store.close()


def test_a_model_that_cannot_retrieve_gets_no_profile(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from support.models import TINY

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **{**TINY, "vocab_size": 300})).eval()
    asked, seen = Calibration(prompts=5, lengths=(600,), depths=(0.5,), max_new_tokens=3, minimum=5), list[str]()
    with pytest.raises(wk.InputError, match="answered 0 of 5 prompts, 5 are needed") as error:
        tiny_run(model, asked, tmp_path, seen)
    assert "600 tokens: 0 of 5" in str(error.value)
    lines = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(wk.InputError, match="answered 0 of 5"):
        tiny_run(model, asked, tmp_path, seen)
    assert (tmp_path / "results.jsonl").read_text() == lines, "finished prompts were measured again"


def test_lengths_beyond_the_model_or_below_a_prompt_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.InputError, match="1024 positions: ask for at most 984"):
        Calibration(lengths=(1000,)).check(llama)
    with pytest.raises(wk.InputError, match="fits in the small cache"):
        Calibration(lengths=(30,)).check(llama)


def test_prompts_of_which_no_profile_can_be_made_are_refused_without_a_model() -> None:
    for asked, reason in (
        (Calibration(prompts=4), "4 prompts are too few for reliable scores: a profile needs 8"),
        (Calibration(depths=(0.5, 1.5)), "depth 1.5 is outside 0"),
        (Calibration(lengths=()), "at least one prompt, length and depth"),
    ):
        with pytest.raises(wk.InputError, match=reason):
            asked.check_prompts()


def test_too_few_prompts_that_were_all_answered_are_told_in_one_sentence() -> None:
    lines = [{"kind": "fact", "length": 500, "success": True}] * 4
    assert too_few(lines, 4, 8) == (
        "the model answered 4 of 4 prompts, 8 are needed for reliable scores (500 tokens: 4 of 4, fact: 4 of 4): "
        "give a larger --count"
    )


def test_layer_errors_are_those_of_masked_attention(model: PreTrainedModel) -> None:
    """What the watch measures at a decode step, against the model's own attention under masks."""
    layers = model.config.num_hidden_layers
    chooser = wk.policy("compresskv", heads="all", budgets="uniform", observe=4)
    projections = [output_projections(model)[index] for index in range(layers)]
    ids, more = prompt(60), prompt(1, seed=5)
    bound = chooser.bind(wk.ModelInfo.of(model), wk.PromptInfo(60, layers, 12))
    watch = ErrorWatch(bound, projections)
    cache = ProbedCache(model, watch)
    outputs: dict[int, torch.Tensor] = {}
    hooks = [
        block.self_attn.register_forward_hook(lambda _m, _i, out, layer=layer: outputs.__setitem__(layer, out[0][0, -1]))
        for layer, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=more, past_key_values=cache)
        full = dict(outputs)
        for layer in range(layers):
            kept = [None] * layers
            kept[layer] = watch._kept[layer][None]
            with masked_attention(model, kept, 60):  # layers before it see everything, so its input is the same
                model(input_ids=torch.cat([ids, more], dim=1), use_cache=False)
            error = float((outputs[layer] - full[layer]).norm() / (full[layer].norm() + 1e-5))
            assert watch.errors[layer] == [pytest.approx(error, rel=1e-3, abs=1e-6)]
            assert error > 1e-3
    for hook in hooks:
        hook.remove()
