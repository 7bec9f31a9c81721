"""The text of each token of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"  # what a tokenizer makes of bytes that are not a whole character, or not yet
DECODED_TOGETHER = 4  # the text of a token may depend on those before it: a blank in front, the rest of a character


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text for each token; together they are the prompt's, special tokens included.

    A character of several tokens belongs to the last of them, the others are empty.
    """
    texts: list[str] = []
    begin = shown = 0  # tokens from ``begin`` on are decoded together, so many characters of theirs are in the texts
    for at in range(len(ids)):
        decoded = _decode(tokenizer, ids[begin : at + 1])
        whole = decoded.rstrip(REPLACEMENT_CHARACTER)
        if at == len(ids) - 1:
            whole = decoded
        texts.append(whole[shown:])
        shown = max(len(whole), shown)
        if len(whole) == len(decoded) and at - begin >= DECODED_TOGETHER:
            begin, shown = at, len(_decode(tokenizer, ids[at : at + 1]))
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
