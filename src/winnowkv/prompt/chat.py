"""Chat templates: the only place that applies one, and what else turns a prompt into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from winnowkv.errors import InputError

PLACEHOLDER = "THE-PROMPT"  # stands for the user's message while the template around it is read
AnyPrompt = str | Sequence[int] | Sequence[dict[str, Any]] | Tensor


def uses_chat(asked: bool | None, tokenizer: Any) -> bool:
    """Whether prompts go into the chat template: as asked, else if the tokenizer has one."""
    return bool(tokenizer.chat_template) if asked is None else asked


def apply_template(tokenizer: Any, messages: Sequence[dict[str, Any]], way_out: str = "use --no-chat") -> list[int]:
    """Token ids of chat messages, ready for the assistant's answer.

    Raises InputError for a tokenizer without a template, with the way out, and for messages that its template refuses.
    """
    if not tokenizer.chat_template:
        raise InputError(f"this model's tokenizer has no chat template: {way_out}")
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # templates raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the model's chat template does not take these messages: {reason}") from error


def encode(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt: one user message in the chat template with ``chat``, the text as it is without.

    Raises InputError for ``chat`` with a tokenizer that has no template.
    """
    return apply_template(tokenizer, user_message(text)) if chat else tokenizer(text).input_ids


def render(tokenizer: Any, text: str) -> str:
    """The chat template around one user message, as text. Raises InputError for a tokenizer without a template."""
    if not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template: use --no-chat")
    return tokenizer.apply_chat_template(user_message(text), add_generation_prompt=True, tokenize=False)


def user_message(text: str) -> list[dict[str, Any]]:
    """One message of the user."""
    return [{"role": "user", "content": text}]


def token_ids(tokenizer: Any, prompt: AnyPrompt) -> list[int]:
    """Token ids of text as it is, of chat messages through the model's template, or of token ids.

    Raises InputError for anything else, and as :func:`apply_template` does.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    parts: list[Any] = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    if all(isinstance(part, int) and not isinstance(part, bool) for part in parts):
        return parts
    if not all(isinstance(part, dict) for part in parts) or not isinstance(prompt, Sequence):
        raise InputError(f"a prompt is text, chat messages or token ids, not {type(parts[0]).__name__}s")
    return apply_template(tokenizer, parts, "give the prompt as text")


def template_ends(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before a user's message and after it.

    Raises InputError for a tokenizer without a template, or with one that changes or repeats the message.
    """
    head, found, tail = render(tokenizer, PLACEHOLDER).partition(PLACEHOLDER)
    if not found or PLACEHOLDER in tail:
        raise InputError("this model's chat template changes or repeats the user's message: use --no-chat")
    return head, tail


def template_tail(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many tokens at a prompt's end the chat template put after the user's message; 0 for a raw prompt."""
    try:
        _, text = template_ends(tokenizer)
    except InputError:
        return 0  # a tokenizer without a template, or with one that cannot be told from the message
    tail = tokenizer(text, add_special_tokens=False).input_ids
    return len(tail) if tail and list(ids[-len(tail) :]) == list(tail) else 0
