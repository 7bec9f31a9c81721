"""Caches to time: ours and transformers', all filled from the same prompt, and one decode step of each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from winnowkv.prompt.structure import read_layout
from winnowkv.prompt.task import TaskProfile

BITS = 4  # of transformers' quantized cache, its default
TASK = "localization"


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model over the same weights, whose attention stays the framework's whatever caches of ours are alive."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Source:
    """One prompt, and the caches that reading it leaves; each is read once, and copied for whoever decodes."""

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
        """Read the prompt into a compact cache, as a request would: what the policy asks of the prompt is found out, too."""
        task = TaskProfile.of(TASK)
        if make_policy(policy).by_layout:
            task = replace(task, layout=read_layout(self.tokenizer, self.ids[0].tolist()))
        cache = CompactCache(self.model, policy, budget, task=task)
        prefill(self.model, self.ids, cache)
        return cache

    @torch.no_grad()
    def read_plain(self, tokens: int | None = None) -> DynamicCache:
        """Read the prompt, or so many tokens of it, with transformers alone."""
        return self.plain(self.ids[:, :tokens], use_cache=True, logits_to_keep=1).past_key_values

    def compact(self, policy: str, budget: Asked) -> CompactCache:
        """The compact cache of a setting, to be copied."""
        key = policy, Budget(budget)
        if key not in self._compact:
            self._compact[key] = self.read(policy, budget)
        return self._compact[key]

    def slots(self, policy: str, budget: Asked, rows: int, room: int, *, compile: bool = False) -> Slots:
        """So many requests of this prompt in slots."""
        cache, slots = self.compact(policy, budget), Slots(self.model, compile=compile)
        for _ in range(rows):
            slots.place(stack([cache]), room)
        return slots

    def dynamic(self, rows: int, tokens: int | None = None) -> DynamicCache:
        """Transformers' default cache with so many rows of the prompt, or of its first tokens."""
        tokens = tokens or self.tokens
        if tokens not in self._native:
            self._native[tokens] = self.read_plain(tokens)
        cache = copy.deepcopy(self._native[tokens])
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def static(self, room: int) -> StaticCache:
        """Transformers' preallocated cache, with room for so many new tokens. Raises WinnowError where layers slide."""
        return self._filled(StaticCache(self.model.config, max_cache_len=self.tokens + room))

    def quantized(self) -> QuantizedCache:
        """Transformers' quantized cache. Raises WinnowError where layers slide or optimum-quanto is missing."""
        quanto()
        return self._filled(QuantizedCache("quanto", self.model.config, nbits=BITS))

    def _filled(self, cache: Any) -> Any:
        """The cache with the prompt's keys and values in it."""
        for layer, source in zip(cache.layers, self.dynamic(1).layers, strict=True):
            if type(source) is not DynamicLayer:
                raise WinnowError("the model has sliding-window layers, whose prompt cannot be put into another cache")
            layer.update(source.keys, source.values)
        return cache


@torch.no_grad()
def plain_step(model: PreTrainedModel, cache: Cache, rows: int) -> None:
    """One decode step of transformers; which token is read does not matter to its time."""
    token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def stepping(model: PreTrainedModel, cache: Cache, rows: int) -> Work:
    """One decode step over a cache, ours or transformers', as work to time."""
    if isinstance(cache, Slots):
        tokens = torch.zeros(rows, dtype=torch.long, device=model.device)
        return lambda: cache.step(tokens)
    return lambda: plain_step(model, cache, rows)


def cache_bytes(cache: Cache) -> int:
    """Storage behind the keys and values of a cache."""
    if isinstance(cache, Slots):
        return cache.held_bytes
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(tensor_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def tensor_bytes(tensor: Tensor | None) -> int:
    """Storage behind a tensor, or behind the parts that a quantized one is made of."""
    if tensor is None:
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, part)) for part in parts)
    return tensor.untyped_storage().nbytes()
