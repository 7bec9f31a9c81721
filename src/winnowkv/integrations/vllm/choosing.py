"""What stays of a prompt that was heard in vLLM: a policy's choices without a model, and the context's tensors made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from winnowkv.cache.selection import PromptSelection
from winnowkv.contexts.flat import FlatStates, moved, window_states
from winnowkv.errors import CacheError, PolicyError, UnsupportedModelError
from winnowkv.files import reason
from winnowkv.integrations.vllm.handoff import UNEQUAL, HandoffPass
from winnowkv.integrations.vllm.listening import HeardLayer
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import Rotation
from winnowkv.policies.parts import Allocator, LayerStates


def weightless(config: Any) -> Any:
    """The model of a config without weights, but with the real frequencies of its rotation.

    Raises UnsupportedModelError for a config that transformers makes no decoder-only language model of.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        with torch.device("cpu"):
            for path, module in list(model.named_modules()):
                if type(module).__name__.endswith("RotaryEmbedding"):
                    model.set_submodule(path, type(module)(config=module.config))
    except Exception as error:  # what a config that fits no class raises is anything
        raise UnsupportedModelError(f"{type(config).__name__}: how it rotates keys cannot be read: {reason(error)}") from None
    return model


def new_selection(first: HandoffPass, info: ModelInfo, layers: Sequence[HeardLayer]) -> PromptSelection:
    """What will choose from a prompt of which nothing was heard.

    Raises PolicyError, BudgetError and ProfileError as binding a policy does, CacheError for a budget below a window.
    """
    policy, budget = first.asked.made()
    compressed = sum(layer.window is None for layer in layers)
    prompt = policy.prompt_info(budget, first.tokens, compressed, first.asked.task(first.tokens))
    bound = policy.bind(info, prompt)
    if not bound.keeps_equal:
        raise PolicyError(f"{policy.spec}: {UNEQUAL}")
    selection = PromptSelection(bound)
    check_windows(layers, kept_entries(selection), first.tokens)
    return selection


def kept_entries(selection: PromptSelection) -> int:
    """How many entries each layer and head will keep."""
    prompt = selection.bound.prompt
    return prompt.budget if selection.bound.evicts else prompt.tokens


def check_windows(layers: Sequence[HeardLayer], kept: int, tokens: int) -> None:
    """Raise CacheError if a layer that slides sees more tokens than are kept."""
    seen = min(max((layer.window - 1 for layer in layers if layer.window is not None), default=0), tokens)
    if kept < seen:
        raise CacheError(f"{kept} entries are fewer than the {seen} tokens that a sliding layer sees: a budget of {seen} fits")


def at_once(selection: PromptSelection) -> bool:
    """Whether what stays of a layer is known once it was read; else it may wait for layers after it."""
    bound = selection.bound
    return not bound.evicts or (type(bound.parts.allocator) is Allocator and bound.parts.shared is None)


@dataclass
class Kept:
    """What is held of a layer that was read to its end: keys and values ``[Hkv, n, D]``, at ``positions`` ``[1 or Hkv, n]``.

    ``positions`` is None if it is the whole prompt, or a window that nothing is chosen from.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def keep(self, positions: Tensor) -> None:
        """Only these, ``[1 or Hkv, m]``, ascending, of those that are held."""
        heads, positions = self.keys.shape[0], positions.to(self.keys.device).long()
        columns = positions
        if self.positions is not None:
            every = (self.positions.expand(heads, -1).contiguous(), positions.expand(heads, -1).contiguous())
            columns = torch.searchsorted(*every)
        at = columns.expand(heads, -1)[..., None]
        self.keys, self.values = (states.gather(1, at.expand(-1, -1, states.shape[-1])) for states in (self.keys, self.values))
        self.positions = positions

    def to_ram(self) -> None:
        """Off the accelerator."""
        self.keys, self.values = self.keys.cpu(), self.values.cpu()
        self.positions = None if self.positions is None else self.positions.cpu()


def choose(
    selection: PromptSelection, earlier: Sequence[Kept], scale: float, queries: Tensor, keys: Tensor, values: Tensor
) -> Kept:
    """Take in a layer's whole prompt, ``[S, H, D]``, and let go what the policy no longer keeps of it and of the ``earlier``.

    ``earlier`` are the layers before it that are compressed, in order. The states are not copied if all of them stay.
    """
    queries, keys, values = (states.transpose(0, 1)[None] for states in (queries, keys, values))
    here = Kept(keys[0], values[0])
    every = [*earlier, here]
    for at, chosen in selection.observe(LayerStates(len(earlier), queries, keys, values, scale)).items():
        every[at].keep(chosen[0])
    here.to_ram()
    return here


def window(size: int, kept: int, seen: int, keys: Tensor, values: Tensor) -> Kept:
    """Of a layer that slides, ``[t, Hkv, D]`` of the last tokens, those that the next token sees, after zeros."""
    keys, values = (states.transpose(0, 1)[None].cpu() for states in (keys, values))
    keys, values = window_states(size, keys, values, kept, seen)
    return Kept(keys[0], values[0])


def flat(kept: Sequence[Kept], seen: int, rotations: Sequence[Rotation]) -> FlatStates:
    """A context's tensors of what is held of all layers; ``seen`` tokens were read.

    Raises PolicyError if layers hold different numbers of entries.
    """
    lengths = {layer.keys.shape[1] for layer in kept}
    if len(lengths) > 1:
        raise PolicyError(f"layers end with {min(lengths)} to {max(lengths)} entries: {UNEQUAL}")
    by = lengths.pop() - seen
    keys = torch.stack([moved(layer.keys, rotation, by) for layer, rotation in zip(kept, rotations, strict=True)])
    return FlatStates(keys, torch.stack([layer.values.transpose(0, 1) for layer in kept]).contiguous(), seen)
