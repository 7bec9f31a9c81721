"""vLLM's attention backends as subclasses that hand queries, keys and values to a listener, through vLLM's own registry.

vLLM lets any attention backend be overridden by the path of a class (``register_backend``). The paths registered here name
attributes of this module, ``...listening.CPU_ATTN``; each is made, when vLLM asks for it, as a subclass of the backend that
vLLM has under that name. Its ``forward`` shows the listener what it was given, queries and keys after RoPE, and then does what
the backend does. Without a listener nothing else happens.

It must be registered before the model is built, and nothing of a KV connector is imported in a worker by then. So the worker is
told: ``--worker-extension-cls winnowkv.integrations.vllm.handoff_worker.HandoffWorker`` (handoff_worker.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from winnowkv.errors import UnsupportedEngineError

WORKER_EXTENSION = "winnowkv.integrations.vllm.handoff_worker.HandoffWorker"
# Decoder attention whose forward is given queries, keys and values of all heads; latent attention (MLA) is not.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "FLEX_ATTENTION", "ROCM_ATTN")
REGISTRY = "vllm.v1.attention.backends.registry"


class Listener(Protocol):
    """What hears the attention of a worker."""

    def hear(self, name: str, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """One layer's attention is about to be computed for all tokens of a forward pass.

        ``queries`` ``[T, Hq, D]`` and ``keys`` ``[T, Hkv, D]`` after RoPE, ``values`` ``[T, Hkv, D]``, and ``slots`` ``[T]``:
        where vLLM stores the tokens' keys and values. Rows may be padded after the last slot. They are vLLM's own: copy what is
        kept.
        """


@dataclass(frozen=True)
class HeardLayer:
    """An attention layer of the model.

    ``number`` among all; ``scale``: what it multiplies its logits by; ``window``: the last tokens that it slides over, None if
    it attends to everything.
    """

    number: int
    scale: float
    window: int | None = None


def register() -> None:
    """Override vLLM's attention backends in this process; more than once does no harm. One that is overridden stays so."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in BACKENDS:
        backend = AttentionBackendEnum.__members__.get(name)
        if backend is not None and not backend.is_overridden():
            register_backend(backend, f"{__name__}.{name}")


def listen_to(layers: Mapping[int, Any], listener: Listener) -> dict[str, HeardLayer]:
    """Have vLLM's attention layers, by their number in the model, heard by a listener; what it hears, by the layers' names.

    Raises UnsupportedEngineError for a layer whose attention is not one of the backends that were registered.
    """
    heard = {}
    for number, layer in layers.items():
        if not getattr(layer.impl, "listening", False):
            raise UnsupportedEngineError(
                f"layer {number}: {type(layer.impl).__name__} does not hand out its queries, which a handoff needs: start vLLM "
                f"with --worker-extension-cls {WORKER_EXTENSION}, and one of the attention backends {', '.join(BACKENDS)}"
            )
        layer.impl.listener = listener
        heard[layer.layer_name] = HeardLayer(number, float(layer.impl.scale), getattr(layer, "sliding_window", None))
    return heard


def __getattr__(name: str) -> Any:
    """The listening subclass of a backend of vLLM's, made once."""
    if name not in BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _listening_backend(name)
    return made


def _listening_backend(name: str) -> type:
    from importlib import import_module

    path: str = getattr(import_module(REGISTRY).AttentionBackendEnum, name).value
    module, _, kind = path.rpartition(".")
    backend: Any = getattr(import_module(module), kind)
    impl = _listening_impl(backend.get_impl_cls())
    # Its module and name lead vLLM back here when it looks the class up by them.
    inside = {"__module__": __name__, "__qualname__": name, "get_impl_cls": staticmethod(lambda: impl)}
    return type(name, (backend,), inside)


def _listening_impl(impl: Any) -> type:
    def forward(
        self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, *args: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        slots = getattr(attn_metadata, "slot_mapping", None)  # None while vLLM warms up
        if self.listener is not None and slots is not None and key is not None:
            self.listener.hear(layer.layer_name, query, key, value, slots)
        return impl.forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **more)

    inside = {"__module__": __name__, "listening": True, "listener": None, "forward": forward}
    return type(f"Listening{impl.__name__}", (impl,), inside)
