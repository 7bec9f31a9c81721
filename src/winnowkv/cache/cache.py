"""The compact cache: transformers' cache socket. Only this file, layer.py and attention.py know its internals.

Each :class:`CompactLayer` holds unexpanded KV heads of only the entries that stay, grows
in place while tokens are generated, and tells transformers its *logical* length
(tokens seen, hence RoPE positions) and its *physical* one (entries held, hence masks).
"""

from __future__ import annotations

import time
import weakref
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from winnowkv.attention.hooks import BYPASSED, TAG, acquire, check_model, is_routed, known, release
from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.chunked import Chunks, cut
from winnowkv.cache.generated import check_decode_budget
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.quantized import quanto
from winnowkv.cache.session import AutoPlan, PrefillPlan
from winnowkv.cache.stopwatch import Stopwatch
from winnowkv.errors import CacheError, InputError, UnsupportedModelError
from winnowkv.models.calibration import find_profile
from winnowkv.policies import Policy, Prompt, Tasks, resolve
from winnowkv.policies.expected import Expected
from winnowkv.report import Report
from winnowkv.types import Padding, Quantization, Valid

SLACK = 2  # a sliding layer's view is copied out of storage that is larger than so many times itself


class CompactCache(Cache):
    """A KV cache that keeps what a policy selects from each prompt; pass it as ``past_key_values``.

    Parameters
    ----------
    model: a decoder-only transformers model whose attention goes through ``AttentionInterface``.
        While the cache lives the model's attention goes through ours, which hands every other
        cache on to the framework's own function; the model is put back when the cache dies.
    policy: a name, a spec (``"windowkv:group=6"``) or a :class:`Policy`.
    budget: kept entries (int), the kept fraction of the prompt (float), or ``"auto:0.95"``, the smallest that is expected
        to give 95% of the full cache's tokens on this prompt (:class:`~winnowkv.budget.Budget`).
    task: ``"localization"``, ``"aggregation"`` or a :class:`TaskProfile`, for policies that score
        by task; a sequence gives each row of a batch its own.
    quantize: ``"int8"`` or ``"int4"`` stores what stays in 8 or 4 bits when the prompt is read; what
        comes after stays as it is. None does as the policy says. Needs the package optimum-quanto.
    decode_budget: most entries per layer and KV head to hold of what comes after the prompt, at least 64. They are
        evicted in blocks of 64, so up to 63 more are held between; the last 32 stay and, per KV head, those that one
        of the last 32 queries attended to most. The prompt's entries are not touched. None: no limit.
    record: keep the last ``record`` queries of every layer, so that :meth:`replay` can run
        other policies over this prefill; for evaluation.
    hold: keep the model's attention routed while the cache lives. A compress block, which
        routes it for its own time, passes False; its caches end with it.

    Raises
    ------
    PolicyError, BudgetError, UnsupportedModelError
        At once, or when the prompt's length shows that the budget is below sinks + window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy = "winnow",
        budget: Budget | int | float | str = DEFAULT_BUDGET,
        *,
        task: Tasks = None,
        quantize: Quantization | None = None,
        decode_budget: int | None = None,
        record: int = 0,
        hold: bool = True,
    ) -> None:
        check_model(model)
        check_decode_budget(decode_budget)
        self.decode_budget = decode_budget
        fingerprint = self._fingerprint = known(model)
        self.policies = resolve(policy, fingerprint, task)
        if quantize is not None:
            self.policies = [replace(made, quantize=quantize) for made in self.policies]
        self._stored = self.policies[0].quantize
        if self._stored is not None:
            quanto()  # complain now, and load it before the clock runs
        self.budget = Budget.of(budget)
        self._curve = None
        if self.budget.target is not None and self.policies[0].evicts:
            self._curve = find_profile(self.budget.profile, fingerprint).curve(self.policies[0].name)
        self._asked = policy if isinstance(policy, str) else policy.name
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        # Sliding-window layers are small already and stay as the framework made them.
        super().__init__(layers=[CompactLayer(decode_budget) if type(layer) is DynamicLayer else layer for layer in layers])
        compact = [index for index, layer in enumerate(self.layers) if isinstance(layer, CompactLayer)]
        self._slots = {index: slot for slot, index in enumerate(compact)}
        if not self._slots:
            raise UnsupportedModelError(f"{type(model).__name__} has no full-attention layer: nothing can be compressed")
        self._record = record
        self._model = weakref.ref(model)
        self._forget()
        if hold:
            acquire(model)
            weakref.finalize(self, release, model).atexit = False

    def _forget(self) -> None:
        self.report = Report(policy=self._asked, budget=self.budget.asked, quantize=self._stored)
        self._plans: list[PrefillPlan | AutoPlan] | None = None
        self._chunks: Chunks | None = None
        self._settled = False
        self._awaiting: int | None = None
        self._recorded: list[tuple[Tensor, float]] = []
        self._started = self._resumed = 0.0
        self._compressing = Stopwatch()

    def reset(self) -> None:
        """Forget the prompt and what came after it; the next one is compressed afresh, with a report of its own."""
        for layer in self.sliding_layers:
            # Older releases would write zeros into what a replay may share, and go on behind the zeros.
            layer.keys = layer.values = None
            layer.is_initialized = False
        super().reset()
        self._forget()

    def resume(self, report: Report) -> None:
        """Take this cache for one whose prompt is read already, as a snapshot does; its layers are filled after."""
        self.report, self._settled = report, True

    @property
    def model(self) -> PreTrainedModel:
        """The model that this cache serves. Raises CacheError where it is gone."""
        if (model := self._model()) is None:
            raise CacheError("the model of this cache is gone")
        return model

    @property
    def compact_layers(self) -> list[CompactLayer]:
        """The layers whose cache is compressed, first to last."""
        return [layer for layer in self.layers if isinstance(layer, CompactLayer)]

    @property
    def sliding_layers(self) -> list[DynamicSlidingWindowLayer]:
        """The layers that slide over a window of the last tokens and stay as the framework made them."""
        return [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]

    def slot(self, layer_idx: int) -> int:
        """A layer's place among the compressed layers."""
        return self._slots[layer_idx]

    @property
    def held_bytes(self) -> int:
        """Storage behind keys and values of the compressed layers now, room for growth included."""
        return sum(layer.held_bytes for layer in self.compact_layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; the keys returned carry a tag by which attention finds its way back here."""
        if layer_idx not in self._slots:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            layer = self.layers[layer_idx]
            if layer in self.sliding_layers and layer.keys.untyped_storage().nbytes() > SLACK * layer.keys.nbytes:
                # A view of the last tokens keeps the whole prompt in memory. One token more than the window is no matter.
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            return states
        self.check_observed()
        if self._slots[layer_idx] == 0:
            self._started = self._started or time.perf_counter()
            if self._settled:
                self._resumed = self._resumed or time.perf_counter()
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        self._awaiting = layer_idx
        setattr(keys, TAG, (self, layer_idx))
        return keys, values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Physical length and our mark. Raises CacheError where the compress block of this cache has ended."""
        if not is_routed(self._model()):
            raise CacheError(
                "this cache was made in a compress block that has ended: go on inside the block, "
                "or pass a cache of your own, past_key_values=CompactCache(model, ...)"
            )
        return super().get_mask_sizes(*args, **kwargs)

    def crop(self, tokens: int) -> None:
        """Take generated tokens back. Negative: that many; positive: down to that length.

        Raises CacheError, with nothing taken back, for tokens of the prompt and where a layer's sliding
        window has lost what would have to come back into it.
        """
        back = -tokens if tokens < 0 else self.get_seq_length() - tokens
        if back <= 0 or not self.get_seq_length():
            return
        for layer in self.sliding_layers:
            if layer.keys.shape[2] - back < min(layer.get_seq_length() - back, layer.sliding_window - 1):
                raise CacheError(
                    f"cannot crop {back} tokens: a layer's window of {layer.sliding_window} tokens has slid on and lost what "
                    "stood before them; replay the recorded prompt, or read it again"
                )
        for layer in sorted(self.layers, key=lambda layer: not isinstance(layer, CompactLayer)):  # those that may refuse first
            layer.crop(-back)

    def begin_chunks(self, tokens: int, chunk: int, ceiling: int | float | None = None) -> list[int]:
        """Get ready to read one prompt of ``tokens`` in chunks; returns their lengths. After each comes :meth:`end_chunk`.

        Every layer has room for ``ceiling + chunk`` entries from the first chunk on, for the whole prompt without a ceiling.
        Raises CacheError for a cache that is not fresh or records under a ceiling, and the errors of a prompt that is read
        at once: all of them before anything is read.
        """
        if self.get_seq_length():
            raise CacheError("something was read into this cache already: reset() it, or make a new one")
        policy = self._each_policy(1)[0]
        size = cut(policy, self.budget, tokens, chunk, ceiling)
        if len(size.sizes) == 1:
            return size.sizes
        middle = Expected().for_model(self._fingerprint)
        chunks = Chunks(policy, middle, size, len(self._slots))
        if self._record and not chunks.exact:
            raise CacheError(
                "record= needs all entries of the prompt: leave the ceiling out, or make the cache without record="
            )
        self._plan(policy, chunks.prompt(self.budget))  # complain now
        for layer in self.compact_layers:
            layer.room = size.most
        self._chunks = chunks
        return size.sizes

    def end_chunk(self) -> None:
        """A chunk went through the model: evict what the ceiling no longer covers. Raises as :meth:`check_used` does."""
        self.check_used()
        if self._chunks is None:
            return
        with self._compressing.running(self.compact_layers[0].keys.device):
            self.report.peak_bytes = max(self.report.peak_bytes, self.held_bytes)
            if (stays := self._chunks.end()) is not None:
                for layer in self.compact_layers:
                    layer.drop(stays)

    def check_used(self) -> None:
        """After a forward pass: raise UnsupportedModelError where the model used the cache in part or not at all."""
        self.check_observed()
        chunks = self._chunks
        between = chunks and not chunks.last and all(layer.seen == chunks.read for layer in self.compact_layers)
        if not (self._settled or between):
            raise UnsupportedModelError("the model did not put keys and values of every attention layer into its cache")

    def check_observed(self) -> None:
        """Raise UnsupportedModelError where the last layer's attention did not come through our function."""
        if self._awaiting is not None:
            raise UnsupportedModelError(f"layer {self._awaiting}: {BYPASSED}")

    def validity(self, layer_idx: int, padding: Padding | None, added: int) -> Valid | None:
        """Which entries of a layer count, ``[B, 1 or Hkv, length]``, None where all do. Called before attention."""
        layer = self.layers[layer_idx]
        self._awaiting = None
        if padding is not None:
            layer.mark(padding, added)
        return None if layer.valid is None else layer.valid[..., : layer.length]

    def observe(self, layer_idx: int, queries: Tensor, scale: float) -> None:
        """After a layer's attention: at prefill score and evict, later count and hold the decode budget."""
        slot, last = self._slots[layer_idx], len(self._slots) - 1
        if self._settled:
            layer = self.layers[layer_idx]
            layer.trim(queries, scale)
            if slot == last:
                self.report.decode_entries = layer.generated
                self.report.decode_tokens += queries.shape[2]
                self.report.decode_seconds = time.perf_counter() - self._resumed
            return
        if self._record:
            self._remember(slot, queries, scale)
        heard: Tensor | None = queries
        with self._compressing.running(queries.device):
            if self._chunks is not None:
                heard = self._chunks.hear(slot, queries, self.layers[layer_idx].entries_in_use()[0], scale)
            if heard is not None:
                self._evict(slot, heard, scale)
        if slot == last and heard is not None:
            if queries.is_cuda:
                torch.cuda.synchronize(queries.device)  # else the clock stops before the work does
            self._settle(time.perf_counter())

    def _remember(self, slot: int, queries: Tensor, scale: float) -> None:
        if slot == len(self._recorded):
            self._recorded.append((queries[:, :, -self._record :].clone(), scale))
        else:  # a later chunk
            together = torch.cat([self._recorded[slot][0], queries], 2)
            self._recorded[slot] = (together[:, :, -self._record :].clone(), scale)

    def _evict(self, slot: int, queries: Tensor, scale: float) -> None:
        layer = (layers := self.compact_layers)[slot]
        if self._plans is None:
            self._plans = self._made_plans()
        self.report.peak_bytes = max(self.report.peak_bytes, self.held_bytes)
        changed: set[int] = set()
        for row, plan in enumerate(self._plans):
            keys = layer.keys[row : row + 1, :, layer.pads[row] : layer.length]
            changed.update(plan.observe(self._wanted(plan, queries[row : row + 1], keys.shape[2]), keys, scale))
        dense = len(self._plans) == 1 and not self._plans[0].policy.per_head
        for index in changed:
            kept = [plan.kept[index] for plan in self._plans]
            if self._chunks is not None:
                kept = [None if positions is None else self._chunks.text(positions) for positions in kept]
            layers[index].keep([None if positions is None else positions[0] for positions in kept], dense=dense)
        if slot not in changed:
            layer.own()
        if self._stored is not None and layer is layers[-1]:
            for each in layers:
                each.quantize(self._stored)

    def _wanted(self, plan: PrefillPlan | AutoPlan, queries: Tensor, tokens: int) -> Tensor:
        """Those that the policy wants of the last queries of a row's prompt; what comes out of chunks is that already."""
        if self._chunks is not None:
            return queries
        places = plan.wanted + (queries.shape[2] - tokens)
        if places.numel() and int(places[-1] - places[0]) == len(places) - 1:  # side by side: a view
            return queries[:, :, int(places[0]) : int(places[-1]) + 1]
        # Token by token, as models hand them over: half the time of picking from each head.
        return queries.transpose(1, 2).index_select(1, places.to(queries.device, non_blocking=True)).transpose(1, 2)

    def _each_policy(self, rows: int) -> list[Policy]:
        if len(self.policies) not in (1, rows):
            raise InputError(f"{len(self.policies)} tasks for a batch of {rows} prompts: give one for each, or one")
        return self.policies if len(self.policies) > 1 else self.policies * rows

    def _made_plans(self) -> list[PrefillPlan | AutoPlan]:
        if self._chunks is not None:
            return [self._plan(self._chunks.policy, self._chunks.prompt(self.budget))]
        layer, count = self.compact_layers[0], len(self._slots)
        lengths = [layer.prompt - pad for pad in layer.pads]
        prompts = [Prompt(n, count, self.budget.entries(n)) for n in lengths]
        return [self._plan(policy, prompt) for policy, prompt in zip(self._each_policy(len(prompts)), prompts, strict=True)]

    def _plan(self, policy: Policy, prompt: Prompt) -> PrefillPlan | AutoPlan:
        if self._curve is None or self.budget.target is None:
            return PrefillPlan(policy, prompt)
        return AutoPlan(policy, prompt, self._curve, self.budget.target)

    def _settle(self, now: float) -> None:
        layers, report = self.compact_layers, self.report
        report.prompt_tokens = [layers[0].prompt - pad for pad in layers[0].pads]
        rows = range(len(layers[0].pads))
        kept = [[layer.entries(row) for layer in layers] for row in rows]
        report.kept_entries = [[n if isinstance(n, int) else float(n) for n in row] for row in kept]
        report.kept_bytes = sum(layer.kept_bytes(row) for layer in layers for row in rows)
        report.full_bytes = sum(tokens * layer.entry_bytes for tokens in report.prompt_tokens for layer in layers)
        report.held_bytes = self.held_bytes
        report.prefill_seconds = now - self._started
        report.compress_seconds = self._compressing.seconds
        report.kept_mass = [plan.mass for plan in self._plans or []]
        notes = {plan.note for plan in self._plans or []} | {self._chunks.size.note if self._chunks else None}
        report.notes = sorted(note for note in notes if note)
        for layer in layers:
            layer.room = 0
        self._plans = self._chunks = None
        self._settled = True

    def replay(
        self,
        policy: str | Policy,
        budget: Budget | int | float | str,
        *,
        task: Tasks = None,
        quantize: Quantization | None = None,
    ) -> CompactCache:
        """A new cache that keeps what another policy selects from this recorded prefill.

        Equal to a prefill with that policy, because eviction changes nothing that prefill
        computes. Sliding windows are shared with it until either goes on, which puts new ones in
        their place. Raises CacheError where nothing was recorded, something was already evicted,
        quantized or generated, the policy observes more queries than were recorded, or a layer
        neither attends to everything nor slides over a window.
        """
        model, layers = self.model, self.compact_layers
        whole = all(p is None for layer in layers for p in layer.positions) and layers[0].seen == layers[0].prompt
        if not (self._record and self._settled and whole and self._stored is None):
            raise CacheError("replay needs CompactCache(model, 'full', record=...) fresh from prefill")
        other = CompactCache(model, policy, budget, task=task, quantize=quantize, decode_budget=self.decode_budget)
        read = min(max(policy.reads(layers[0].prompt) for policy in other.policies), layers[0].prompt)
        if read > self._record:
            raise CacheError(f"{other.policies[0].name} reads {read} queries, only {self._record} were recorded")
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                other.layers[index] = copy(layer)
            elif not isinstance(layer, CompactLayer):
                raise CacheError(f"replay works on full attention and sliding windows, not on a {type(layer).__name__}")
        other._started = time.perf_counter()
        with other._compressing.running(layers[0].keys.device):
            for slot, (mine, theirs) in enumerate(zip(layers, other.compact_layers, strict=True)):
                theirs.update(mine.keys, mine.values)
                theirs.pads, theirs.valid = list(mine.pads), mine.valid
                other._evict(slot, *self._recorded[slot])
        other._settle(time.perf_counter())
        other.report.prefill_seconds = self.report.prefill_seconds + other.report.compress_seconds
        return other
