"""Admission by bytes: what a request needs of the memory for keys and values, and whether it fits beside what is held."""

from __future__ import annotations

from collections.abc import Sequence

from winnowkv.cache.chunked import cut
from winnowkv.cache.compression import Compression
from winnowkv.engine.request import Claim
from winnowkv.engine.sampling import Sampling
from winnowkv.engine.slots import Slots
from winnowkv.errors import InputError
from winnowkv.memory.plan import Shape, need
from winnowkv.prompt.task import TaskProfile


class Admission:
    """Claims of requests, compared with a limit.

    Parameters
    ----------
    shape: the model's. compression: policy and budget of every request.
    kv_memory: most bytes of keys and values; None for no limit.
    prefill_chunk, prefill_ceiling: as for :class:`~winnowkv.engine.engine.Engine`.
    """

    def __init__(
        self,
        shape: Shape,
        compression: Compression,
        kv_memory: int | None = None,
        prefill_chunk: int | None = None,
        prefill_ceiling: int | float | None = None,
    ) -> None:
        self.kv_memory = kv_memory
        self._shape, self._compression = shape, compression
        self._chunk, self._ceiling = prefill_chunk, prefill_ceiling

    def claim(self, tokens: int, sampling: Sampling, task: TaskProfile) -> Claim:
        """What a prompt of ``tokens`` needs. Raises BudgetError and InputError if budget or chunks cannot serve it."""
        policy, budget = self._compression.policy, self._compression.budget
        peak = need(self._shape, policy, budget, tokens, task).peak
        prompt = self._compression.prompt(tokens, len(self._shape.compressed), task)
        kept = prompt.budget if policy.evicts_from(prompt) else tokens
        if policy.per_head:  # heads of a layer are padded to the longest, which may keep the whole prompt
            peak = prefill_bytes(self._shape, tokens, tokens)
        if self._chunk is not None:
            chunks = cut(self._compression, prompt, self._chunk, self._ceiling)
            kept = min(kept, chunks.most)
            if len(chunks.lengths) > 1:  # every layer holds all entries that are left until the last chunk was read
                peak = prefill_bytes(self._shape, chunks.most, self._chunk)
        return Claim(peak, self.equal_entries(kept), sampling.max_new_tokens - 1)

    def kept_entries(self, tokens: int, task: TaskProfile) -> list[int]:
        """What each compressed layer keeps of a prompt of ``tokens`` without chunks, equally many."""
        policy, layers = self._compression.policy, len(self._shape.compressed)
        prompt = self._compression.prompt(tokens, layers, task)
        return self.equal_entries(prompt.budget if policy.evicts_from(prompt) else tokens)

    def equal_entries(self, entries: int) -> list[int]:
        """That many entries in each compressed layer."""
        return [entries] * len(self._shape.compressed)

    def check_alone(self, claim: Claim, tokens: int, sampling: Sampling, slots: Slots) -> None:
        """Raise InputError if a request does not fit even into empty slots."""
        least = max(claim.peak, slots.bytes_alone(claim.entries, claim.room, sampling.n))
        if self.kv_memory is not None and least > self.kv_memory:
            raise self.too_small(least, tokens, sampling)

    def too_small(self, least: int, tokens: int, sampling: Sampling) -> InputError:
        """The error of a request that needs ``least`` bytes and can never fit."""
        times, fewer = (f" for each of n={sampling.n} choices", ", or a lower n") if sampling.n > 1 else ("", "")
        return InputError(
            f"a prompt of {tokens} tokens with {sampling.max_new_tokens} new ones{times} needs {least} bytes of keys and "
            f"values, kv_memory is {self.kv_memory}: give kv_memory={least} or more, a smaller budget, or lower "
            f"max_new_tokens{fewer}"
        )

    def can_read(self, claim: Claim, held: int) -> bool:
        """Whether a prompt can be read while ``held`` bytes are taken."""
        return self.kv_memory is None or held + claim.peak <= self.kv_memory

    def can_place(self, entries: Sequence[int], room: int, slots: Slots, rows: int) -> bool:
        """Whether the slots can take more rows, each with ``entries`` of each compressed layer and ``room`` for new tokens."""
        return self.kv_memory is None or slots.bytes_with(entries, room, rows) <= self.kv_memory


def prefill_bytes(shape: Shape, entries: int, chunk: int) -> int:
    """Bytes of a prompt of which every layer holds ``entries``; a sliding layer holds at most its window and a chunk."""
    return sum(
        layer.kv_bytes(entries if layer.window is None else min(entries, layer.window + chunk), shape.itemsize)
        for layer in shape.layers
    )
