"""One layer of the compact cache: its entries in place, growing, selected, quantized."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from winnowkv.attention.hooks import COMPACT_OFFSET
from winnowkv.cache.generated import DECODE_BLOCK, check_crop
from winnowkv.cache.quantized import Quantized, quantize, stored_bytes
from winnowkv.errors import CacheError, InputError
from winnowkv.policies.decode_eviction import DecodeEviction
from winnowkv.scoring.select import columns_of, gather_entries, side_by_side, with_later
from winnowkv.types import Padding, Quantization

BUFFER_GROWTH = 64  # entries added to a full buffer at once; copying a small cache every 64 tokens costs nothing


class CompactLayer(CacheLayerMixin):
    """Keys and values of one layer: ``[B, Hkv, capacity, D]`` buffers of which ``length`` columns are in use.

    Rows of a batch, and heads of a layer, that keep fewer entries than the longest are
    right-aligned; ``valid`` (``[B, 1 or Hkv, capacity]``, None if all are) marks what they
    really hold. ``positions`` are the prompt positions kept, per row ``[H, n]`` with -1 in
    front of a shorter head's, None if a row keeps all.

    Once quantized, the first ``frozen`` of these columns lie in ``quantized`` (keys, values) and the
    buffers hold only what came after, in full precision.

    With a ``decode_budget`` the entries after the prompt's are evicted in blocks by ``decode_eviction``: ``dropped``
    counts those that are gone, ``queries`` ``[B, Hq, w, D]`` are the newest ones while a block nears its end.

    ``shared``: later layers of the model attend to these keys, too, and do so after this layer has evicted.
    ``forked``: whether a :meth:`fork` may use the same buffers, which are then copied before the first write. ``watched``: the
    newest ``queries`` and the ``scale`` are held at all times, so that :meth:`compact` can choose.

    ``hidden``: tokens that an attention mask hid when they came, ``[B, seen]``; None as long as none was.

    While one prompt is read in chunks, ``room`` is how many entries it will hold at most: the buffers have that size
    from the first chunk on and are never copied. 0 else.
    """

    is_sliding = False
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, decode_budget: int | None = None, decode_eviction: DecodeEviction | None = None) -> None:
        super().__init__()
        self.decode_budget = decode_budget
        self.decode_eviction = decode_eviction or DecodeEviction()
        self.shared = False
        self.watched = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None  # type: ignore[assignment]  # as in transformers before the first update
        self.is_initialized = False
        self.length = self.seen = self.prompt = self.dropped = self.room = 0
        self.queries: Tensor | None = None
        self.scale: float | None = None
        self.forked = False
        self.hidden: Tensor | None = None
        self.pads: list[int] = []
        self.valid: Tensor | None = None
        self.positions: list[Tensor | None] = []
        self.quantized: tuple[Quantized, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the prompt's keys and values.

        Most models hand them over token by token with the heads side by side. Copied head by head attention over a long
        prompt is 5% faster, and the copy takes a five-hundredth of that.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.detach().contiguous(), value_states.detach().contiguous()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append in place and return all entries in use."""
        added = key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length = self.seen = self.prompt = added
            self.pads = [0] * key_states.shape[0]
            self.positions = [None] * key_states.shape[0]
            if self.room:
                self._resize(self.room)
            # Views, not the tensors we store: attention tags what it gets, and a tag must not outlive the call.
            return self.keys[:, :, :added], self.values[:, :, :added]
        begin = self.length - self.frozen
        end = begin + added
        if end > self.keys.shape[2] or self.forked:
            self._resize(end + BUFFER_GROWTH)
        self.keys[:, :, begin:end] = key_states.detach()
        self.values[:, :, begin:end] = value_states.detach()
        if self.valid is not None:
            self.valid[..., self.length : self.length + added] = True
        self.length, self.seen = self.length + added, self.seen + added
        if self.hidden is not None:
            self.hidden = torch.nn.functional.pad(self.hidden, (0, added))
        if self.room:
            self._extend_prompt()
        return self.entries_in_use()

    def _extend_prompt(self) -> None:
        new = torch.arange(self.prompt, self.seen, dtype=torch.int32, device=self.keys.device)[None]
        self.positions = [None if held is None else torch.cat([held, new], 1) for held in self.positions]
        self.prompt = self.seen

    def _resize(self, columns: int) -> None:
        def resized(buffer: Tensor, capacity: int, used: int) -> Tensor:
            fresh = buffer.new_empty(*buffer.shape[:2], capacity, *buffer.shape[3:])
            fresh[:, :, :used] = buffer[:, :, :used]
            return fresh

        used, frozen = self.length - self.frozen, self.frozen
        self.keys, self.values = resized(self.keys, columns, used), resized(self.values, columns, used)
        self.valid = None if self.valid is None else resized(self.valid, frozen + columns, self.length)
        self.forked = False

    def fork(self) -> CompactLayer:
        """A layer with the same entries that goes on by itself. Both use the same storage until one of them writes."""
        other = copy(self)
        other.pads, other.positions = list(self.pads), list(self.positions)
        self.forked = other.forked = True
        return other

    @property
    def frozen(self) -> int:
        """Columns that are quantized; none before the end of prefill."""
        return self.quantized[0].entries if self.quantized else 0

    def entries_in_use(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, length, D]``: views of the buffers, or new tensors if entries are quantized."""
        used = self.length - self.frozen
        recent = self.keys[:, :, :used], self.values[:, :, :used]
        if not self.quantized:
            return recent
        keys, values = (torch.cat([part.dequantize(), new], 2) for part, new in zip(self.quantized, recent, strict=True))
        return keys, values

    def quantize(self, stored: Quantization) -> None:
        """Store what stays of the prompt in fewer bits, once; what comes after it stays as it is."""
        states, end = self.entries_in_use(), self.length - self.generated
        valid = None if self.valid is None else self.valid[..., :end]
        self.quantized = tuple(
            quantize(part[:, :, :end], stored, per_channel=is_keys, valid=valid)
            for part, is_keys in zip(states, (True, False), strict=True)
        )
        self.keys, self.values = (part[:, :, end:].clone() for part in states)

    def mark(self, padding: Padding, added: int) -> None:
        """Honour a 2D padding mask for the ``added`` newest entries; at prefill it also gives the rows' padding."""
        padding = padding.to(self.keys.device, torch.bool)
        newest = padding[:, -added:]
        if self.valid is None:
            capacity = self.frozen + self.keys.shape[2]
            self.valid = torch.ones(newest.shape[0], 1, capacity, dtype=torch.bool, device=self.keys.device)
        self.valid[:, :, self.length - added : self.length] = newest[:, None]
        if self.seen == added:
            lengths = newest.sum(-1)
            if not torch.equal(newest, newest.sort(dim=-1).values):
                raise InputError("the attention mask has padding after or inside a prompt: pad on the left")
            if not lengths.all():
                raise InputError("a row of the batch is padding only: every prompt needs at least one token")
            self.pads = [added - n for n in lengths.tolist()]

    def check_past(self, padding: Padding, added: int) -> None:
        """Raise InputError if a mask hides tokens that it did not hide when they came: their entries cannot be taken out."""
        mask = ~padding.to(self.keys.device, torch.bool)
        before = self.seen - added
        known = self.hidden
        if known is None:
            pads = torch.tensor(self.pads, device=mask.device)[:, None]
            known = torch.arange(self.seen, device=mask.device) < pads
        late = (mask & ~known)[:, :before]
        if bool(late.any()):
            row, token = late.nonzero()[0].tolist()
            raise InputError(
                f"attention_mask hides token {token} of row {row}, which the cache has read already: a compact cache cannot "
                "hide it afterwards; leave the mask as it was when the token came, or read the prompt again"
            )
        self.hidden = torch.cat([known[:, :before], mask[:, before:]], 1)

    def keep(self, positions: list[Tensor | None], *, dense: bool = False) -> None:
        """Evict all prompt entries but these: per row ``[H, n]`` prompt positions, ascending; None keeps the row whole.

        ``dense``: one row, whose heads keep equally many; to find that out the host would have to wait for an accelerator.
        """
        later = self.generated  # entries after the prompt's, which stay
        end, before = self.length - later, self.valid
        rows = [
            columns_of(wanted, held, self.prompt - pad, end, self.keys.device, dense=dense)
            for wanted, held, pad in zip(positions, self.positions, self.pads, strict=True)
        ]
        self.valid, columns = None, rows[0][None]
        if not dense:
            columns = side_by_side(rows)
            valid = columns >= 0
            self.valid, columns = None if bool(valid.all()) else valid, columns.clamp(min=0)
        if later:
            newest = torch.arange(end, self.length, device=columns.device)
            columns = torch.cat([columns, newest.expand(*columns.shape[:2], -1)], -1)
            self.valid = with_later(self.valid, before, end, self.length, columns)
        self.keys, self.values = gather_entries((self.keys, self.values), columns)
        if self.valid is not None:  # not a number there would pass every mask
            for states in (self.keys, self.values):
                states.masked_fill_(~self.valid[..., None], 0)
        self.length = self.keys.shape[2]
        self.forked = False
        self.positions = [None if p is None else p.to(torch.int32) for p in positions]

    def replace_values(self, rows: Sequence[Tensor | None]) -> None:
        """Put values ``[Hkv, n, D]`` in the place of those of each row's last ``n`` prompt entries; None changes none."""
        end = self.length - self.generated
        for row, values in enumerate(rows):
            if values is not None:
                self.values[row, :, end - values.shape[1] : end] = values

    def drop(self, stays: Tensor) -> None:
        """Between the chunks of one prompt: evict all entries but these, ascending ``[n]`` counted from the first; in place."""
        stays = stays.to(self.keys.device)
        for states in (self.keys, self.values):
            states[:, :, : len(stays)] = states.index_select(2, stays)
        (held,) = self.positions
        self.positions = [stays.to(torch.int32)[None] if held is None else held.index_select(1, stays)]
        self.length = len(stays)

    @property
    def generated(self) -> int:
        """Entries held of the tokens after the prompt."""
        return self.seen - self.prompt - self.dropped

    def trim(self, queries: Tensor, scale: float) -> None:
        """After a step past the prompt: evict down to the decode budget once a block of entries is above it."""
        if self.decode_budget is None and not self.watched:
            return
        observe = self.decode_eviction.observe
        limit = self.seen + 1 if self.decode_budget is None else self.decode_budget + DECODE_BLOCK
        if self.generated <= limit - observe and not self.watched:
            self.queries = None
            return
        self.scale = scale
        earlier = [] if self.queries is None else [self.queries]
        self.queries = torch.cat([*earlier, queries[:, :, -observe:].detach()], 2)[:, :, -observe:]
        if self.decode_budget is not None and self.generated >= limit:
            self._evict_generated(self.decode_budget)

    def compact(self, entries: int) -> None:
        """Evict what came after the prompt down to so many entries by the newest queries, if the layer holds more.

        Raises CacheError if it was not ``watched`` while the newest entry came.
        """
        if self.generated <= entries:
            return
        if self.queries is None or self.scale is None:
            raise CacheError("the newest queries are not at hand, by which compact() chooses: read another turn first")
        if self.forked:
            self._resize(self.length - self.frozen + BUFFER_GROWTH)
        self._evict_generated(entries)

    def _evict_generated(self, entries: int) -> None:
        assert self.queries is not None
        assert self.scale is not None
        used, begin = self.length - self.frozen, self.length - self.generated
        valid = None if self.valid is None else self.valid[..., begin : self.length]
        keys, values = (states[:, :, used - self.generated : used] for states in (self.keys, self.values))
        stays = self.decode_eviction.select(self.queries, keys, values, self.scale, valid, entries)
        self.keep_generated(stays)

    def keep_generated(self, stays: Tensor) -> None:
        """Evict all entries after the prompt's but these, ``[B, Hkv, n]`` counted from the first; in place, unless shared."""
        if self.shared:
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self.valid = None if self.valid is None else self.valid.clone()
        held, n = self.generated, stays.shape[2]
        begin, used = self.length - held, self.length - self.frozen
        for states in (self.keys, self.values):
            columns = stays[..., None].expand(-1, -1, -1, states.shape[3])
            states[:, :, used - held : used - held + n] = states[:, :, used - held : used].gather(2, columns)
        if self.valid is not None:
            self.valid = self.valid.expand(-1, stays.shape[1], -1).contiguous()
            self.valid[..., begin : begin + n] = self.valid[..., begin : self.length].gather(2, stays)
        self.dropped, self.length = self.dropped + held - n, begin + n
        if not self.watched:
            self.queries = None
        if self.keys.shape[2] > self.length - self.frozen + DECODE_BLOCK + BUFFER_GROWTH:  # many tokens came at once
            self._resize(self.length - self.frozen + BUFFER_GROWTH)

    def take_back(self, tokens: int) -> None:
        """Forget the last ``tokens`` of the prompt, all of which every head holds in full precision; the rest is copied."""
        self.length, self.seen, self.prompt = self.length - tokens, self.seen - tokens, self.prompt - tokens
        self.positions = [None if held is None else held[:, : held.shape[1] - tokens] for held in self.positions]
        self._resize(self.length)

    def own(self) -> None:
        """Copy keys and values that are views into something larger (fused projections), so that it can be freed."""
        self.keys, self.values = (
            states.clone() if states.untyped_storage().nbytes() > states.nbytes else states
            for states in (self.keys, self.values)
        )

    def shrink(self) -> None:
        """Free the room that is left in a buffer that grew for what was taken back."""
        if self.keys.shape[2] + self.frozen > self.length + BUFFER_GROWTH:
            self._resize(self.length - self.frozen)

    def counts(self, row: int) -> list[int]:
        """Entries that each KV head of a row holds of the prompt."""
        kept, heads = self.positions[row], self.keys.shape[1]
        if kept is None:
            return [self.prompt - self.pads[row]] * heads
        if self.valid is None:
            return [kept.shape[1]] * heads
        held = (kept >= 0).sum(-1).tolist()
        return held if len(held) == heads else held * heads

    def kept_bytes(self, row: int) -> int:
        """Bytes that a row's entries of the prompt take as they are stored, scales and zero points included."""
        counts = self.counts(row)
        if not self.quantized:
            return sum(counts) * self.entry_bytes // len(counts)
        sizes = (self.keys.shape[3], self.values.shape[3])
        return sum(
            stored_bytes(count, size, part.stored, part.scales.itemsize, per_channel=part.per_channel)
            for count in counts
            for part, size in zip(self.quantized, sizes, strict=True)
        )

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry in full precision: key and value, all KV heads."""
        return sum(states.shape[1] * states.shape[3] * states.itemsize for states in (self.keys, self.values))

    @property
    def held_bytes(self) -> int:
        """Bytes of storage of keys and values, scales and zero points included, and of the queries kept to score."""
        if not self.is_initialized:
            return 0
        states = (self.keys, self.values) if self.queries is None else (self.keys, self.values, self.queries)
        return sum(part.untyped_storage().nbytes() for part in states) + sum(part.held_bytes for part in self.quantized)

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, padding included, as transformers counts them."""
        return self.seen

    def get_mask_sizes(self, queries: Any) -> tuple[int, int]:
        """Physical length with the coming queries; newer releases pass their number, older ones their positions."""
        coming = queries if isinstance(queries, int) else queries.shape[0]
        if coming == 0:
            raise InputError("the prompt is empty: give at least one token")
        return self.length + coming, COMPACT_OFFSET

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over the rows that beam search goes on with."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(len(self.positions), device=self.keys.device).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        if not self.is_initialized:
            return
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)
        self.valid = None if self.valid is None else self.valid.index_select(0, indices)
        self.hidden = None if self.hidden is None else self.hidden.index_select(0, indices)
        self.queries = None if self.queries is None else self.queries.index_select(0, indices)
        self.quantized = tuple(part.select(indices) for part in self.quantized)
        rows = indices.tolist()
        self.positions, self.pads = [self.positions[r] for r in rows], [self.pads[r] for r in rows]

    def crop(self, tokens: int) -> None:
        """Generated tokens can be taken back, evicted entries cannot. Negative: that many; positive: down to that length."""
        back = -tokens if tokens <= 0 else self.seen - tokens
        if back <= 0 or not self.is_initialized:
            return
        if back > self.seen - self.prompt:
            raise CacheError(f"cannot crop {back} tokens: only {self.seen - self.prompt} came after the compressed prompt")
        if self.decode_budget is not None and self.dropped:
            check_crop(back, self.generated - self.decode_budget + self.decode_eviction.recent, self.decode_budget)
        self.length, self.seen = self.length - back, self.seen - back
        self.queries = None if self.queries is None else self.queries[:, :, :-back]
        self.hidden = None if self.hidden is None else self.hidden[:, :-back]
