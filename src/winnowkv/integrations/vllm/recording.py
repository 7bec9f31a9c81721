"""The worker's side of a handoff: hear a prompt layer by layer while vLLM computes it, keep what a policy chooses, store that.

A prompt that vLLM computes in one forward pass is decided in it: once a layer's queries, keys and values are there, the layer's
entries are chosen and copied, and nothing else is held, unless the policy compares layers (``winnow:equal=true``). Of a prompt
that comes in several passes keys and values of all tokens before the last pass are held, and of its queries those that the
policy wants: in the RAM of the worker, also if the model is on an accelerator, and no more than a limit for all requests
together. Of layers that slide the window's last tokens are kept, and nothing is chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnowkv.cache.selection import PromptSelection
from winnowkv.contexts.context import CONTEXT_PARAM
from winnowkv.contexts.export import header_of
from winnowkv.contexts.flat import context_rotation
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import CacheError, InputError, WinnowError
from winnowkv.files import reason
from winnowkv.integrations.vllm.choosing import Kept, at_once, choose, flat, kept_entries, new_selection, weightless, window
from winnowkv.integrations.vllm.handoff import ERROR_PARAM, HandoffPass, Tickets
from winnowkv.integrations.vllm.listening import HeardLayer
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import sliding_rotation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What was heard of one layer in one pass: tokens ``start`` to ``end``.

    ``keys``, ``values`` ``[t, Hkv, D]``; ``queries`` ``[w, Hq, D]`` at the ascending prompt positions ``places`` ``[w]``.
    """

    start: int
    end: int
    keys: Tensor
    values: Tensor
    queries: Tensor
    places: Tensor

    @property
    def bytes(self) -> int:
        """What it holds."""
        return sum(each.numel() * each.itemsize for each in (self.keys, self.values, self.queries))

    def held(self) -> Part:
        """A copy in RAM."""
        copied = [part.to("cpu", copy=True) for part in (self.keys, self.values, self.queries)]
        return Part(self.start, self.end, copied[0], copied[1], copied[2], self.places)

    def before(self, token: int) -> Part:
        """Its tokens before this one."""
        if self.end <= token:
            return self
        count, asked = token - self.start, int((self.places < token).sum())
        return Part(self.start, token, self.keys[:count], self.values[:count], self.queries[:asked], self.places[:asked])


@dataclass
class Prompt:
    """A prompt that is being heard.

    Attributes
    ----------
    heard: tokens of which all layers were heard. layers: for each layer its parts so far.
    kept: for each layer that was read to its end what is held of it.
    reserved: bytes that it may hold. error: why it cannot be handed off, in a sentence. seconds: spent on choosing.
    """

    selection: PromptSelection
    wanted: Tensor
    heard: int = 0
    reserved: int = 0
    layers: list[list[Part]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def held_bytes(self) -> int:
        """Of keys, values and queries."""
        return sum(layer.bytes for layer in self.kept) + sum(part.bytes for parts in self.layers for part in parts)

    def cut(self, tokens: int) -> None:
        """Forget all but the first ``tokens``: vLLM computes the others again, after a preemption."""
        self.layers = [[part.before(tokens) for part in parts if part.start < tokens] for parts in self.layers]
        self.heard = min(self.heard, tokens)
        self.kept.clear()


class Recorder:
    """Hears the attention of a worker and hands prompts off.

    Parameters
    ----------
    config: the model's config, as transformers has it.
    store: where contexts and answers are written.
    limit: most bytes to hold of prompts that come in several passes.

    Attributes
    ----------
    layers: the model's attention layers by vLLM's names.

    Raises
    ------
    UnsupportedModelError
        For a config whose model rotates keys in a way that is not known here.
    """

    def __init__(self, config: Any, store: ContextStore, limit: int) -> None:
        self._config, self._store, self._limit = config, store, limit
        model = weightless(config)
        self._info, self._rotation = ModelInfo.of(model), context_rotation(model)
        self._sliding = sliding_rotation(model) or self._rotation
        self.layers: Mapping[str, HeardLayer] = {}
        self._tickets = Tickets(store)
        self._prompts: dict[str, Prompt] = {}
        self._passes: tuple[HandoffPass, ...] = ()
        self._rows: dict[str, slice | Tensor] = {}  # of each request, where its tokens are among those that vLLM computes

    @property
    def held_bytes(self) -> int:
        """Of keys, values and queries of all prompts."""
        return sum(prompt.held_bytes for prompt in self._prompts.values())

    def begin(self, passes: Sequence[HandoffPass]) -> None:
        """A forward pass begins, in which these are computed."""
        self._passes, self._rows = tuple(passes), {}
        for each in self._passes:
            self._alone(each, self._begin)

    def _begin(self, each: HandoffPass) -> None:
        prompt = self._prompts.get(each.request)
        if prompt is None:
            selection = new_selection(each, self._info, list(self.layers.values()))
            prompt = self._prompts[each.request] = Prompt(selection, selection.bound.query_positions())
        if prompt.error:
            return
        if each.start > prompt.heard:
            raise InputError(
                f"vLLM did not compute tokens {prompt.heard} to {each.start - 1} of the prompt but took them from its prefix "
                "cache, so they were not heard: send it with a cache_salt of its own, as Handoff.prompt does"
            )
        prompt.cut(each.start)

    def hear(self, name: str, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """A layer's attention is about to be computed; see :class:`~winnowkv.integrations.vllm.listening.Listener`."""
        layer = self.layers.get(name)
        if not self._passes or layer is None:
            return
        for each in self._passes:
            prompt = self._prompts.get(each.request)
            if prompt is not None and not prompt.error:
                self._alone(each, self._take, prompt, layer, slots, queries, keys, values)

    def _take(self, each: HandoffPass, prompt: Prompt, layer: HeardLayer, slots: Tensor, *states: Tensor) -> None:
        if each.request not in self._rows:
            self._rows[each.request] = rows_of(each, slots)
        here = self._part(each, prompt, layer, *(part[self._rows[each.request]] for part in states))
        if layer.number == len(prompt.layers):
            prompt.layers.append([])
        if layer.number == 0 and not prompt.reserved and not (each.last and at_once(prompt.selection)):
            self._reserve(each, prompt, here)
        if not each.last:
            prompt.layers[layer.number].append(here.held())
            return
        started = time.perf_counter()
        whole = joined([*prompt.layers[layer.number], here])
        prompt.layers[layer.number] = []  # what is not chosen now is not needed again
        if layer.window is None:
            before = [
                prompt.kept[other.number] for other in self._in_order() if other.window is None and other.number < layer.number
            ]
            prompt.kept.append(choose(prompt.selection, before, layer.scale, *whole))
        else:
            prompt.kept.append(window(layer.window, kept_entries(prompt.selection), each.tokens, *whole[1:]))
        prompt.seconds += time.perf_counter() - started

    def _in_order(self) -> list[HeardLayer]:
        return sorted(self.layers.values(), key=lambda layer: layer.number)

    def _part(
        self, each: HandoffPass, prompt: Prompt, layer: HeardLayer, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Part:
        """What is needed of one pass of a layer; of a layer that slides its window at the prompt's end."""
        start, places = each.start, prompt.wanted[(prompt.wanted >= each.start) & (prompt.wanted < each.end)]
        if layer.window is not None:
            start, places = min(max(start, each.tokens - layer.window + 1), each.end), places[:0]
        asked = queries[(places - each.start).to(queries.device)]
        return Part(start, each.end, keys[start - each.start :], values[start - each.start :], asked, places)

    def _reserve(self, each: HandoffPass, prompt: Prompt, here: Part) -> None:
        """Raise CacheError if all that will be held of a prompt is too much beside the others."""
        token, query = (states.shape[1:].numel() * states.itemsize for states in (here.keys, here.queries))
        for layer in self.layers.values():
            if layer.window is None:
                prompt.reserved += 2 * token * each.tokens + query * len(prompt.wanted)
            else:
                prompt.reserved += 2 * token * min(layer.window - 1, each.tokens)
        others = sum(other.reserved for other in self._prompts.values()) - prompt.reserved
        if prompt.reserved + others > self._limit:
            raise CacheError(
                f"its {each.tokens} tokens, held until the last is computed, take {prompt.reserved:,} bytes beside {others:,} "
                f"of other prompts, the limit is {self._limit:,}: raise handoff_gib, or let vLLM compute the whole prompt in "
                "one pass (--max-num-batched-tokens), and nothing of it is held"
            )

    def finish(self) -> None:
        """The forward pass is over: prompts that were computed to their end are stored, and their answers written."""
        for each in self._passes:
            prompt = self._prompts.get(each.request)
            if prompt is None or prompt.error:
                continue
            if each.last:
                self._alone(each, self._store_prompt, prompt)
                self._prompts.pop(each.request, None)
            else:
                prompt.heard = each.end
        self._passes, self._rows = (), {}

    def _store_prompt(self, each: HandoffPass, prompt: Prompt) -> None:
        if len(prompt.kept) != len(self.layers):
            heard = f"{len(prompt.kept)} of {len(self.layers)} layers were heard"
            raise CacheError(f"{heard}: the connector does not fit this model")
        started = time.perf_counter()
        rotations = [self._rotation if layer.window is None else self._sliding for layer in self._in_order()]
        states = flat(prompt.kept, each.tokens, rotations)
        made, budget = each.asked.made()
        header = header_of(states, self._config, policy=made.spec, budget=str(budget), name="handoff")
        context = self._store.add(header, states, each.ids)
        times = {"choose_seconds": round(prompt.seconds, 4), "store_seconds": round(time.perf_counter() - started, 4)}
        self._tickets.put(each.ticket, {CONTEXT_PARAM: context.id, "kept": context.kept, "seen": context.seen, **times})

    def forget(self, requests: Iterable[str]) -> None:
        """These requests are over, whatever became of them."""
        for name in requests:
            self._prompts.pop(name, None)

    def _alone(self, each: HandoffPass, do: Callable[..., None], *given: Any) -> None:
        """One request that fails must not end the engine: its error goes into its answer."""
        try:
            do(each, *given)
        except Exception as error:  # a part of a policy, the store or the config may raise anything
            if not isinstance(error, WinnowError):
                logger.exception("handoff of request %s failed", each.request)
            self._fail(each, str(error) if isinstance(error, WinnowError) else f"{type(error).__name__}: {reason(error)}")

    def _fail(self, each: HandoffPass, why: str) -> None:
        prompt = self._prompts.setdefault(each.request, Prompt(None, torch.arange(0)))  # type: ignore[arg-type]  # never asked
        prompt.error, prompt.layers, prompt.kept, prompt.reserved = why, [], [], 0
        try:
            self._tickets.put(each.ticket, {ERROR_PARAM: why})
        except WinnowError:
            logger.exception("the answer of request %s cannot be written", each.request)


def rows_of(each: HandoffPass, slots: Tensor) -> slice | Tensor:
    """Which rows of a forward pass are a request's tokens, by the slots ``[T]`` that they are stored in.

    A slice if they follow each other, rows ``[t]`` if not: they may stand in any order. Raises CacheError if one is missing.
    """
    here, order = slots.cpu().long().sort()
    wanted = torch.tensor(each.slots())
    at = torch.searchsorted(here, wanted).clamp(max=len(here) - 1)
    if not bool((here[at] == wanted).all()):
        raise CacheError("its tokens are not where vLLM said they are: the connector does not fit this release of vLLM")
    rows = order[at]
    first = int(rows[0])
    side_by_side = bool((rows == torch.arange(first, first + len(rows))).all())
    return slice(first, first + len(rows)) if side_by_side else rows.to(slots.device)


def joined(parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[t, H, D]`` of parts that follow each other, on the device of the last."""
    device = parts[-1].keys.device
    together = [
        torch.cat([states.to(device) for states in every])
        for every in zip(*((part.queries, part.keys, part.values) for part in parts), strict=True)
    ]
    return together[0], together[1], together[2]
