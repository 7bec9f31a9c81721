"""``winnow.explain``: which tokens of a request's prompt were kept, as a part of its answer."""

from __future__ import annotations

from typing import Any

from winnowkv.cache.kept import KeptTokens
from winnowkv.explain.texts import token_texts
from winnowkv.serve.errors import ApiError

MOST_EXPLAINED = 16384  # tokens of a prompt; the answer grows with the entries kept of each layer and head


def check_explained(choices: int, context: str | None) -> None:
    """Raise ApiError for a request of so many choices in all, or about a context, that cannot be explained."""
    if choices > 1:
        why = f"winnow.explain is of one prompt and one choice, and {choices} were asked for: ask one by one"
        raise ApiError(400, why, code="unsupported_value", param="winnow.explain")
    if context is not None:
        why = "winnow.explain: what is kept of a stored context was chosen when it was stored: leave explain out"
        raise ApiError(400, why, code="unsupported_value", param="winnow.explain")


def check_explained_tokens(tokens: int) -> None:
    """Raise ApiError for a prompt that is too long to say of each token what became of it."""
    if tokens > MOST_EXPLAINED:
        why = f"the prompt has {tokens} tokens, winnow.explain takes at most {MOST_EXPLAINED}: shorten it, or leave explain out"
        raise ApiError(400, why, code="invalid_value", param="winnow.explain")


def kept_body(kept: KeptTokens | None, tokenizer: Any) -> dict[str, Any] | None:
    """What was kept, with the text of each token; None if the answer ended before it was decided."""
    if kept is None:
        return None
    return kept.to_dict() | {"texts": token_texts(tokenizer, kept.ids or ())}
