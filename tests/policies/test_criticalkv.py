"""CriticalKV against arXiv 2502.03805, section 4, as loops, and the projection weights that it reads.

Deliberate differences: the first stage is a part of the mean budget of all layers, since a layer's own may not be known yet (a
layer with less room keeps the best products of them); one score serving several KV heads becomes one a head; a layer's scores
keep their sum, by which some allocators split.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, prompt
from support.policies import HEADS, KV_HEADS, best, kept_rows, projected_norm, run
from support.reference import positions
from winnowkv.attention.projection import output_projections, projection_weight
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import LayerStates
from winnowkv.policies.criticalkv import EPSILON
from winnowkv.scoring.values import projected_norms

TOKENS, LAYERS, BUDGET = 40, 3, 14


def reference(scores: list[float], norms: list[float], first: int, count: int) -> list[int]:
    """Stage one takes the best scores, stage two the best products of score and norm among the others."""
    found = best(scores, first)
    products = sorted(range(len(scores)), key=lambda at: (at not in found, -(scores[at] + EPSILON) * norms[at], at))
    return sorted(products[:count])


def test_projected_norms_are_l1_norms_of_the_heads_outputs() -> None:
    _, layers = run("snapkv:observe=4", TOKENS, 1, BUDGET)
    found = projected_norms(layers[0].values, layers[0].projection)
    assert found.shape == (1, KV_HEADS, TOKENS)
    expected = [[projected_norm(layers[0], head, at) for at in range(TOKENS)] for head in range(KV_HEADS)]
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0.0, 0.5, 0.3, 1.0])
@pytest.mark.parametrize(
    ("inner", "window"),
    [
        ("snapkv:observe=4:kernel=3", 4),
        ("knorm", 0),
        ("tova", 1),  # one score for all heads
        ("pyramidkv:observe=4:slope=5", 4),
        ("dynamickv:observe=4:every=2:ceiling=3:floor=0", 4),
    ],
)
def test_two_stages_keep_what_the_reference_keeps(inner: str, window: int, first: float) -> None:
    selection, layers = run(f"criticalkv:first={first}:of={inner}", TOKENS, LAYERS, BUDGET)
    context = TOKENS - window
    before = int(first * (BUDGET - window))
    changed = 0
    for states, rows in zip(layers, kept_rows(selection), strict=True):
        scores = selection.bound.parts.scorer.inner.score(states)[0].tolist()
        for head in range(KV_HEADS):
            own, norms = scores[head % len(scores)], [projected_norm(states, head, at) for at in range(context)]
            count = len(rows[head]) - window
            assert rows[head] == reference(own, norms, before, count) + list(range(context, TOKENS))
            same = rows[head][:count] == best(own, count)
            assert same or count != before
            changed += not same
    assert changed or first == 1


def test_scores_of_query_heads_keep_their_heads() -> None:
    """As windowkv needs them, which chooses over all heads."""
    selection, layers = run(wk.policy("criticalkv", of="windowkv:observe=4:task=localization"), TOKENS, 2, BUDGET)
    scorer = selection.bound.parts.scorer
    inner, found = scorer.inner.score(layers[0]), scorer.score(layers[0])
    assert inner.shape == found.shape == (1, HEADS, TOKENS - 4)


def test_a_layers_scores_keep_their_sum() -> None:
    """CAKE and expected split the budget by it."""
    for inner in ("cake:observe=4", "expected:observe=4:samples=16"):
        selection, layers = run(f"criticalkv:of={inner}", TOKENS, LAYERS, BUDGET)
        scorer = selection.bound.parts.scorer
        for states in layers:
            torch.testing.assert_close(scorer.score(states).sum(), scorer.inner.score(states).sum())
        alone, _ = run(inner, TOKENS, LAYERS, BUDGET)
        assert [len(rows[0]) for rows in kept_rows(selection)] == [len(rows[0]) for rows in kept_rows(alone)]


# --- the projection ------------------------------------------------------------------------------------------------


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


def check_projection(module: nn.Module, weights: Tensor, heads: int) -> None:
    """The heads' outputs through the module equal the sum of each head's through its own weights."""
    outputs = torch.randn(1, heads, 5, weights.shape[1])
    with torch.no_grad():
        together = module(outputs.transpose(1, 2).flatten(2))
        bias = module(torch.zeros(1, 1, heads * weights.shape[1]))
    torch.testing.assert_close(sum(outputs[:, h] @ weights[h] for h in range(heads)) + bias, together, rtol=1e-4, atol=1e-5)


def weights_of(model: nn.Module, layers: list[int], heads: int) -> list[Tensor]:
    found = output_projections(model)
    return [projection_weight(found[layer], layer, heads) for layer in layers]


def test_projection_weights_are_those_of_linear_layers(model: PreTrainedModel) -> None:
    layers = list(range(model.config.num_hidden_layers))
    found = weights_of(model, layers, 8)
    for layer, weights in zip(model.model.layers, found, strict=True):
        assert weights.shape == (8, 8, 64)
        assert not weights.requires_grad
        assert weights.data_ptr() == layer.self_attn.o_proj.weight.data_ptr()  # a view
        check_projection(layer.self_attn.o_proj, weights, 8)


def test_projection_weights_are_those_of_gpt2s_conv1d() -> None:
    """Which stores them the other way round."""
    model = gpt2()
    for block, weights in zip(model.transformer.h, weights_of(model, [0, 1], 4), strict=True):
        assert type(block.attn.c_proj).__name__ == "Conv1D"
        torch.nn.init.normal_(block.attn.c_proj.bias)
        check_projection(block.attn.c_proj, weights, 4)


def test_a_model_without_readable_projections_is_refused(llama: Any) -> None:
    with pytest.raises(wk.UnsupportedModelError, match="no output projection"):
        output_projections(nn.Linear(2, 2))
    llama.model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(wk.UnsupportedModelError, match=r"layer 1: .*\(Linear\) cannot be read"):
        weights_of(llama, [0, 1], 8)


class Watched(wk.CompactCache):
    """Notes what the compressed layers see."""

    def observe(self, layer_idx: int, queries: Tensor, scale: float) -> None:
        seen = self.__dict__.setdefault("seen", {})
        layer = self.layers[layer_idx]
        seen.setdefault(layer_idx, (queries.clone(), layer.keys.clone(), layer.values.clone(), scale))
        super().observe(layer_idx, queries, scale)


@pytest.mark.parametrize("spec", ["criticalkv:first=0:of=snapkv:observe=4", "defensivekv:observe=4"])
def test_a_model_is_scored_by_its_own_layers_projections(model: PreTrainedModel, spec: str) -> None:
    """The layers' own, in their order: every layer's weights differ."""
    cache, watched = wk.CompactCache(model, spec, 20), Watched(model, "full", 1)
    with torch.no_grad():
        for each in (cache, watched):
            model(input_ids=prompt(PROMPT), past_key_values=each, use_cache=True)
    layers = model.config.num_hidden_layers
    bound = wk.policy(spec).bind(wk.ModelInfo.of(model), wk.PromptInfo(PROMPT, layers, 20))
    selection = PromptSelection(bound)
    for at, layer in enumerate(model.model.layers):
        queries, keys, values, scale = watched.seen[at]
        weights = layer.self_attn.o_proj.weight.detach().T.reshape(8, 8, 64)
        selection.observe(LayerStates(at, queries[:, :, bound.query_positions()], keys, values, scale, weights))
    for mine, theirs in zip(positions(cache), selection.kept, strict=True):
        assert torch.equal(mine.long(), theirs[0].long())


def test_criticalkv_and_gpt2_work_together() -> None:
    model = gpt2()
    cache = wk.CompactCache(model, "criticalkv:of=snapkv:observe=4", 12)
    with torch.no_grad():
        model(input_ids=torch.randint(1, 64, (1, 40)), past_key_values=cache, use_cache=True)
    assert cache.report.kept_entries[0] == [12, 12]


@pytest.mark.parametrize("first", ["-0.1", "1.5"])
def test_options_out_of_bounds_are_refused(first: str) -> None:
    with pytest.raises(wk.PolicyError, match=f"criticalkv: first={first} is too"):
        wk.policy(f"criticalkv:first={first}")
