"""Admission by bytes: what a request needs of the memory for keys and values, and whether it fits beside what is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.chunked import cut
from winnowkv.cache.compression import Compression
from winnowkv.cache.layer import BUFFER_GROWTH
from winnowkv.engine.drafts import Drafts
from winnowkv.engine.request import Ahead, Claim
from winnowkv.engine.sampling import Sampling
from winnowkv.engine.slot_row import DecodeLimit
from winnowkv.engine.slots import Slots
from winnowkv.errors import InputError
from winnowkv.memory.looking import asked_bytes, looking_need, query_bytes
from winnowkv.memory.plan import Shape, need
from winnowkv.prompt.task import TaskProfile


class Admission:
    """Claims of requests, compared with a limit.

    Parameters
    ----------
    shape: the model's.
    kv_memory: most bytes of keys and values; None for no limit.
    prefill_chunk, prefill_ceiling: as for :class:`~winnowkv.engine.engine.Engine`.
    """

    def __init__(
        self,
        shape: Shape,
        kv_memory: int | None = None,
        prefill_chunk: int | None = None,
        prefill_ceiling: int | float | None = None,
    ) -> None:
        self.kv_memory = kv_memory
        self._shape = shape
        self._chunk, self._ceiling = prefill_chunk, prefill_ceiling

    def accept(
        self,
        compression: Compression,
        tokens: int,
        sampling: Sampling,
        task: TaskProfile,
        slots: Slots,
        limit: DecodeLimit | None = None,
    ) -> Claim:
        """The claim of a prompt of ``tokens``; if its policy looks and that can never fit, the lean one, with a note.

        ``limit``: its decode budget.
        Raises InputError if a request does not fit even into empty slots, and what :meth:`claim` raises.
        """
        claim = self.claim(compression, tokens, sampling, task, limit)
        least = self._alone(claim, sampling.n, slots)
        if self.kv_memory is None or least <= self.kv_memory:
            return claim
        if not compression.policy.looks:
            raise self.too_small(least, tokens, sampling)
        lean = self.claim(replace(compression, policy=compression.policy.lean()), tokens, sampling, task, limit)
        if (lean_least := self._alone(lean, sampling.n, slots)) > self.kv_memory:
            raise self.too_small(lean_least, tokens, sampling)
        times = f" for each of n={sampling.n} choices" if sampling.n > 1 else ""
        note = (
            f"{compression.asked}: while it looks, a prompt of {tokens} tokens{times} needs {least} bytes, kv_memory is "
            f"{self.kv_memory}: the answer was made without lookahead, draft and refit; give kv_memory={least} or more"
        )
        return replace(lean, note=note)

    def accept_after(
        self, after: CompactCache, tokens: int, sampling: Sampling, slots: Slots, limit: DecodeLimit | None = None
    ) -> Claim:
        """The claim of ``tokens`` that go on from a document's cache, of which the request needs a copy.

        ``limit``: its decode budget, which ``tokens`` count in.

        Raises InputError if that does not fit even into empty slots.
        """
        layers, whole = after.compact_layers, after.get_seq_length() + tokens
        entries = [layer.length + tokens for layer in layers]
        peak = sum(layer.entry_bytes * (held + BUFFER_GROWTH) for layer, held in zip(layers, entries, strict=True))
        for layer in self._shape.layers:
            if layer.window is not None:
                peak += layer.kv_bytes(min(whole, layer.window + tokens), self._shape.itemsize)
        room = sampling.max_new_tokens - 1
        if limit is not None:
            held = layers[0].generated + tokens  # at most: reading them may evict some
            room = limit.columns(held, room) - held
            peak += 2 * limit.observe * query_bytes(self._shape)  # the newest and those before
        claim = Claim(after.compression, peak, entries, room, limit=limit)
        if self.kv_memory is not None and (least := self._alone(claim, sampling.n, slots)) > self.kv_memory:
            raise self.too_small(least, whole, sampling)
        return claim

    def whole_bytes(self, tokens: int) -> int:
        """Bytes of a prompt of which nothing is evicted."""
        return prefill_bytes(self._shape, tokens, tokens)

    def check_fits(self, size: int, what: str) -> None:
        """Raise InputError if so many bytes can never be free."""
        if self.kv_memory is not None and size > self.kv_memory:
            raise InputError(f"{what} needs {size} bytes of keys and values, kv_memory is {self.kv_memory}: give more")

    def claim(
        self,
        compression: Compression,
        tokens: int,
        sampling: Sampling,
        task: TaskProfile,
        limit: DecodeLimit | None = None,
    ) -> Claim:
        """What a prompt of ``tokens`` needs. Raises BudgetError and InputError if budget or chunks cannot serve it."""
        policy, budget, layers = compression.policy, compression.budget, len(self._shape.compressed)
        peak = need(self._shape, policy, budget, tokens, task).peak
        prompt = compression.prompt(tokens, layers, task)
        evicts, whole = policy.evicts_from(prompt), tokens
        kept = prompt.budget if evicts else tokens
        if policy.per_head or policy.looks:  # heads are padded to the longest, which may keep the whole prompt
            peak = prefill_bytes(self._shape, tokens, tokens)
        if self._chunk is not None:
            chunks = cut(compression, prompt, self._chunk, self._ceiling)
            kept, whole = min(kept, chunks.most), chunks.most
            if len(chunks.lengths) > 1:  # every layer holds all entries that are left until the last chunk was read
                peak = prefill_bytes(self._shape, chunks.most, self._chunk)
        new = sampling.max_new_tokens - 1
        claim = Claim(compression, peak, self.equal_entries(kept), limit.columns(0, new) if limit else new, limit=limit)
        if not policy.looks:
            return claim
        if budget.target is not None:  # its budget is not known yet: bound as a prompt of which something goes
            least = max(policy.minimum_budget(prompt), policy.sinks + policy.observation_window(prompt))
            prompt = replace(prompt, budget=min(least, tokens))
            evicts = policy.evicts_from(prompt)
        bound = policy.bind(self._shape.model_info, prompt)
        if not evicts or not (policy.lookahead or policy.draft):  # it chooses as soon as the prompt is read
            return replace(claim, peak=peak + asked_bytes(self._shape, bound))
        copied = self.equal_entries(tokens if policy.per_head else kept)
        looking = looking_need(self._shape, bound, whole, peak, copied, sampling.max_new_tokens)
        return replace(claim, peak=looking.cache, looking=Ahead(looking.cache, claim.columns, looking.copy, claim.observe))

    def kept_entries(self, compression: Compression, tokens: int, task: TaskProfile) -> list[int]:
        """What each compressed layer keeps of a prompt of ``tokens`` without chunks, equally many."""
        policy, layers = compression.policy, len(self._shape.compressed)
        prompt = compression.prompt(tokens, layers, task)
        return self.equal_entries(prompt.budget if policy.evicts_from(prompt) else tokens)

    def equal_entries(self, entries: int) -> list[int]:
        """That many entries in each compressed layer."""
        return [entries] * len(self._shape.compressed)

    def _alone(self, claim: Claim, rows: int, slots: Slots) -> int:
        """The memory in which a request of so many choices just fits, into empty slots."""
        if claim.looking is not None:
            return self.most_bytes(slots, [claim.looking] * rows, alone=True)
        return max(claim.peak, slots.bytes_alone(claim.entries, claim.room, rows, claim.observe))

    def too_small(self, least: int, tokens: int, sampling: Sampling) -> InputError:
        """The error of a request that needs ``least`` bytes and can never fit."""
        times, fewer = (f" for each of n={sampling.n} choices", ", or a lower n") if sampling.n > 1 else ("", "")
        return InputError(
            f"a prompt of {tokens} tokens with {sampling.max_new_tokens} new ones{times} needs {least} bytes of keys and "
            f"values, kv_memory is {self.kv_memory}: give kv_memory={least} or more, a smaller budget, or lower "
            f"max_new_tokens{fewer}"
        )

    def can_read(self, peak: int, held: int) -> bool:
        """Whether something that needs ``peak`` bytes can be read while ``held`` bytes are taken."""
        return self.kv_memory is None or held + peak <= self.kv_memory

    def can_place(
        self,
        columns: Sequence[int],
        slots: Slots,
        rows: int,
        ahead: Sequence[Ahead] = (),
        held: int = 0,
        observe: int = 0,
    ) -> bool:
        """Whether the slots can take more rows, each with so many columns of each compressed layer, for entries and new tokens.

        ``ahead``: choices that will get rows of their own later, whatever the order; ``held``: bytes that stay beside;
        ``observe``: queries that each of these rows keeps.
        """
        if self.kv_memory is None:
            return True
        return held + self.most_bytes(slots, ahead, columns, rows, observe) <= self.kv_memory

    def most_bytes(
        self,
        slots: Slots,
        ahead: Sequence[Ahead],
        columns: Sequence[int] = (),
        rows: int = 0,
        observe: int = 0,
        *,
        alone: bool = False,
    ) -> int:
        """Most bytes from when ``rows`` more are placed until the choices ``ahead`` have their rows, in whatever order.

        Each of these either holds its own cache, and a row of the slots of drafts, or has a row, which may be as wide as the
        widest of all. ``alone``: with empty slots.
        """
        in_slots = slots.bytes_alone if alone else slots.bytes_with
        drafts = widest([one.draft for one in ahead])
        draft = slots.bytes_alone(drafts, 0) if drafts else 0  # those have no more columns than these
        own = sorted((one.cache + (draft if one.draft else 0) for one in ahead), reverse=True)
        every, most = widest([columns, *(one.columns for one in ahead)]), 0
        queries = max((observe, *(one.observe for one in ahead)))
        for placed in range(len(ahead) + 1):
            if rows + placed:
                size = in_slots(every if placed else columns, 0, rows + placed, queries if placed else observe)
            else:
                size = 0 if alone else slots.held_bytes
            most = max(most, size + sum(own[: len(ahead) - placed]))
        return most

    def can_draft(self, columns: Sequence[int], drafts: Drafts, ahead: Sequence[Ahead], held: int, slots: Slots) -> bool:
        """Whether a draft of so many columns may begin: if it fits into what the choices ``ahead`` have claimed for drafts.

        ``held``: all bytes held now. Layers that share a budget may need more: such a draft waits until others have ended.
        Raises InputError if none runs and it does not fit, either.
        """
        if self.kv_memory is None:
            return True
        widths = widest([one.draft for one in ahead])
        needed = drafts.bytes_with(columns) or slots.bytes_alone(columns, 0)
        if needed <= slots.bytes_alone(widths, 0) * sum(bool(one.draft) for one in ahead):
            return True
        if drafts.running:
            return False
        if held + needed > self.kv_memory:
            raise InputError(
                f"a draft needs {held + needed} bytes of keys and values, kv_memory is {self.kv_memory}: give more"
            )
        return True


def widest(columns: Sequence[Sequence[int]]) -> list[int]:
    """The most columns of each layer; those that are empty do not count."""
    return [max(layer) for layer in zip(*(each for each in columns if each), strict=True)]


def prefill_bytes(shape: Shape, entries: int, chunk: int) -> int:
    """Bytes of a prompt of which every layer holds ``entries``; a sliding layer holds at most its window and a chunk."""
    return sum(
        layer.kv_bytes(entries if layer.window is None else min(entries, layer.window + chunk), shape.itemsize)
        for layer in shape.layers
    )
