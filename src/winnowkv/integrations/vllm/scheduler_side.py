"""The connector's half in vLLM's scheduler: which requests go on from a context, and where its entries are to be loaded.

A request that names a context and cannot have it must not be computed: its placeholders would be read as text. It is refused
by claiming one token more than vLLM has for it and reporting that token's block as not loaded, so that vLLM ends it with
an error, alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from winnowkv.contexts.context import CONTEXT_PARAM, SALT, Context
from winnowkv.contexts.fit import fields_difference
from winnowkv.contexts.store import ContextStore, RememberedContexts
from winnowkv.errors import InputError, WinnowError

logger = logging.getLogger(__name__)
REMEMBERED = 1024  # contexts whose headers are not read again


@dataclass(frozen=True)
class Load:
    """Entries of a context from ``first`` on go to these slots, which lie in these ``blocks`` of vLLM's cache."""

    context: str
    first: int
    slots: list[int]
    blocks: list[int]


@dataclass
class Plan:
    """What the workers do before a step: ``loads``, and the ``failed`` blocks that they report as not loaded."""

    loads: list[Load] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)


@dataclass
class Refused:
    """A request that must not be computed, and why; ``late``: its first tokens are, there is nothing to claim."""

    why: str
    claimed: int = 0
    late: bool = False


class ContextScheduler:
    """Knows the requests that name a context.

    Parameters
    ----------
    store: of the contexts. model: what vLLM's model is (:func:`winnowkv.contexts.fit.model_fields`).
    block: tokens of a block of vLLM's cache.
    """

    def __init__(self, store: ContextStore, model: Mapping[str, Any], block: int) -> None:
        self.store, self.model, self.block = store, model, block
        self._requests: dict[str, Context | Refused] = {}
        self._contexts = RememberedContexts(store, REMEMBERED)
        self._plan = Plan()

    def add(self, request: Any) -> None:
        """A request came: find its context, or refuse it. Requests that name none are left alone."""
        asked = named_context(request)
        if asked is None:
            return
        # Else vLLM would take no token from us and compute the placeholders: prompt_logprobs sets it, and so may a user.
        request.skip_reading_prefix_cache = False
        try:
            self._requests[request.request_id] = self._checked(request, asked)
        except WinnowError as error:
            logger.error("request %s is refused: %s", request.request_id, error)
            self._requests[request.request_id] = Refused(str(error))
            set_apart(request)

    def matched(self, request: Any, computed: int) -> int:
        """How many tokens beyond those ``computed`` already are to be loaded."""
        found = self._requests.get(request.request_id)
        if found is None:
            return 0
        if isinstance(found, Context):
            return max(0, found.kept - computed)
        found.claimed = computed
        # vLLM must have a token left to compute.
        found.late = computed + 1 >= request.num_tokens
        if found.late:  # it fails in its second step, so there must be one
            request.max_tokens = max(request.max_tokens, 2)
            if request.sampling_params is not None:
                request.sampling_params = request.sampling_params.clone()
                request.sampling_params.min_tokens = max(request.sampling_params.min_tokens, 2)
        return 0 if found.late else 1

    def allocated(self, request: Any, blocks: Sequence[int], loaded: int) -> None:
        """The request has these blocks now, and ``loaded`` tokens are ours."""
        found = self._requests.get(request.request_id)
        if isinstance(found, Context) and loaded:
            slots = [blocks[at // self.block] * self.block + at % self.block for at in range(found.kept - loaded, found.kept)]
            touched = sorted({slot // self.block for slot in slots})
            self._plan.loads.append(Load(found.id, found.kept - loaded, slots, touched))
        elif isinstance(found, Refused) and not found.late:
            self._plan.failed.add(blocks[found.claimed // self.block])

    def plan(self, running: Mapping[str, Sequence[int]]) -> Plan:
        """What is pending, once. ``running``: the requests of this step that were scheduled before, and their blocks."""
        for request, blocks in running.items():
            found = self._requests.get(request)
            if isinstance(found, Refused) and found.late and blocks:
                self._plan.failed.add(blocks[found.claimed // self.block])
        plan, self._plan = self._plan, Plan()
        return plan

    def late(self) -> list[str]:
        """Requests that are refused in their second step, since there was nothing to claim in the first."""
        return [name for name, found in self._requests.items() if isinstance(found, Refused) and found.late]

    def finished(self, request: str) -> None:
        """Forget a request."""
        self._requests.pop(request, None)

    def _checked(self, request: Any, asked: Any) -> Context:
        """The context of a request. Raises InputError or CacheError if it cannot have it."""
        context = self._contexts[asked]
        difference = fields_difference(context.header.model, self.model)
        if difference is not None:
            raise InputError(f"context {context.id} is of another model: {difference}")
        if (why := unfit(request)) is not None:
            raise InputError(f"context {context.id}: {why}")
        ids = list(request.prompt_token_ids or ())
        if len(ids) <= context.kept:
            raise InputError(
                f"context {context.id}: the prompt has {len(ids)} tokens, {context.kept} placeholders and at least one more "
                "are needed: it was cut off, or not made by Context.prompt"
            )
        if ids[: context.kept] != context.placeholders:
            raise InputError(
                f"context {context.id}: the prompt does not begin with its placeholders: make it by Context.prompt"
            )
        if request.cache_salt != context.salt:
            raise InputError(f"context {context.id}: cache_salt is not the context's: make the request by Context.prompt")
        return context


def named_context(request: Any) -> Any:
    """What a request names as its context, None if nothing: in its parameters, or by its salt alone."""
    params = getattr(request, "kv_transfer_params", None)
    if isinstance(params, dict) and params.get(CONTEXT_PARAM) is not None:  # a client may send anything
        return params[CONTEXT_PARAM]
    salt = getattr(request, "cache_salt", None)
    named = SALT.fullmatch(salt) if isinstance(salt, str) else None
    return named[1] if named else None


def set_apart(request: Any) -> None:
    """Let a refused request share no block: what it computes is no context's, and its failed blocks are no other request's."""
    request.cache_salt = f"refused:{request.request_id}"
    request.block_hashes.clear()
    request.update_block_hashes()


def unfit(request: Any) -> str | None:
    """What a request asks for that it cannot have on a context, and the way out; None if nothing."""
    sampling = getattr(request, "sampling_params", None)
    if sampling is None:
        return "a request that pools has no use for it: send the text"
    if any(getattr(sampling, name, None) is not None for name in ("prompt_logprobs", "prompt_logprob_token_ids")):
        return "the document's tokens are not computed, so there are no prompt_logprobs: leave them out"
    if getattr(request, "lora_request", None) is not None:
        return "it was read without LoRA: ask without, or send the text"
    if getattr(request, "mm_features", None):
        return "requests with images or sound are not served on a context: send the text"
    if getattr(request, "prompt_embeds", None) is not None:
        return "the prompt must be token ids, not embeddings"
    return None
