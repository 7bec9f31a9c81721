"""The attention backends that hand out queries: subclasses of an engine's own ones, by its registry. vLLM is not here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from winnowkv.errors import UnsupportedEngineError
from winnowkv.integrations.vllm import listening


class Impl:
    """An attention backend's work."""

    scale = 0.5

    def forward(self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, **more: Any) -> Any:
        """What it was given."""
        return query, key, value, kv_cache, attn_metadata, more


class Backend:
    """A backend as the engine names it."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """What computes."""
        return Impl

    @staticmethod
    def get_name() -> str:
        """Its name in the engine."""
        return "CPU_ATTN"


class Registered(Enum):
    """The engine's table of backends."""

    CPU_ATTN = f"{__name__}.Backend"
    FLASH_ATTN = f"{__name__}.Missing"
    CPU_MLA = f"{__name__}.Latent"

    def is_overridden(self) -> bool:
        """Whether another took its place."""
        return self.name in OVERRIDDEN


OVERRIDDEN: dict[str, str] = {}


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine's registry under its name."""
    OVERRIDDEN.clear()
    made = ModuleType(listening.REGISTRY)
    made.AttentionBackendEnum = Registered  # type: ignore[attr-defined]
    made.register_backend = lambda backend, path: OVERRIDDEN.update({backend.name: path})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, listening.REGISTRY, made)
    yield
    for name in listening.BACKENDS:
        vars(listening).pop(name, None)


class Ear:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def hear(self, *given: Any) -> None:
        """Take it."""
        self.heard.append(given)


def test_only_backends_that_can_be_heard_are_registered_and_once() -> None:
    listening.register()
    here = {"CPU_ATTN": f"{listening.__name__}.CPU_ATTN", "FLASH_ATTN": f"{listening.__name__}.FLASH_ATTN"}
    assert here == OVERRIDDEN
    OVERRIDDEN["FLASH_ATTN"] = "of.another.package"
    listening.register()
    assert {**here, "FLASH_ATTN": "of.another.package"} == OVERRIDDEN


def test_a_backend_is_found_by_the_path_that_was_registered() -> None:
    made = listening.CPU_ATTN  # type: ignore[attr-defined]
    assert issubclass(made, Backend)
    assert made.get_name() == "CPU_ATTN"
    assert getattr(sys.modules[made.__module__], made.__qualname__) is made
    with pytest.raises(AttributeError):
        _ = listening.CPU_MLA  # type: ignore[attr-defined]


def test_attention_is_shown_and_then_computed() -> None:
    impl, ear = listening.CPU_ATTN.get_impl_cls()(), Ear()  # type: ignore[attr-defined]
    layer = SimpleNamespace(layer_name="model.layers.3.attn", impl=impl)
    pass_ = SimpleNamespace(slot_mapping="slots")
    given = (layer, "q", "k", "v", "cache", pass_)
    assert impl.forward(*given, output="o") == ("q", "k", "v", "cache", pass_, {"output": "o"})
    heard = listening.listen_to({3: layer}, ear)
    assert heard == {"model.layers.3.attn": listening.HeardLayer(3, 0.5)}
    assert impl.forward(*given, output="o") == ("q", "k", "v", "cache", pass_, {"output": "o"})
    impl.forward(layer, "q", "k", "v", "cache", None)  # as the engine warms up
    assert ear.heard == [("model.layers.3.attn", "q", "k", "v", "slots")]


def test_two_layers_have_ears_of_their_own() -> None:
    kind = listening.CPU_ATTN.get_impl_cls()  # type: ignore[attr-defined]
    one, other = (SimpleNamespace(layer_name=name, impl=kind()) for name in "ab")
    listening.listen_to({0: one}, Ear())
    assert other.impl.listener is None


def test_a_layer_that_cannot_be_heard_is_named_with_the_way_out() -> None:
    deaf = SimpleNamespace(layer_name="model.layers.0.attn", impl=Impl())
    with pytest.raises(UnsupportedEngineError, match=r"layer 0: Impl .* --worker-extension-cls .*HandoffWorker"):
        listening.listen_to({0: deaf}, Ear())
