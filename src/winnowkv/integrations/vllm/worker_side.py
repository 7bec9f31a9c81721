"""The connector's half in vLLM's workers: contexts from the store, kept in memory, and written into the paged cache."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from winnowkv.contexts.flat import FlatStates
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import UnsupportedEngineError, WinnowError
from winnowkv.integrations.vllm.scheduler_side import Load

logger = logging.getLogger(__name__)


class ContextMemory:
    """Contexts that a worker read, with the KV heads of its own; no more than ``limit`` bytes, the least recently used go."""

    def __init__(self, store: ContextStore, limit: int, rank: int = 0, ranks: int = 1) -> None:
        self.store, self.limit, self.rank, self.ranks = store, limit, rank, ranks
        self.reads = 0  # of the store
        self._held: OrderedDict[str, FlatStates] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(states.keys.nbytes + states.values.nbytes for states in self._held.values())

    def states(self, context: str) -> FlatStates:
        """Keys and values of this worker's heads. Raises InputError or CacheError as :meth:`ContextStore.states`."""
        if context in self._held:
            self._held.move_to_end(context)
            return self._held[context]
        self.reads += 1
        whole = self.store.states(context)
        heads = own_heads(whole.keys.shape[2], self.rank, self.ranks)
        mine = whole
        if self.ranks > 1:
            mine = FlatStates(whole.keys[:, :, heads].clone(), whole.values[:, :, heads].clone(), whole.seen)
        self._held[context] = mine
        while self._held and self.bytes > self.limit:
            self._held.popitem(last=False)
        return mine


def own_heads(heads: int, rank: int, ranks: int) -> slice:
    """The KV heads of one of ``ranks`` tensor-parallel workers; fewer heads than workers are held by several."""
    if heads >= ranks:
        each = heads // ranks
        return slice(rank * each, (rank + 1) * each)
    first = rank * heads // ranks
    return slice(first, first + 1)


def load(memory: ContextMemory, loads: Sequence[Load], layers: Mapping[int, Any], dtype: torch.dtype) -> set[int]:
    """Write what is to be loaded into the paged cache; returns the blocks of what could not be.

    ``layers``: vLLM's attention layers of this worker, by their number in the model. The backend of each writes its own cache,
    so that its layout stays its own affair.
    """
    failed: set[int] = set()
    for one in loads:
        try:
            states = memory.states(one.context)
        except WinnowError as error:
            logger.error("%s", error)
            failed |= set(one.blocks)
            continue
        last = one.first + len(one.slots)
        for number, layer in layers.items():
            cache = layer.kv_cache
            slots = torch.tensor(one.slots, dtype=torch.int64).to(cache.device)
            keys, values = (part[number, one.first : last].to(cache.device, dtype) for part in (states.keys, states.values))
            layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
    return failed


def check_layers(layers: Mapping[int, Any], expected: int, heads: int, block: int) -> None:
    """Raise UnsupportedEngineError unless each of vLLM's attention layers can be given keys and values of a context.

    ``heads``: KV heads of this worker. ``block``: tokens of a block, as the scheduler counts slots.
    """
    if len(layers) != expected:
        raise UnsupportedEngineError(f"{len(layers)} of {expected} layers have attention of the usual kind: contexts need all")
    for number, layer in layers.items():
        name = type(layer.impl).__name__
        if not hasattr(layer.impl, "do_kv_cache_update"):
            raise UnsupportedEngineError(
                f"layer {number}: {name} cannot be given keys and values: use another attention backend"
            )
        if layer.num_kv_heads != heads:
            raise UnsupportedEngineError(f"layer {number} has {layer.num_kv_heads} KV heads, {heads} were expected")
        if block not in layer.kv_cache.shape:
            shape = tuple(layer.kv_cache.shape)
            raise UnsupportedEngineError(f"layer {number}: {name}'s cache of shape {shape} has no blocks of {block} tokens")
