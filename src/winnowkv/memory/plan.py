"""How much memory requests need: bytes of keys and values from the shapes of a model's layers, before anything is loaded.

What is counted. A request *at rest*, its prompt read, holds what the policy keeps in the layers that are compressed and the
last ``window`` tokens in those that slide. *At its worst*, while the prompt is read, it holds one layer whole beside the
ceilings (:meth:`Policy.ceilings`) of the compressed layers before it. Quantization comes at the end of the prompt. Prompts are
read one at a time, so a batch of ``B`` needs ``B - 1`` requests at rest and one at its worst.

What is not: activations, logits, what the framework itself takes, the entries of generated tokens, and padding. Policies
with budgets of single heads pad the heads of a layer to the longest, and so hold more than they keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from winnowkv.budget import Asked, Budget
from winnowkv.cache.quantized import stored_bytes
from winnowkv.errors import BudgetError, InputError
from winnowkv.models.info import Fingerprint
from winnowkv.policies import Policy, Prompt
from winnowkv.scoring.allocate import uniform
from winnowkv.types import Entries, Quantization


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one layer. ``window``: tokens that it slides over, None for a layer that is compressed."""

    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None

    def kv_bytes(self, entries: Entries, itemsize: int, stored: Quantization | None = None) -> int:
        """Bytes of that many entries per KV head, in numbers of ``itemsize`` bytes or quantized.

        Quantized, a fraction is rounded up and every head taken to keep the same; where heads or layers share
        by prompt, a scale more or less for each of them is possible.
        """
        if stored is None:
            return int(entries * self.kv_heads) * (self.key_size + self.value_size) * itemsize
        keys = stored_bytes(math.ceil(entries), self.key_size, stored, itemsize, per_channel=True)
        return self.kv_heads * (keys + stored_bytes(math.ceil(entries), self.value_size, stored, itemsize, per_channel=False))


@dataclass(frozen=True)
class Shape:
    """What a plan knows of a model: its layers, first to last, and the bytes of a number.

    ``positions``: most tokens that it has positions for, None where its config does not say.
    """

    layers: tuple[LayerShape, ...]
    itemsize: int
    parameters: int
    positions: int | None
    fingerprint: Fingerprint

    @property
    def compressed(self) -> list[LayerShape]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if layer.window is None]

    def sliding_bytes(self, tokens: int) -> int:
        """What the other layers hold of a sequence of ``tokens``."""
        return sum(
            layer.kv_bytes(min(layer.window, tokens), self.itemsize) for layer in self.layers if layer.window is not None
        )

    def full_bytes(self, tokens: int) -> int:
        """A request of ``tokens`` at rest, of which nothing was evicted."""
        return self.sliding_bytes(tokens) + sum(layer.kv_bytes(tokens, self.itemsize) for layer in self.compressed)


@dataclass(frozen=True)
class Need:
    """Bytes of one request: at rest in compressed layers and in sliding ones, and in both at its worst."""

    kept: int
    sliding: int
    peak: int

    @property
    def rest(self) -> int:
        """At rest."""
        return self.kept + self.sliding

    def of_batch(self, batch: int) -> int:
        """Of so many requests at once, whose prompts are read one at a time."""
        return (batch - 1) * self.rest + self.peak

    def largest_batch(self, free: int) -> int:
        """How many requests fit into ``free`` bytes."""
        return 1 + (free - self.peak) // self.rest if free >= self.peak else 0


def need(shape: Shape, policy: Policy, budget: Budget, tokens: int) -> Need:
    """What a prompt of ``tokens`` needs. Raises BudgetError where the budget cannot hold sinks and recent window.

    Layers of a policy whose ceilings pass its budget share it by prompt: they are taken to end alike.
    """
    layers = shape.compressed
    prompt = Prompt(tokens, len(layers), budget.entries(tokens))
    limits: Sequence[Entries] = uniform(prompt.layers, tokens)
    ends = limits
    if policy.evicts and prompt.budget < tokens and tokens > policy.observe:  # else prefill keeps everything
        policy.check(prompt)
        limits = [min(ceiling, tokens) for ceiling in policy.ceilings(prompt)]
        ends = limits if sum(limits) == prompt.total else uniform(prompt.layers, prompt.budget)
    kept = sum(layer.kv_bytes(n, shape.itemsize, policy.quantize) for layer, n in zip(layers, ends, strict=True))
    sliding = shape.sliding_bytes(tokens)
    slides = sum(
        layer.kv_bytes(slid(layer.window, tokens), shape.itemsize) for layer in shape.layers if layer.window is not None
    )
    bound = policy.peak_entries(prompt) * max(layer.kv_bytes(1, shape.itemsize) for layer in shape.layers) + slides
    return Need(kept, sliding, max(min(peak_bytes(shape, limits, tokens), bound), kept + sliding))


def peak_bytes(shape: Shape, ceilings: Sequence[Entries], tokens: int) -> int:
    """The most bytes while a prompt is read: every layer in its turn whole, compressed ones before it at their ceilings."""
    held, most, limits = 0, 0, iter(ceilings)
    for layer in shape.layers:
        whole = layer.kv_bytes(tokens, shape.itemsize)
        most = max(most, held + whole)
        held += layer.kv_bytes(next(limits) if layer.window is None else slid(layer.window, tokens), shape.itemsize)
    return most


def slid(window: int, tokens: int) -> int:
    """Entries whose storage a sliding layer holds behind a prompt; cache.py leaves a little more than the window alone."""
    return tokens if tokens <= 2 * (window - 1) else window - 1


def largest(fits: Callable[[int], bool], asked: int, limit: int) -> int:
    """The most tokens of a prompt, up to ``limit``, that fit; 0 where none do.

    Below ``asked`` a prompt may be too short for its budget (BudgetError), above it never too long: what is
    searched there is the first that is too large.
    """

    def small(tokens: int) -> bool:
        try:
            return fits(tokens)
        except BudgetError:
            return tokens < asked

    low, high = (asked, limit) if small(asked) else (0, asked - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if small(middle) else (low, middle - 1)
    try:
        return low if low and fits(low) else 0
    except BudgetError:
        return 0


@dataclass(frozen=True)
class Fit:
    """What a policy needs at a budget, and what of it fits. Plain data, in bytes and tokens.

    Attributes
    ----------
    entries: per layer and KV head, mean over the compressed layers.
    kept_bytes, sliding_bytes, peak_bytes: of one request, see :class:`Need`.
    needed_bytes: of the batch at its worst, with the weights where they are counted.
    largest_batch: requests of the context asked; largest_context: tokens of each request of the batch asked.
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


@dataclass(frozen=True)
class MemoryPlan:
    """``batch`` requests of ``context`` tokens at once in ``memory`` bytes, ``weights`` of which are taken.

    Raises InputError where the context passes the model's positions.
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

    def fit(self, spec: str, policy: Policy, asked: Asked | None) -> Fit:
        """One policy at one budget, None for what evicts nothing.

        Raises BudgetError where the budget cannot hold sinks and recent window.
        """
        budget, free = Budget.of(1.0 if asked is None else asked), self.memory - self.weights

        def at(tokens: int) -> Need:
            return need(self.shape, policy, budget, tokens)

        one = at(self.context)
        limit = self.shape.positions or max(self.memory, self.context)  # a token takes more than a byte
        needed = one.of_batch(self.batch)
        return Fit(
            policy=spec,
            budget=asked,
            quantize=policy.quantize,
            entries=budget.entries(self.context),
            kept_bytes=one.kept,
            sliding_bytes=one.sliding,
            peak_bytes=one.peak,
            needed_bytes=self.weights + needed,
            fits=needed <= free,
            largest_batch=one.largest_batch(free),
            largest_context=largest(lambda tokens: at(tokens).of_batch(self.batch) <= free, self.context, limit),
        )
