"""From a prompt to a request: its tokens checked, its policy and budget, and what it claims of the memory."""

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
from winnowkv.cache.reports import new_report
from winnowkv.engine.admission import Admission
from winnowkv.engine.request import Claim, Completion, Listener, Request, free_frames
from winnowkv.engine.sampling import Sampling
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
    max_rows: most choices of a request.

    Raises
    ------
    PolicyError, BudgetError, ProfileError, UnsupportedModelError, InputError
        For settings that can serve no prompt.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, settings: Settings, max_rows: int) -> None:
        self.model, self.tokenizer, self.settings, self.max_rows = model, tokenizer, settings, max_rows
        self.end_tokens = end_tokens(model, tokenizer)
        self.compression = self._compression(settings)
        self.compression.heads.check_alone("the engine")

    def request(
        self,
        prompt: AnyPrompt,
        sampling: Sampling,
        own: Settings,
        admission: Admission,
        slots: Slots,
        *,
        after: CompactCache | None = None,
        listener: Listener | None = None,
        explain: bool = False,
    ) -> Request:
        """The request of a prompt with settings of its own; parameters and errors as of :meth:`Engine.submit`."""
        if sampling.n > self.max_rows:
            raise InputError(
                f"n={sampling.n} choices decode together, and max_rows is {self.max_rows}: give Engine(max_rows={sampling.n}), "
                "or a lower n"
            )
        if after is not None:
            self._check_after(after, own, prompt, slots)
            if explain:
                raise InputError(
                    "explain=True: what is kept of a document that a request goes on from was chosen when it was read: leave "
                    "explain out"
                )
        ids = self._token_ids(prompt, sampling, 0 if after is None else after.get_seq_length())
        if after is None:
            task, claim = self._claim(ids, sampling, own, admission, slots)
        else:
            (task,) = after.compression.each_task(1)
            claim = admission.accept_after(after, len(ids), sampling, slots)
        made = {"tokenizer": self.tokenizer, "end_tokens": self.end_tokens, "device": slots.device, "explain": explain}
        return Request(ids, sampling, task, claim, new_report(claim.compression), after=after, listener=listener, **made)

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

    def _claim(
        self, ids: Sequence[int], sampling: Sampling, own: Settings, admission: Admission, slots: Slots
    ) -> tuple[TaskProfile, Claim]:
        compression = self._own_compression(own)
        given = self.settings.task if own.task is None else own.task
        (task,) = read_tasks(self.tokenizer, torch.tensor([list(ids)]), None, given, compression.policy)
        return task, admission.accept(compression, len(ids), sampling, task, slots)

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
