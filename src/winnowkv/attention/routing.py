"""Routing a model's attention through ours, for as long as it is needed.

The model's config names, in place of its own attention, one of ours that knows which one that was. Nothing else of the model
changes. Whoever needs a model routed holds it; the last one to let go puts everything back.

Holds are given back by finalizers, too. Those run at any moment, also in a thread that is inside this module, so they never
wait for the lock: what they give back is put down, and whoever has the lock takes it up.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from winnowkv.attention.generate import GenerateCall, stop_watching, watch_generate
from winnowkv.attention.hooks import winnow_attention, winnow_mask
from winnowkv.errors import UnsupportedModelError
from winnowkv.models.info import takes_no_cache

PREFIX = "winnow_"  # our keys in transformers' two registries: the model's own attention follows, as in winnow_sdpa
ROUTING = "_winnow_routing"  # attribute of a routed model; gone once it is not needed any more

_lock = threading.Lock()
_given_back: deque[Routing] = deque()  # one for each hold that is to be taken off


@dataclass
class Routing:
    """A routed model.

    Attributes
    ----------
    before: the configs that were changed, and the attention that each had.
    holders: how many need it.
    blocks: open compress blocks as the threads have them that they serve, innermost last.
    calls: what ``generate`` was asked for by each thread that is inside it.
    """

    model: weakref.ref[PreTrainedModel]
    before: list[tuple[Any, str | None]]
    holders: int = 0
    blocks: list[Any] = field(default_factory=list)
    calls: dict[int, GenerateCall] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copy of a routed model is not routed."""

    def __reduce__(self) -> tuple[Any, ...]:
        """None for pickle, too."""
        return type(None), ()


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model that compact caches cannot serve."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{kind} is not a transformers model (PreTrainedModel)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder model; only decoder-only models are supported")
    if takes_no_cache(model):
        raise UnsupportedModelError(f"{kind} keeps a cache of its own in this release of transformers and takes no other")


def acquire(model: PreTrainedModel) -> Routing:
    """Route the model's attention through ours until :func:`release` was called as often. Thread-safe."""
    check_model(model)
    routing = take_hold(model, route=True)
    assert routing is not None
    return routing


def take_hold(model: PreTrainedModel, *, route: bool) -> Routing | None:
    """One hold more. A model that is not routed is routed now, or, without ``route``, not held: None."""
    try:
        with _lock:
            routing = routing_of(model) or (start(model) if route else None)
            if routing is not None:
                routing.holders += 1
            return routing
    finally:
        take_back()


def release(routing: Routing) -> None:
    """Give one hold back; the last one puts the model's attention back as it was, before this returns."""
    with _lock:
        drop(routing)
    take_back()


def release_later(routing: Routing) -> None:
    """The same for finalizers: without waiting. If the lock is taken, whoever has it goes on with this."""
    _given_back.append(routing)
    take_back()


def take_back() -> None:
    """Take off the holds that were put down. Called after each use of the lock, and never waits for it."""
    while _given_back and _lock.acquire(blocking=False):
        try:
            while _given_back:
                drop(_given_back.popleft())
        finally:
            _lock.release()


class Hold:
    """A hold on a routed model that is taken and given back as often as its owner needs it."""

    def __init__(self) -> None:
        self._routing: Routing | None = None
        self._model: PreTrainedModel | None = None  # which lives as long as it is held
        self._thread: int | None = None  # that took it

    def take(self, model: PreTrainedModel, *, route: bool = True) -> bool:
        """Hold a model, unless that is done already; False if it is not routed and ``route`` says that we do not."""
        if self._routing is None:
            self._routing = acquire(model) if route else take_hold(model, route=False)
            if self._routing is not None:
                self._model, self._thread = model, threading.get_ident()
        return self._routing is not None

    def give_back(self, thread: int | None = None) -> None:
        """Let go of what is held, if this thread took it (None: any did). Never waits, so that a finalizer may call it."""
        if thread not in (None, self._thread):
            return
        routing, self._routing = self._routing, None
        if routing is not None:
            release_later(routing)
        self._model = None


def routing_of(model: PreTrainedModel | None) -> Routing | None:
    """How a model is routed now, None if it is not."""
    found: Routing | None = getattr(model, ROUTING, None)
    return found


def generate_call(model: PreTrainedModel) -> GenerateCall | None:
    """What this thread asked ``generate`` of a routed model for; None outside of it."""
    routing = routing_of(model)
    return None if routing is None else routing.calls.get(threading.get_ident())


def is_routed(model: PreTrainedModel | None) -> bool:
    """Whether the model's attention goes through ours now."""
    return routing_of(model) is not None


def start(model: PreTrainedModel) -> Routing:
    """Route a model. With the lock."""
    routing = Routing(weakref.ref(model), [])
    for config in decoder_configs(model):
        own = config._attn_implementation
        if own is not None and own.startswith(PREFIX):  # a copy that was made of a routed model
            own = own.removeprefix(PREFIX)
        base = own or "eager"  # what transformers takes for None
        AttentionInterface.register(PREFIX + base, partial(winnow_attention, base=base))
        AttentionMaskInterface.register(PREFIX + base, partial(winnow_mask, base=base))
        routing.before.append((config, own))
        # The internal attribute, because the public one also sets every config below.
        config._attn_implementation_internal = PREFIX + base
    watch_generate(model, routing.calls)
    setattr(model, ROUTING, routing)
    return routing


def drop(routing: Routing) -> None:
    """One hold less. With the lock."""
    routing.holders -= 1
    if routing.holders:
        return
    for config, own in routing.before:
        config._attn_implementation_internal = own
    model = routing.model()
    if model is not None and getattr(model, ROUTING, None) is routing:
        delattr(model, ROUTING)
        stop_watching(model)


def decoder_configs(model: PreTrainedModel) -> list[Any]:
    """The configs that the decoder's attention and masks read: those of an image or audio encoder beside it stay as they are.

    Raises UnsupportedModelError if its attention does not go through transformers' AttentionInterface.
    """
    text = model.config.get_text_config(decoder=True)
    found = {id(text): text, id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is not type(text):
            continue
        found[id(config)] = config
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise UnsupportedModelError(
                f"the attention of {type(model).__name__} does not go through transformers' AttentionInterface"
            )
    return list(found.values())
