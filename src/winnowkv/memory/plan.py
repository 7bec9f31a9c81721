"""How much memory requests need: bytes of keys and values from the shapes of a model's layers, before anything is loaded.

Counted: a request *at rest*, after its prompt was read, holds what the policy keeps in the compressed layers and the last
``window`` tokens in sliding layers. *At its peak*, while the prompt is read, it holds one whole layer beside the prefill
limits (:meth:`Allocator.prefill_limits`) of the compressed layers before it. Entries are quantized at the end of the prompt.
Prompts are read one at a time, so a batch of ``B`` needs ``B - 1`` requests at rest and one at its peak.

A policy that looks (lookahead, draft, refit) holds the whole prompt until it has chosen, with the lookahead's tokens, the
queries that it chooses by, and a draft's compact copy (:mod:`winnowkv.memory.looking`): that is its peak. One request looks
while the others rest.

Not counted: activations, logits, the framework's own memory, entries of generated tokens, and padding. Policies with budgets
per head pad the heads of a layer to the longest, and so hold more than they keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from winnowkv.budget import Asked, Budget
from winnowkv.cache.quantized import stored_bytes
from winnowkv.errors import BudgetError, InputError
from winnowkv.memory.looking import looking_need
from winnowkv.models.info import ModelInfo
from winnowkv.policies import Policy
from winnowkv.prompt.task import TaskProfile
from winnowkv.scoring.allocate import uniform
from winnowkv.types import Entries, Quantization


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one layer. ``window``: tokens of a sliding window, None for a layer that is compressed."""

    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None

    def kv_bytes(self, entries: Entries, itemsize: int, stored: Quantization | None = None) -> int:
        """Bytes of that many entries per KV head, with numbers of ``itemsize`` bytes or quantized.

        If quantized, a fraction of an entry is rounded up and every head is taken to keep equally many. If the prompt decides
        how heads or layers share their budget, each of them may need one scale more or less.
        """
        if stored is None:
            return int(entries * self.kv_heads) * (self.key_size + self.value_size) * itemsize
        keys = stored_bytes(math.ceil(entries), self.key_size, stored, itemsize, per_channel=True)
        return self.kv_heads * (keys + stored_bytes(math.ceil(entries), self.value_size, stored, itemsize, per_channel=False))


@dataclass(frozen=True)
class Shape:
    """What a plan knows of a model: its layers, first to last, and the bytes of a number.

    ``positions``: most tokens that it has positions for, None if its config does not say.
    """

    layers: tuple[LayerShape, ...]
    itemsize: int
    parameters: int
    positions: int | None
    model_info: ModelInfo

    @property
    def compressed(self) -> list[LayerShape]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if layer.window is None]

    def sliding_bytes(self, tokens: int) -> int:
        """Bytes that sliding layers hold of a sequence of ``tokens``."""
        return sum(
            layer.kv_bytes(min(layer.window, tokens), self.itemsize) for layer in self.layers if layer.window is not None
        )

    def window_bytes(self, tokens: int, more: int) -> int:
        """The most bytes that sliding layers hold after a prompt of ``tokens`` while ``more`` are read one by one."""
        return sum(
            layer.kv_bytes(max(slid_entries(layer.window, tokens), min(layer.window, tokens + more)), self.itemsize)
            for layer in self.layers
            if layer.window is not None
        )

    def full_bytes(self, tokens: int) -> int:
        """Bytes of a request of ``tokens`` at rest if nothing is evicted."""
        return self.sliding_bytes(tokens) + sum(layer.kv_bytes(tokens, self.itemsize) for layer in self.compressed)


@dataclass(frozen=True)
class Need:
    """Bytes of one request: at rest in compressed layers, at rest in sliding ones, and in both at its peak.

    ``looking``: held until a policy that looks has chosen; 0 if it does not look. The peak is not below it.
    """

    kept: int
    sliding: int
    peak: int
    looking: int = 0

    @property
    def rest(self) -> int:
        """Bytes at rest, of all layers."""
        return self.kept + self.sliding

    def of_batch(self, batch: int) -> int:
        """Bytes of so many requests at once, whose prompts are read one at a time."""
        return (batch - 1) * self.rest + self.peak

    def largest_batch(self, free: int) -> int:
        """How many requests fit into ``free`` bytes."""
        return 1 + (free - self.peak) // self.rest if free >= self.peak else 0


def need(shape: Shape, policy: Policy, budget: Budget, tokens: int, task: TaskProfile) -> Need:
    """What a prompt of ``tokens`` needs. Raises BudgetError if the budget cannot hold sinks and recent window.

    If a policy's prefill limits add up to more than its budget, the prompt decides how layers share it: they are taken to end
    with equally many entries.
    """
    layers = shape.compressed
    prompt = policy.prompt_info(budget, tokens, len(layers), task)
    bound = policy.bind(shape.model_info, prompt)
    limits: Sequence[Entries] = uniform(prompt.layers, tokens)
    ends = limits
    if bound.evicts:  # else prefill keeps everything
        limits = [min(limit, tokens) for limit in bound.parts.allocator.prefill_limits()]
        ends = limits if sum(limits) == prompt.total else uniform(prompt.layers, prompt.budget)
    kept = sum(layer.kv_bytes(n, shape.itemsize, policy.quantize) for layer, n in zip(layers, ends, strict=True))
    sliding = shape.sliding_bytes(tokens)
    slid_bytes = sum(
        layer.kv_bytes(slid_entries(layer.window, tokens), shape.itemsize) for layer in shape.layers if layer.window is not None
    )
    entry = max(layer.kv_bytes(1, shape.itemsize) for layer in shape.layers)
    most = bound.parts.allocator.peak_entries() * entry + slid_bytes
    if policy.looks and bound.evicts:
        read = peak_bytes(shape, uniform(prompt.layers, tokens), tokens)
        looking = looking_need(shape, bound, tokens, read, [math.ceil(n) for n in ends]).bytes(shape)
        return Need(kept, sliding, looking, looking)
    return Need(kept, sliding, max(min(peak_bytes(shape, limits, tokens), most), kept + sliding))


def peak_bytes(shape: Shape, limits: Sequence[Entries], tokens: int) -> int:
    """Most bytes while a prompt is read: each layer in turn is whole, compressed ones before it at their prefill limits."""
    held, most, each = 0, 0, iter(limits)
    for layer in shape.layers:
        whole = layer.kv_bytes(tokens, shape.itemsize)
        most = max(most, held + whole)
        held += layer.kv_bytes(next(each) if layer.window is None else slid_entries(layer.window, tokens), shape.itemsize)
    return most


def slid_entries(window: int, tokens: int) -> int:
    """Entries whose storage a sliding layer holds after a prompt; cache.py does not cut what is little more than the window."""
    return tokens if tokens <= 2 * (window - 1) else window - 1


def largest_context(fits: Callable[[int], bool], asked: int, limit: int) -> int:
    """The most tokens of a prompt, up to ``limit``, that fit; 0 if none do.

    A prompt longer than ``asked``, which is kept whole as observation window, may have too small a budget (BudgetError):
    it does not fit.
    """

    def small_enough(tokens: int) -> bool:
        try:
            return fits(tokens)
        except BudgetError:
            return False

    low, high = (asked, limit) if small_enough(asked) else (0, asked - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if small_enough(middle) else (low, middle - 1)
    return low if low and small_enough(low) else 0


@dataclass(frozen=True)
class Fit:
    """What a policy needs at a budget, and how much fits into the memory. Plain data, in bytes and tokens.

    Attributes
    ----------
    entries: per layer and KV head, mean over the compressed layers.
    kept_bytes, sliding_bytes, peak_bytes: of one request, see :class:`Need`.
    needed_bytes: of the batch at its peak, with the weights if they are counted.
    lookahead: tokens of the answer for which the whole prompt is held. looking_bytes: held meanwhile, queries and a draft's
        compact copy included; 0 for a policy that does not look.
    largest_batch: most requests of the context asked for.
    largest_context: most tokens of each request, at the batch asked for.
    """

    policy: str
    budget: Asked | None
    quantize: Quantization | None
    entries: int
    kept_bytes: int
    sliding_bytes: int
    peak_bytes: int
    needed_bytes: int
    fits: bool
    largest_batch: int
    largest_context: int
    lookahead: int = 0
    looking_bytes: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """``batch`` requests of ``context`` tokens at once in ``memory`` bytes, of which ``weights`` bytes are taken.

    Raises InputError if the context passes the model's positions.
    """

    shape: Shape
    context: int
    batch: int
    memory: int
    weights: int

    def __post_init__(self) -> None:
        limit = self.shape.positions
        if limit is not None and self.context > limit:
            raise InputError(f"a context of {self.context} tokens passes the model's {limit} positions: give at most {limit}")

    def fit(self, spec: str, policy: Policy, asked: Asked | None, task: TaskProfile | None = None) -> Fit:
        """What one policy needs at one budget; ``asked`` is None for a policy that evicts nothing.

        Raises BudgetError if the budget cannot hold sinks and recent window.
        """
        budget, free = Budget.of(1.0 if asked is None else asked), self.memory - self.weights

        def at(tokens: int) -> Need:
            return need(self.shape, policy, budget, tokens, task or TaskProfile())

        one = at(self.context)
        limit = self.shape.positions or max(self.memory, self.context)  # a token takes more than a byte
        needed = one.of_batch(self.batch)
        most = largest_context(lambda tokens: at(tokens).of_batch(self.batch) <= free, self.context, limit)
        return Fit(
            policy=spec,
            budget=asked,
            quantize=policy.quantize,
            entries=policy.prompt_info(budget, self.context, len(self.shape.compressed), task).budget,
            kept_bytes=one.kept,
            sliding_bytes=one.sliding,
            peak_bytes=one.peak,
            needed_bytes=self.weights + needed,
            fits=needed <= free,
            largest_batch=one.largest_batch(free),
            largest_context=most,
            lookahead=policy.lookahead,
            looking_bytes=one.looking,
        )
