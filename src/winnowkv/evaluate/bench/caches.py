"""Caches to time, ours and transformers', all filled from the same prompt; and one decode step of each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from winnowkv.budget import Asked, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.quantized import quanto
from winnowkv.cache.reading import prefill
from winnowkv.cache.stacked import stack
from winnowkv.engine.slots import Slots
from winnowkv.errors import WinnowError
from winnowkv.evaluate.bench.clock import Work
from winnowkv.policies import policy as make_policy
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile

QUANTIZED_CACHE_BITS = 4  # transformers' default
BENCH_TASK = "localization"
Filled = TypeVar("Filled", bound=Cache)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the model's weights and keeps the framework's attention while caches of ours are in use."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class PromptCaches:
    """One prompt and the caches that reading it gives; each is read once and copied for decoding."""

    def __init__(self, model: PreTrainedModel, plain: PreTrainedModel, tokenizer: Any, ids: Sequence[int]) -> None:
        self.model, self.plain, self.tokenizer = model, plain, tokenizer
        self.ids = torch.tensor([list(ids)], device=model.device)
        self._native: dict[int, DynamicCache] = {}
        self._compact: dict[tuple[str, Budget], CompactCache] = {}

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.ids.shape[1]

    def read(self, policy: str, budget: Asked) -> CompactCache:
        """Read the prompt into a compact cache as a request would, with the prompt's structure if the policy needs it."""
        task = TaskProfile.of(BENCH_TASK)
        if make_policy(policy).uses_structure:
            task = replace(task, structure=read_structure(self.tokenizer, self.ids[0].tolist()))
        cache = CompactCache(self.model, policy, budget, task=task)
        prefill(self.model, self.ids, cache)
        return cache

    @torch.no_grad()
    def read_plain(self, tokens: int | None = None) -> DynamicCache:
        """Read the prompt, or its first ``tokens``, with transformers alone."""
        cache: DynamicCache = self.plain(self.ids[:, :tokens], use_cache=True, logits_to_keep=1).past_key_values
        return cache

    def compact(self, policy: str, budget: Asked) -> CompactCache:
        """The compact cache of a setting; callers copy it before they decode."""
        key = policy, Budget(budget)
        if key not in self._compact:
            self._compact[key] = self.read(policy, budget)
        return self._compact[key]

    def slots(self, policy: str, budget: Asked, rows: int, room: int, *, compile: bool = False) -> Slots:
        """Slots that hold this prompt in ``rows`` requests, with room for new tokens."""
        cache, slots = self.compact(policy, budget), Slots(self.model, compile=compile)
        for _ in range(rows):
            slots.place(stack([cache]), room)
        return slots

    def dynamic(self, rows: int, tokens: int | None = None) -> DynamicCache:
        """Transformers' default cache with ``rows`` copies of the prompt, or of its first ``tokens``."""
        tokens = tokens or self.tokens
        if tokens not in self._native:
            self._native[tokens] = self.read_plain(tokens)
        cache = copy.deepcopy(self._native[tokens])
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def static(self, room: int) -> StaticCache:
        """Transformers' preallocated cache, with room for new tokens. Raises WinnowError if layers have a sliding window."""
        return self._filled(StaticCache(self.model.config, max_cache_len=self.tokens + room))

    def quantized(self) -> QuantizedCache:
        """Transformers' quantized cache. Raises WinnowError if layers have a sliding window or optimum-quanto is missing."""
        quanto()
        return self._filled(QuantizedCache("quanto", self.model.config, nbits=QUANTIZED_CACHE_BITS))

    def _filled(self, cache: Filled) -> Filled:
        """The cache with the prompt's keys and values in it."""
        layer: Any  # transformers' layers take different things in update()
        source: Any
        for layer, source in zip(cache.layers, self.dynamic(1).layers, strict=True):
            if type(source) is not DynamicLayer:
                raise WinnowError("the model has sliding-window layers, whose prompt cannot be put into another cache")
            layer.update(source.keys, source.values)
        return cache


@torch.no_grad()
def plain_step(model: PreTrainedModel, cache: Cache, rows: int) -> None:
    """One decode step of transformers; the token that is read does not change its time."""
    token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def stepping(model: PreTrainedModel, cache: Cache, rows: int) -> Work:
    """One decode step over a cache, ours or transformers', as work to time."""
    if isinstance(cache, Slots):
        tokens = torch.zeros(rows, dtype=torch.long, device=model.device)
        return lambda: cache.step(tokens)
    return lambda: plain_step(model, cache, rows)


def cache_bytes(cache: Cache) -> int:
    """Bytes of storage of a cache's keys and values."""
    if isinstance(cache, Slots):
        return cache.held_bytes
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(tensor_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def tensor_bytes(tensor: Tensor | None) -> int:
    """Bytes of storage of a tensor, or of the parts of a quantized one."""
    if tensor is None:
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, part)) for part in parts)
    return tensor.untyped_storage().nbytes()
