"""Prompts of requests that go on from a stored context: what is read after it, and the cache that it is read into."""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from winnowkv.contexts.context import Context
from winnowkv.contexts.load import check_fit
from winnowkv.errors import CacheError, InputError
from winnowkv.integrations.vllm.requests import RefusedError, chat_rest, completion_rest
from winnowkv.prompt.chat import token_ids
from winnowkv.serve.context_files import Found
from winnowkv.serve.contexts import Lease, ServedContexts
from winnowkv.serve.errors import ApiError
from winnowkv.serve.prompts import Message, PlainPrompts, Prompt

REFRESH = 1.0  # seconds for which the contexts of a store are taken to be those that were listed
Rest = Callable[[Context, dict[str, Any], Callable[[Any], Any]], list[int]]


class ContextPrompts(PlainPrompts):
    """Reads prompts on a server that keeps contexts.

    Parameters
    ----------
    auto: whether a chat that begins with a context's tokens goes on from it without naming it.
    """

    def __init__(self, tokenizer: Any, contexts: ServedContexts, *, auto: bool = False) -> None:
        super().__init__(tokenizer)
        self.contexts = contexts
        self._index = PrefixIndex(contexts) if auto else None

    def chat(self, messages: Sequence[Message], context: str | None, owner: str, *, own: bool = False) -> Prompt:
        """Messages, whole or a question about the context; ``own``: the request asks for a policy or budget of its own."""
        if context is not None:
            return self._after(context, owner, chat_rest, {"messages": list(messages)}, "messages")
        ids = token_ids(self.tokenizer, list(messages))
        found = None if self._index is None or own else self._index.longest(owner, ids)
        if found is not None:
            with suppress(ApiError):  # damaged, or no room: the prompt is read as any other
                return after(self.contexts.lease(owner, found), ids[found.context.seen :])
        return Prompt(ids)

    def text(self, prompt: str | list[int], context: str | None, owner: str) -> Prompt:
        """A text or token ids, whole or what follows the context."""
        if context is None:
            return super().text(prompt, context, owner)
        return self._after(context, owner, completion_rest, {"prompt": prompt}, "prompt")

    def _after(self, asked: str, owner: str, rest_of: Rest, body: dict[str, Any], field: str) -> Prompt:
        lease = self.contexts.lease(owner, self.contexts.find(owner, asked))
        try:
            return after(lease, rest_of(lease.context, body, lambda _: self.tokenizer))
        except BaseException as error:
            lease.release()
            if isinstance(error, RefusedError):
                raise ApiError(error.status, str(error), code="invalid_value", param=error.field) from None
            if isinstance(error, InputError):
                raise ApiError(400, str(error), code="invalid_value", param=field) from None
            raise


def after(lease: Lease, rest: list[int]) -> Prompt:
    """The prompt of token ids that go on from a context."""
    context = lease.context
    return Prompt(rest, lease.cache, context=context.id, context_tokens=context.seen, release=lease.release)


class PrefixIndex:
    """Finds the longest context that a prompt begins with, in one pass over the prompt however many there are.

    Of each context it holds the length and a hash of its token ids. What an owner sees is listed anew after :data:`REFRESH`
    seconds.
    """

    def __init__(self, contexts: ServedContexts) -> None:
        self._contexts = contexts
        self._lock = threading.Lock()
        self._of_owner: dict[str, tuple[float, dict[tuple[int, bytes], str]]] = {}
        self._hashes: dict[str, tuple[int, bytes]] = {}

    def longest(self, owner: str, ids: Sequence[int]) -> Found | None:
        """The context, which leaves at least one token of the prompt; None if there is none, or it is not usable."""
        known = self._known(owner)
        hashed, at, best = hashlib.sha256(), 0, None
        for length in sorted({length for length, _ in known if length < len(ids)}):
            hashed.update(array("q", ids[at:length]).tobytes())
            at = length
            best = known.get((length, hashed.digest()), best)
        if best is not None:
            with suppress(ApiError):  # deleted since it was listed
                return self._contexts.find(owner, best)
        return None

    def _known(self, owner: str) -> dict[tuple[int, bytes], str]:
        with self._lock:
            listed, known = self._of_owner.get(owner, (0.0, {}))
            if time.monotonic() - listed < REFRESH and listed:
                return known
        known = {}
        names: list[str] = []
        with suppress(ApiError):  # a store that cannot be read: the log says why
            names = self._contexts.names(owner)
        for name in names:
            if name not in self._hashes:
                try:
                    context = self._contexts.find(owner, name).context
                    check_fit(context, self._contexts.model)
                except (ApiError, CacheError):
                    continue
                self._hashes[name] = context.seen, hashlib.sha256(array("q", context.tokens).tobytes()).digest()
            known.setdefault(self._hashes[name], name)
        with self._lock:
            self._of_owner[owner] = time.monotonic(), known
        return known
