"""What a request's prompt becomes before the engine reads it; where stored contexts come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from winnowkv.prompt.chat import token_ids
from winnowkv.serve.errors import ApiError

if TYPE_CHECKING:
    from winnowkv.cache.cache import CompactCache

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request, ready for the engine.

    Attributes
    ----------
    ids: token ids that are read.
    after: cache of a stored document that they go on from; it is forked, never changed.
    context: id of that document. context_tokens: of the document; they count as prompt tokens that were not read again.
    release: called once, when the first token came, or the request has ended or was refused: lets go of ``after``.
    """

    ids: list[int]
    after: CompactCache | None = None
    context: str | None = None
    context_tokens: int = 0
    release: Callable[[], None] | None = None


def release(prompts: Sequence[Prompt]) -> None:
    """Let go of the contexts of prompts whose request has ended, or is not asked after all."""
    for prompt in prompts:
        if prompt.release is not None:
            prompt.release()


class PromptReader(Protocol):
    """Turns what a request says into prompts. Called in a thread of its own, never on the event loop: it may take long.

    Both methods raise :class:`ApiError` or a WinnowError for what cannot be served; they are given the context that the
    request names (``winnow_context``), or None, and the owner of its key (:func:`winnowkv.serve.keys.owner_of`).
    """

    def chat(self, messages: Sequence[Message], context: str | None, owner: str, *, own: bool = False) -> Prompt:
        """The prompt of chat messages ``{"role", "content"}``, content as one text.

        ``own``: the request asks for a policy or budget of its own.
        """

    def text(self, prompt: str | list[int], context: str | None, owner: str) -> Prompt:
        """The prompt of a text as it is, or of token ids."""


class PlainPrompts:
    """Prompts as the tokenizer reads them, on a server without contexts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def chat(self, messages: Sequence[Message], context: str | None, owner: str, *, own: bool = False) -> Prompt:
        """Messages in the model's chat template."""
        return self._read(list(messages), context)

    def text(self, prompt: str | list[int], context: str | None, owner: str) -> Prompt:
        """A text, with the special tokens that the tokenizer puts before texts, or ids as they are."""
        return self._read(prompt, context)

    def _read(self, prompt: Any, context: str | None) -> Prompt:
        if context is not None:
            raise ApiError(
                404, "this server keeps no contexts: leave winnow_context out, and send the text",
                code="context_not_found", param="winnow_context",
            )  # fmt: skip
        return Prompt(token_ids(self.tokenizer, prompt))
