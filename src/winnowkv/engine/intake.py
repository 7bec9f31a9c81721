"""From a prompt to a request: its tokens checked, its policy and budget, what it claims of the memory, and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from winnowkv.api import read_tasks
from winnowkv.budget import Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.compression import Compression
from winnowkv.cache.forks import fork
from winnowkv.cache.generated import check_decode_budget
from winnowkv.cache.reports import new_report
from winnowkv.engine.admission import Admission
from winnowkv.engine.request import Claim, Completion, Listener, Request, free_frames
from winnowkv.engine.sampling import Sampling
from winnowkv.engine.slot_row import DecodeLimit
from winnowkv.engine.slots import Slots
from winnowkv.errors import CacheError, InputError, WinnowError
from winnowkv.models.info import end_tokens, position_limit, prompt_limit
from winnowkv.policies import Policy
from winnowkv.prompt.chat import AnyPrompt, token_ids
from winnowkv.prompt.task import TaskProfile


@dataclass(frozen=True)
class Settings:
    """How prompts are compressed; None: not said."""

    policy: str | Policy | None = None
    budget: Budget | int | float | str | None = None
    quality: str | None = None
    task: TaskProfile | str | None = None

    @property
    def given(self) -> list[str]:
        """The names of those that were said."""
        return [name for name, value in vars(self).items() if value is not None]


class Intake:
    """Makes requests of prompts.

    Parameters
    ----------
    model, tokenizer: that answer. settings: of prompts that say nothing else; policy and budget are given.
    max_rows: most choices of a request. decode_budget: of requests that say nothing else.

    Raises
    ------
    PolicyError, BudgetError, ProfileError, UnsupportedModelError, InputError
        For settings that can serve no prompt.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, settings: Settings, max_rows: int, decode_budget: int | None = None
    ) -> None:
        check_decode_budget(decode_budget)
        self.decode_budget = decode_budget
        self.model, self.tokenizer, self.settings, self.max_rows = model, tokenizer, settings, max_rows
        self.compression = self._compression(settings)
        self.compression.heads.check_alone("the engine")
        self.limit(self.compression)  # may raise
        self.end_tokens = end_tokens(model, tokenizer)

    def request(
        self,
        prompt: AnyPrompt,
        sampling: Sampling,
        own: Settings,
        admission: Admission,
        slots: Slots,
        *,
        after: CompactCache | None = None,
        decode_budget: int | None = None,
        listener: Listener | None = None,
        explain: bool = False,
    ) -> Request:
        """The request of a prompt with settings of its own; parameters and errors as of :meth:`Engine.submit`."""
        if sampling.n > self.max_rows:
            raise InputError(
                f"n={sampling.n} choices decode together, and max_rows is {self.max_rows}: give Engine(max_rows={sampling.n}), "
                "or a lower n"
            )
        check_decode_budget(decode_budget)
        if after is not None:
            self._check_after(after, own, prompt, slots)
            if explain:
                raise InputError(
                    "explain=True: what is kept of a document that a request goes on from was chosen when it was read: leave "
                    "explain out"
                )
        ids = self._token_ids(prompt, sampling, 0 if after is None else after.get_seq_length())
        if after is None:
            task, claim = self._claim(ids, sampling, own, admission, slots, decode_budget)
        else:
            (task,) = after.compression.each_task(1)
            claim = admission.accept_after(after, len(ids), sampling, slots, self._limit_after(after, decode_budget))
        made = {"tokenizer": self.tokenizer, "end_tokens": self.end_tokens, "device": slots.device, "explain": explain}
        return Request(ids, sampling, task, claim, new_report(claim.compression), after=after, listener=listener, **made)

    def new_cache(self, request: Request) -> CompactCache:
        """What a request's prompt is read into: a fork of the document's cache if it goes on from one."""
        asked, limit = request.claim.compression, request.claim.limit
        budget = None if limit is None else limit.budget
        if request.after is not None:
            after, request.after = request.after, None
            return fork(after, budget)
        cache = CompactCache(self.model, asked.policy, asked.budget, task=request.task, decode_budget=budget, hold=False)
        cache.report.policy = asked.asked  # looking it up again takes longer than a decode step
        return cache

    def refused(self, sampling: Sampling, error: WinnowError) -> Completion:
        """The answer to a prompt that was not accepted."""
        free_frames(error)
        ended = Completion(0, [], "", "error", None, new_report(self.compression), None, None, error)
        return replace(ended, others=tuple(replace(ended, index=index) for index in range(1, sampling.n)))

    def _compression(self, settings: Settings) -> Compression:
        policy, budget, quality, task = settings.policy, settings.budget, settings.quality, self.settings.task
        assert policy is not None
        assert budget is not None
        return Compression.of(self.model, policy, budget, task, task_is_known=task is not None, quality=quality)

    def _own_compression(self, own: Settings) -> Compression:
        """Policy and budget of one request. The engine's quality is its policy's, not that of a policy of the request's own."""
        if own.policy is None and own.budget is None and own.quality is None:
            return self.compression
        base = self.settings if own.policy is None else replace(self.settings, quality=None)
        return self._compression(replace(base, **{name: getattr(own, name) for name in own.given}))

    def limit(self, compression: Compression, decode_budget: int | None = None) -> DecodeLimit | None:
        """The decode budget of a request. Raises InputError if what its policy looks at would be evicted by it."""
        budget, policy = self.decode_budget if decode_budget is None else decode_budget, compression.policy
        if budget is None:
            return None
        limit, looked = DecodeLimit(budget, policy.decode_eviction()), policy.lookahead + policy.draft
        if (lacking := looked - (limit.most - limit.observe)) > 0:
            raise InputError(
                f"decode_budget={budget} holds too few of the {looked} tokens that {compression.asked} looks at before it "
                f"chooses (lookahead={policy.lookahead}, draft={policy.draft}): give decode_budget={budget + lacking} or more, "
                "or less lookahead and draft"
            )
        return limit

    def _limit_after(self, after: CompactCache, decode_budget: int | None) -> DecodeLimit | None:
        """The decode budget of a request that goes on from a document: its own, else the document's, else the engine's."""
        budget = next((one for one in (decode_budget, after.decode_budget, self.decode_budget) if one is not None), None)
        return None if budget is None else DecodeLimit(budget, after.compact_layers[0].decode_eviction)

    def _claim(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        own: Settings,
        admission: Admission,
        slots: Slots,
        decode_budget: int | None,
    ) -> tuple[TaskProfile, Claim]:
        compression = self._own_compression(own)
        limit = self.limit(compression, decode_budget)
        given = self.settings.task if own.task is None else own.task
        (task,) = read_tasks(self.tokenizer, torch.tensor([list(ids)]), None, given, compression.policy)
        return task, admission.accept(compression, len(ids), sampling, task, slots, limit)

    def _check_after(self, after: CompactCache, own: Settings, prompt: AnyPrompt, slots: Slots) -> None:
        """Raise for a cache that no row can go on from, and for what cannot be said of a document that was read before."""
        if own.given:
            name = own.given[0]
            raise InputError(
                f"{name}={getattr(own, name)!r}: a document that a request goes on from was compressed when it was read: leave "
                f"{name} out"
            )
        if isinstance(prompt, str) or any(isinstance(part, dict) for part in prompt):
            raise InputError(
                "what goes on from a document must be token ids, since it is no text by itself: give its token ids"
            )
        if after.session is not None:
            raise CacheError("nothing was read into the cache that the prompt is to go on from: read a document first")
        slots.check(after)

    def _token_ids(self, prompt: AnyPrompt, sampling: Sampling, before: int) -> list[int]:
        """Token ids, checked against the model; ``before``: tokens of the document that they go on from."""
        ids = token_ids(self.tokenizer, prompt)
        if not ids:
            raise InputError("the prompt is empty: give at least one token")
        vocabulary: Any = self.model.get_input_embeddings()
        if unknown := [token for token in ids if not 0 <= token < vocabulary.num_embeddings]:
            raise InputError(f"token {unknown[0]} is unknown: the model has tokens 0 to {vocabulary.num_embeddings - 1}")
        limit = prompt_limit(self.model, sampling.max_new_tokens)
        if limit is not None and before + len(ids) > limit:
            document = f" after {before} of a document" if before else ""
            raise InputError(
                f"the prompt has {len(ids)} tokens{document}, with {sampling.max_new_tokens} new ones it passes the model's "
                f"{position_limit(self.model)} positions: shorten it or lower max_new_tokens"
            )
        return ids
