"""Which heads are in this process, and what is refused if it has a part of them only."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from winnowkv.cache.reading import prefill
from winnowkv.models.head_group import ALL_HEADS, HeadGroup
from winnowkv.policies import LayerStates
from winnowkv.policies.keydiff import KeyDiffScorer
from winnowkv.policies.snapkv import PooledScorer


class Mesh(SimpleNamespace):
    """A device mesh of these sizes, by name, of which this process is the last."""

    @property
    def mesh_dim_names(self) -> tuple[str, ...] | None:
        return tuple(self.sizes) if len(self.sizes) > 1 else None

    def __getitem__(self, name: str) -> Mesh:
        return Mesh(sizes={name: self.sizes[name]})

    def size(self) -> int:
        (size,) = self.sizes.values()
        return size

    def get_local_rank(self) -> int:
        return self.size() - 1

    def get_group(self) -> str:
        return "processes"


@pytest.mark.parametrize(
    ("sizes", "tp_size", "group"),
    [
        ({"tp": 4}, 4, HeadGroup(3, 4, "processes")),  # as transformers 5.2 makes it
        ({"pp": 1, "fsdp": 2, "tp": 4}, 4, HeadGroup(3, 4, "processes")),  # and later releases
        ({"pp": 1, "fsdp": 2, "tp": 1}, None, ALL_HEADS),  # each process has all heads
    ],
)
def test_the_group_is_read_of_the_models_mesh(sizes: dict[str, int], tp_size: int | None, group: HeadGroup) -> None:
    assert HeadGroup.of(SimpleNamespace(_device_mesh=Mesh(sizes=sizes), _tp_size=tp_size)) == group


def test_a_model_of_one_process_has_all_heads(llama: PreTrainedModel) -> None:
    group, states = HeadGroup.of(llama), torch.randn(1, 2, 3)
    assert group is ALL_HEADS
    assert group.whole(states) is states
    assert group.total(states) is states
    assert torch.equal(group.mine(states, 1), states)


def test_layers_spread_over_processes_are_refused() -> None:
    with pytest.raises(wk.UnsupportedModelError, match="spread over 2 processes"):
        HeadGroup.of(SimpleNamespace(_device_mesh=Mesh(sizes={"pp": 2, "fsdp": 1, "tp": 1}), _tp_size=None))


def test_a_layer_has_all_heads_an_equal_part_of_them_or_is_refused() -> None:
    group = HeadGroup(1, 2)
    assert group.of_layer(8, 8) is ALL_HEADS  # a plan that leaves attention alone
    assert group.of_layer(4, 8) is group
    assert group.mine(torch.arange(8)[:, None], 0).flatten().tolist() == [4, 5, 6, 7]
    with pytest.raises(wk.UnsupportedModelError, match=r"3 of 8 KV heads .* 2 processes .* divides 8"):
        group.of_layer(3, 8)


def test_a_group_may_be_copied_with_what_holds_it() -> None:
    group = HeadGroup(1, 2, processes=object())
    assert copy.deepcopy([group])[0] is group


def test_what_needs_all_heads_is_refused_by_name(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = wk.CompactCache(llama, "full", 1)
    prefill(llama, prompt(9), cache)
    monkeypatch.setattr(HeadGroup, "of", lambda model: HeadGroup(0, 2))
    ways: dict[str, Any] = {
        "the engine": lambda: wk.Engine(llama, None, "snapkv"),
        "saving a cache": lambda: wk.save_cache(cache, llama, tmp_path / "never"),
        "loading a cache": lambda: wk.load_cache(tmp_path / "never", llama),
    }
    for name, way in ways.items():
        with pytest.raises(wk.UnsupportedModelError, match=f"{name} needs all heads of the model in one process, and 2"):
            way()
    assert not (tmp_path / "never").exists()


class Halves(HeadGroup):
    """Both processes in one: the other's tensors are this one's."""

    def _each(self, states: torch.Tensor) -> list[torch.Tensor]:
        return [states, states]


def test_a_scorer_that_does_not_share_its_heads_is_given_those_of_all() -> None:
    """Also one that takes over another one's, which does: what a class says holds for its own score() only."""

    class Own(PooledScorer):
        def score(self, states: LayerStates) -> torch.Tensor:
            return torch.full((1, 1, 4), float(states.kv_heads))

    keys = torch.randn(1, 3, 6, 4)
    states = LayerStates(0, torch.randn(1, 6, 2, 4), keys, keys, 0.5, torch.randn(6, 4, 8), Halves(0, 2))
    whole = states.of_all_heads()
    assert (whole.queries.shape[1], whole.kv_heads, whole.values.shape[1], len(whole.projection)) == (12, 6, 6, 12)
    assert whole.heads is ALL_HEADS
    assert KeyDiffScorer(6, 2).score_all(states).shape == (1, 6, 4)
    assert Own(6, 2, kernel=3, pooling="avg", group_by="mean").score_all(states).eq(6).all()
