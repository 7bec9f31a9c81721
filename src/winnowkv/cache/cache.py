"""The compact cache: storage behind transformers' cache socket.

Each :class:`CompactLayer` holds unexpanded KV heads of only the entries that stay, grows in place while tokens are generated,
and tells transformers its *logical* length (tokens seen, hence RoPE positions) and its *physical* one (entries held, hence
masks). What stays is decided by a :class:`~winnowkv.cache.session.PrefillSession`, not here.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from winnowkv.attention.generate import PassWatch, refuse_chunks
from winnowkv.attention.hooks import Observer, bypassed, tag_states
from winnowkv.attention.projection import output_projections
from winnowkv.attention.routing import Hold, check_model, generate_call
from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.compression import Compression
from winnowkv.cache.explain import Choices, Explanation, found_choices
from winnowkv.cache.generated import check_decode_budget
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.looking import Heard, Looking, decide
from winnowkv.cache.other_layers import check_windows, free_slid, shared_layer
from winnowkv.cache.reports import new_report, report_decode
from winnowkv.cache.session import PrefillSession, Recording, check_recorded
from winnowkv.cache.storage import LayerStorage
from winnowkv.errors import CacheError, InputError, UnsupportedModelError
from winnowkv.policies import Policy, Tasks
from winnowkv.report import Report
from winnowkv.types import Between, Padding, Valid

OWN = ("_hold", "between")  # of one cache and not of its copies


class CompactCache(LayerStorage):
    """A KV cache that keeps what a policy selects from each prompt; pass it as ``past_key_values``.

    Parameters
    ----------
    model: a decoder-only transformers model whose attention goes through ``AttentionInterface``. While the cache lives it goes
        through ours, which hands every other cache on to the framework's own function; then the model is put back.
    policy: a name, a spec (``"windowkv:group=6"``, ``"snapkv:quantize=int8"``) or a :class:`Policy`.
    budget: kept entries (int), the kept fraction of the prompt (float), or ``"auto:0.95"``, the smallest that is expected
        to give 95% of the full cache's tokens on this prompt (:class:`~winnowkv.budget.Budget`).
    task: ``"localization"``, ``"aggregation"`` or a :class:`TaskProfile`, for policies that score by task; a sequence gives
        each row of a batch its own.
    decode_budget: most entries per layer and KV head to hold of what comes after the prompt, at least 64. They go in blocks of
        64, so up to 63 more are held between; the last 32 stay and, per KV head, those that one of the last 32 queries
        attended to most. The prompt's entries are not touched. None: no limit.
    record: keep every layer's last ``record`` queries, so that :meth:`replay` can run other policies; for evaluation.
    keep_scores: keep the importance scores, so that :meth:`explain` can answer and the report has ``kept_mass``.
    keep: spans ``(start, end)`` of token positions that every layer and head keeps, whatever they score, such as a system
        prompt; counted from the prompt's first token without padding. They count in the budget.
    quality: ``lean``, ``balanced`` or ``best``: options of the policy (:func:`~winnowkv.policies.quality.with_quality`).
    hold: keep the model's attention routed while the cache lives; False for a block's caches, which end with it.
    between: called before each layer of a pass, with its tokens; other work on the model may be done there.

    Raises
    ------
    PolicyError, BudgetError, ProfileError, UnsupportedModelError
        At once, or when the prompt's length shows that the budget is below sinks + window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy = "winnow",
        budget: Budget | int | float | str = DEFAULT_BUDGET,
        *,
        task: Tasks = None,
        decode_budget: int | None = None,
        record: int = 0,
        keep_scores: bool = False,
        keep: Sequence[tuple[int, int]] = (),
        quality: str | None = None,
        hold: bool = True,
        between: Between | None = None,
    ) -> None:
        check_model(model)
        check_decode_budget(decode_budget)
        self.decode_budget = decode_budget
        self.compression = Compression.of(model, policy, budget, task, keep_scores=keep_scores, keep=keep, quality=quality)
        super().__init__(model, decode_budget, self.compression.policy.decode_eviction())
        self._record, self.between = record, between
        self._model = weakref.ref(model)
        self._forget()
        self._set_hold(hold)

    def _set_hold(self, hold: bool) -> None:
        """Hold the model's routing while this cache lives, or only during its forward passes."""
        self._hold, self._holds_on = Hold(), hold
        weakref.finalize(self, self._hold.give_back).atexit = False
        if hold:
            self._hold.take(self.model)

    def let_go(self) -> None:
        """Give the hold of a pass back that this thread began and that failed, if the cache holds the model for passes only."""
        if not self._holds_on:
            self._hold.give_back(threading.get_ident())

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactCache:
        """A cache of its own, which may outlive this one."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(
            {name: deepcopy(value, memo) for name, value in vars(self).items() if name not in OWN}, between=None
        )
        copied._set_hold(self._holds_on)
        copied._watch_passes()
        return copied

    def _forget(self) -> None:
        self.report, layers = new_report(self.compression), self.compact_layers
        self.session: PrefillSession | None = PrefillSession(self.compression, layers, self.report, self._projections)
        self.recording = Recording(self._record) if self._record else None
        self.looking: Looking | None = None  # while a prompt that was read is held whole
        self.heard: Heard | None = None  # of a copy that a draft reads into
        self._choices: Choices | None = None
        self._unobserved: int | None = None  # the layer whose keys went out and whose queries did not come back yet
        self._resumed = 0.0  # when the first token after the prompt came
        self._read_before: int | None = 0  # tokens after the prompt that a report of an earlier process counted

    def reset(self) -> None:
        """Forget the prompt and what came after it; the next one is compressed afresh, with a report of its own."""
        for layer in self.sliding_layers:  # older releases would write zeros into what a replay may share, and go on after them
            layer.keys = layer.values = None
            layer.is_initialized = False
        super().reset()
        if self.looking is not None:
            self.looking.close()
        self._forget()

    def resume(self, report: Report) -> None:
        """Take this cache for one whose prompt is read already, as a snapshot does; its layers are filled after."""
        self.report, self.session, self._read_before, self._resumed = report, None, None, 0.0

    @property
    def model(self) -> PreTrainedModel:
        """The model that this cache serves. Raises CacheError if it is gone."""
        if (model := self._model()) is None:
            raise CacheError("the model of this cache is gone")
        return model

    @property
    def held_bytes(self) -> int:
        """Storage of keys and values of the compressed layers now, room for growth and queries kept to choose by included."""
        return sum(layer.held_bytes for layer in self.compact_layers) + (self.looking.held_bytes if self.looking else 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        super().batch_select_indices(indices)
        self._select_looking(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over the rows that beam search goes on with."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # the framework says LongTensor
        self._select_looking(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(len(self.compact_layers[0].pads)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._select_looking(rows)

    def _select_looking(self, rows: Tensor) -> None:
        if self.looking is not None:
            self.looking.select_rows(rows)

    def _projections(self) -> list[nn.Module | None]:
        found = output_projections(self.model)
        return [found.get(layer) for layer in self._numbers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; the keys returned carry a tag by which attention finds its way back here."""
        if self.between is not None:
            self.between(key_states.shape[-2])
        if layer_idx not in self._numbers:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            layer: Any = self.layers[layer_idx]
            if layer in self.sliding_layers:
                free_slid(layer)
            return states
        self.check_observed()
        if self._numbers[layer_idx] == 0:
            self._begin_pass()
        compact: Any = self.layers[layer_idx]
        keys, values = compact.update(key_states, value_states)
        self._unobserved = layer_idx
        return tag_states(keys, values, self, layer_idx)

    def _begin_pass(self) -> None:
        """The first compressed layer gets new tokens. Raises CacheError if an earlier pass ended in the middle."""
        layers = self.compact_layers
        whole = len({layer.seen for layer in layers}) == 1
        if self.session is not None:
            whole = whole and (not layers[0].seen or self.session.in_chunks)
        if not whole:
            raise CacheError(
                "a forward pass into this cache failed, some layers have its tokens and some have not: reset() the cache, or "
                "make a new one, and read the prompt again"
            )
        if self.session is None:
            if self.looking is not None and self.looking.ready:
                decide(self)
            if self._read_before is None:
                self._read_before = layers[0].seen - layers[0].prompt
            self._resumed = self._resumed or time.perf_counter()
            return
        self.session.begin()
        refuse_chunks(generate_call(self.model))

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Physical length and our mark. Raises CacheError if the compress block of this cache has ended."""
        if not self._hold.take(self.model, route=False):
            raise CacheError(
                "this cache was made in a compress block that has ended: go on inside the block, or pass a cache of your own, "
                "past_key_values=CompactCache(model, ...)"
            )
        return super().get_mask_sizes(*args, **kwargs)

    def crop(self, tokens: int) -> None:
        """Take generated tokens back. Negative: that many; positive: down to that length; 0: nothing.

        Raises CacheError, with nothing taken back, for tokens of the prompt, and if a sliding window lost what would return.
        """
        back = -tokens if tokens <= 0 else self.get_seq_length() - tokens
        if back <= 0 or not self.get_seq_length():
            return
        check_windows(self.sliding_layers, back)
        may_refuse_first: list[Any] = sorted(self.layers, key=lambda layer: not isinstance(layer, CompactLayer))
        for one in may_refuse_first:
            one.crop(-back)
        if self.looking is not None:
            self.looking.heard.crop(back)
        self._count_decoded(self.report.decode_seconds)

    def begin_chunks(self, tokens: int, chunk: int | None, ceiling: int | float | None = None, *, hint: int = 0) -> list[int]:
        """Get ready to read one prompt of ``tokens`` in chunks; returns their lengths. After each comes :meth:`end_chunk`.

        The last ``hint`` tokens are a chunk of their own: the policy chooses by them, then they are taken back. ``chunk`` None
        reads all before them at once. Every layer has room for ``ceiling + chunk`` entries from the first chunk on, for the
        whole prompt without a ceiling.
        Raises CacheError for a cache that is not fresh or records under a ceiling, and the errors of a prompt that is read
        at once: all of them before anything is read.
        """
        if self.get_seq_length() or self.session is None:
            raise CacheError("something was read into this cache already: reset() it, or make a new one")
        return self.session.begin_chunks(tokens, chunk, ceiling, self.recording is not None, hint)

    def end_chunk(self) -> None:
        """A chunk went through the model: evict what the ceiling no longer covers. Raises as :meth:`check_used` does."""
        self.check_used()
        if self.session is not None:
            self.session.end_chunk()

    def check_used(self) -> None:
        """After a forward pass: raise UnsupportedModelError if the model used the cache in part or not at all."""
        self.check_observed()
        if self.session is not None and not self.session.between_chunks:
            raise UnsupportedModelError("the model did not put keys and values of every attention layer into its cache")

    def check_observed(self) -> None:
        """Raise UnsupportedModelError if the last layer's attention did not come through our function."""
        if self._unobserved is not None:
            reason = bypassed(self.model.config.get_text_config(decoder=True))
            raise UnsupportedModelError(f"layer {self._unobserved}: {reason}")

    def valid_entries(self, layer_idx: int, padding: Padding | None, added: int) -> Valid | None:
        """Which entries of a layer count, ``[B, 1 or Hkv, length]``, None if all do. Asked before attention."""
        layer: Any = self.layers[layer_idx]
        self._unobserved = None
        if padding is not None:
            if self._numbers[layer_idx] == 0:
                self._check_past(layer, padding, added)
            layer.mark(padding, added)
        return None if layer.valid is None else layer.valid[..., : layer.length]

    def shared(self, layer_idx: int, by: int) -> None:
        """Layer ``by`` attends to this layer's keys, too: they are not changed in place, nor held longer than that."""
        layer: Any = self.layers[layer_idx]
        layer.shared = True
        if by == self.compression.model.layers - 1:
            vars(self).pop("shared_layers", None)  # where older releases leave them until the next pass

    def _check_past(self, layer: CompactLayer, padding: Padding, added: int) -> None:
        try:
            layer.check_past(padding, added)
        except InputError:
            if self.session is None and not self.sliding_layers:
                layer.crop(-added)  # no other layer has the tokens yet: the cache can go on
            raise

    def observer(self, layer_idx: int) -> Observer:
        """Every layer's queries are wanted: to score the prompt, later to hold the decode budget."""
        return partial(self.observe, layer_idx)

    def observe(self, layer_idx: int, queries: Tensor, scale: float) -> None:
        """After a layer's attention: score and evict while the prompt is read, later count and hold the decode budget."""
        number = self._numbers[layer_idx]
        if self.session is not None:
            if self.recording is not None:
                self.recording.take(number, queries, scale)
            if self.session.observe(number, queries, scale):
                self._settle()
        else:
            heard = self.heard if self.looking is None else self.looking.heard
            if heard is not None:
                heard.take(number, queries)
            layer: Any = self.layers[layer_idx]
            layer.trim(queries, scale)
        if number == len(self._numbers) - 1:
            if not self._holds_on:
                self._hold.give_back()
            self._count_decoded(time.perf_counter() - self._resumed if self._resumed else 0.0)

    def _count_decoded(self, seconds: float) -> None:
        """Say in the report what was read after the prompt."""
        layer = self.compact_layers[-1]
        if self.session is None:
            tokens = layer.seen - layer.prompt - (self._read_before or 0)
            report_decode(self.report, max(tokens, 0), layer.generated, seconds)

    def _settle(self) -> None:
        """The prompt is read: from here on the cache only holds, or it looks at what comes before it chooses."""
        session: Any = self.session
        self.session = None
        if not self.compression.waits:
            self._note_choices(session)
            return
        self.looking = Looking(session)
        self._watch_passes()
        if not (self.compression.study or self.compression.policy.lookahead or self.compression.policy.draft):
            decide(self)

    def _watch_passes(self) -> None:
        """A draft begins from the inputs of the next forward pass; of a compress block's cache the block tells them."""
        if self.looking is not None and self.compression.policy.draft and self._holds_on:
            self.looking.watch = PassWatch(self.model, self)

    def settled(self, looking: Looking) -> None:
        """What stays of a prompt that was held whole is decided."""
        self.looking = None
        looking.close()
        self.report.lookahead_tokens = min(looking.heard.tokens, looking.policy.lookahead)
        looking.session.report_settled()
        self._note_choices(looking.session)

    def _note_choices(self, session: PrefillSession) -> None:
        if self.compression.keep_scores:
            self._choices = Choices(session.selections, session.held)

    def before_pass(self, inputs: Mapping[str, Any]) -> None:
        """Before a forward pass with these inputs into this cache: if the answer has begun, what stays is decided now."""
        if self.looking is not None and self.looking.ready and self.session is None:
            decide(self, inputs)

    def explain(self, layer: int, token: int, row: int = 0) -> list[Explanation]:
        """Why a token of the prompt stayed or went, for each KV head of a compressed layer.

        ``layer`` counts compressed layers, ``token`` the prompt's tokens without padding, ``row`` the batch's rows when read.
        Raises CacheError without ``keep_scores=True`` and before a prompt was read, InputError for what is not there.
        """
        return found_choices(self._choices, self.compression.keep_scores).explain(layer, token, row)

    def replay(
        self,
        policy: str | Policy,
        budget: Budget | int | float | str,
        *,
        task: Tasks = None,
        keep_scores: bool = False,
    ) -> CompactCache:
        """A new cache that keeps what another policy selects from this recorded prefill.

        Equal to a prefill with that policy, because eviction changes nothing that prefill computes. Sliding windows are shared
        until one of both goes on. Raises CacheError if nothing was recorded, something was already evicted, quantized or
        generated, the policy observes more queries than were recorded, or a layer neither attends to everything nor slides.
        """
        other = CompactCache(self.model, policy, budget, task=task, decode_budget=self.decode_budget, keep_scores=keep_scores)
        other.replay_into(self)
        return other

    def replay_into(self, recorded: CompactCache) -> None:
        """Read what another cache recorded, in place of a prompt. Raises CacheError as :meth:`replay`."""
        check_recorded(recorded.compact_layers, recorded.recording, recorded.session, recorded.compression)
        pairs = zip(self.layers, recorded.layers, strict=True)
        self.layers[:] = [mine if isinstance(mine, CompactLayer) else shared_layer(theirs) for mine, theirs in pairs]
        session: Any = self.session
        session.replay(recorded.recording, recorded.compact_layers, recorded.report.prefill_seconds)
        self._settle()
