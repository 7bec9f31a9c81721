"""From a row to token ids: which part of the prompt is compressed, what is cut out, and where the chat template goes.

``official``: LongBench's own protocol. The whole prompt, question included, is read before it is
compressed. A prompt that is too long keeps its first and its last tokens, half of the limit each; it is
cut before the chat template is put around it; few-shot and code tasks get no template
(:attr:`EvalTask.chat`).

``context-only``: the same token ids, cut the same way, but only the text before the question is
compressed, so that the question cannot decide what is kept. A token that covers the end of the context
and the beginning of the question counts as part of the question.

If a task gives the answer's first words (RULER), they follow the chat template, or the raw prompt and a space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from winnowkv.errors import InputError
from winnowkv.evaluate.tasks.tasks import EvalTask, Row
from winnowkv.prompt.chat import template_ends

PROTOCOLS = ("official", "context-only")

Spans = list[tuple[int, int]]  # for each token, the range of characters that it covers


@dataclass(frozen=True)
class EncodedRow:
    """A row's prompt as the model reads it.

    Parameters
    ----------
    ids: token ids of the whole prompt, chat template included.
    context_end: how many of them are compressed; the rest is read afterwards.
    truncated: tokens that were cut out because of the limit.
    text: what ``ids`` encode; context: the part of it that is compressed.
    """

    ids: list[int]
    context_end: int
    truncated: int
    text: str
    context: str


def encode_row(row: Row, task: EvalTask, tokenizer: Any, protocol: str, limit: int | None, chat: bool) -> EncodedRow:
    """Encode a row's prompt by the rules of a protocol.

    Parameters
    ----------
    limit: most tokens of the prompt, chat template included: the model's positions less ``task.max_new_tokens``.
        None: no limit.
    chat: put prompts into the chat template, if the task's official protocol does.

    Raises InputError for an unknown protocol, a limit too small for any prompt, a tokenizer without
    a chat template, or one that does not report which characters its tokens cover.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is unknown: it is one of {', '.join(PROTOCOLS)}")
    templated = chat and task.chat
    # An answer that the task begins leaves no room for thinking before it.
    options = {"enable_thinking": False} if row.prefix else {}
    head, tail = template_ends(tokenizer, **options) if templated else ("", " " if row.prefix else "")
    tail += row.prefix
    prompt, question = row.prompt, len(row.before + row.context)
    ids, spans = tokenize(tokenizer, head + prompt + tail, special=not templated)
    whole = len(ids)
    if limit is not None and whole > limit:
        _, raw = tokenize(tokenizer, prompt, special=True)
        room = limit - max(whole - len(raw), 0)
        while len(ids) > limit:
            if room < 2:
                raise InputError(f"a limit of {limit} tokens is too small for a prompt of {task.name}: raise it")
            # The tokens around the cut are formed anew, so the count may differ from the room by one or two.
            prompt, question = halves(row.prompt, raw, room, len(row.before + row.context))
            ids, spans = tokenize(tokenizer, head + prompt + tail, special=not templated)
            room -= len(ids) - limit
    text = head + prompt + tail
    if protocol == "official":
        return EncodedRow(ids, len(ids), whole - len(ids), text, text)
    question += len(head)
    end = next((token for token, (_, last) in enumerate(spans) if last > question), len(ids))
    return EncodedRow(ids, end, whole - len(ids), text, text[:question])


def halves(prompt: str, spans: Spans, room: int, question: int) -> tuple[str, int]:
    """The text of a prompt's first and last ``room // 2`` tokens, and the new place of the character ``question``."""
    first = spans[room // 2 - 1][1]
    last = max(spans[len(spans) - room // 2][0], first)
    return prompt[:first] + prompt[last:], min(question, first) + max(question - last, 0)


def middle_out(ids: list[int], limit: int) -> list[int]:
    """The first and last half of the token ids if they are more than ``limit`` (at least 1), else all of them."""
    if len(ids) <= limit:
        return ids
    return ids[: limit - limit // 2] + ids[len(ids) - limit // 2 :]


def tokenize(tokenizer: Any, text: str, *, special: bool) -> tuple[list[int], Spans]:
    """Token ids of a text and the characters that each covers; ``special``: with the tokenizer's own special tokens."""
    try:
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    except NotImplementedError:
        raise InputError(
            f"{type(tokenizer).__name__} cannot say which characters its tokens cover: use a fast tokenizer"
        ) from None
    return encoded["input_ids"], encoded["offset_mapping"]
