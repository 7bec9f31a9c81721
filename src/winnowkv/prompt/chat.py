"""Chat templates: the only place that applies one, and what else turns a prompt into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from winnowkv.errors import InputError

PLACEHOLDER = "THE-PROMPT"  # stands for the user's message while the template around it is read
BEFORE_QUESTION = "\n\n"  # between a text and the question about it
PROBES = ("Who", "a", "1", "(", "\u00e9")  # questions may begin like these
ENDING_TOKENS = (64, 32, 16, 8)
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
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        ids: list[int] = encoded["input_ids"]
        return ids
    except Exception as error:  # templates raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the model's chat template does not take these messages: {reason}") from error


def encode(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt: one user message in the chat template with ``chat``, the text as it is without.

    Raises InputError for ``chat`` with a tokenizer that has no template.
    """
    return apply_template(tokenizer, user_message(text)) if chat else tokenizer(text).input_ids


def render(tokenizer: Any, text: str, **options: Any) -> str:
    """The chat template around one user message, as text; ``options`` are the template's own.

    Raises InputError for a tokenizer without a template.
    """
    if not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template: use --no-chat")
    around: str = tokenizer.apply_chat_template(user_message(text), add_generation_prompt=True, tokenize=False, **options)
    return around


def user_message(text: str) -> list[dict[str, Any]]:
    """One message of the user."""
    return [{"role": "user", "content": text}]


def token_ids(tokenizer: Any, prompt: AnyPrompt) -> list[int]:
    """Token ids of text as it is, of chat messages through the model's template, or of token ids.

    Raises InputError for anything else, and as :func:`apply_template` does.
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt).input_ids
        return ids
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    parts: list[Any] = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    if all(isinstance(part, int) and not isinstance(part, bool) for part in parts):
        return parts
    if not all(isinstance(part, dict) for part in parts) or not isinstance(prompt, Sequence):
        raise InputError(f"a prompt is text, chat messages or token ids, not {type(parts[0]).__name__}s")
    return apply_template(tokenizer, parts, "give the prompt as text")


def template_ends(tokenizer: Any, **options: Any) -> tuple[str, str]:
    """What the chat template puts before a user's message and after it; ``options`` are the template's own.

    Raises InputError for a tokenizer without a template, or with one that changes or repeats the message.
    """
    head, found, tail = render(tokenizer, PLACEHOLDER, **options).partition(PLACEHOLDER)
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


def open_turn(tokenizer: Any, text: str, *, chat: bool, system: str | None = None) -> list[int]:
    """Token ids of a text that a question will follow: with ``chat`` a user's turn, begun by the text and not ended yet.

    They are those that all of :data:`PROBES` leave as they are, if asked after the text, up to the text's end. Blank space
    there is dropped. ``system`` is a message before the turn.

    Raises InputError for a text that is blank, a system message without ``chat``, and as :func:`apply_template` does.
    """
    if not text.strip():
        raise InputError("the text is empty: give at least one word")
    every = [whole_turn(tokenizer, text, probe, chat=chat, system=system) for probe in PROBES]
    same = min(shared_tokens(every[0], other) for other in every)
    ids = every[0][:same]
    while ids and not tokenizer.decode(ids[-1:]).strip():
        ids.pop()
    return ids


def text_begin(tokenizer: Any, ids: Sequence[int], *, chat: bool, system: str | None = None) -> int:
    """How many tokens of an :func:`open_turn` stand before the text: those that it shares with turns of other texts."""
    others = [open_turn(tokenizer, probe, chat=chat, system=system) for probe in PROBES]
    return min(shared_tokens(ids, other) for other in others)


def shared_tokens(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two prompts begin with in common."""
    return next(
        (at for at, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), min(len(ids), len(others))
    )


def whole_turn(tokenizer: Any, text: str, question: str, *, chat: bool, system: str | None = None) -> list[int]:
    """Token ids of a text and a question about it, ready for the answer."""
    said = f"{text.rstrip()}{BEFORE_QUESTION}{question}"
    if not chat:
        if system is not None:
            raise InputError("a system message needs a chat template: leave system= out, or put it into the text")
        return list(tokenizer(said).input_ids)
    before = [] if system is None else [{"role": "system", "content": system}]
    return list(apply_template(tokenizer, [*before, *user_message(said)], "use chat=False"))


def text_ending(tokenizer: Any, ids: Sequence[int], *, chat: bool) -> str:
    """The last words of an :func:`open_turn`, from which alone :func:`rest_of_turn` goes on as from the whole text.

    Raises InputError if the tokenizer gives other ids for them: it is not the one that made the ids.
    """
    for tokens in ENDING_TOKENS:
        text: str = tokenizer.decode(list(ids[-tokens:]))
        last = list(ids[-tokens // 2 :])
        if text.strip() and open_turn(tokenizer, text, chat=chat)[-len(last) :] == last:
            return text
    raise InputError(
        "this tokenizer gives other token ids for the end of the text than those that were read: give the tokenizer that the "
        "text was read with"
    )


def rest_of_turn(tokenizer: Any, ending: str, question: str, *, chat: bool) -> list[int]:
    """Token ids of a question that follow an :func:`open_turn`, up to where the answer begins; ``ending`` is the turn's so far.

    Raises InputError for a question that is blank, or whose first characters no token boundary divides from the text.
    """
    if not question.strip():
        raise InputError("the question is empty: give at least one word")
    so_far = open_turn(tokenizer, ending, chat=chat)
    ids = whole_turn(tokenizer, ending, question.strip(), chat=chat)
    if ids[: len(so_far)] != so_far:
        raise InputError(f"the question {question[:20]!r}... begins with characters that join the text: begin with a word")
    return ids[len(so_far) :]


def next_turn(tokenizer: Any, question: str, *, chat: bool) -> list[int]:
    """Token ids that end an answer and ask the next question, up to where its answer begins.

    Raises InputError for a question that is blank, and for a template that changes what was answered before.
    """
    if not question.strip():
        raise InputError("the question is empty: give at least one word")
    if not chat:
        return list(tokenizer(f"{BEFORE_QUESTION}{question.strip()}", add_special_tokens=False).input_ids)
    turns = [*user_message("-"), {"role": "assistant", "content": PLACEHOLDER}, *user_message(question.strip())]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    _, found, rest = text.partition(PLACEHOLDER)
    if not found:
        raise InputError("this model's chat template changes earlier answers: ask each question by itself, with ask()")
    return list(tokenizer(rest, add_special_tokens=False).input_ids)
