"""The text of each token: together they are the prompt's, whatever a tokenizer makes of blanks and bytes."""

from __future__ import annotations

from typing import Any

import pytest

from support.tokenizers import byte_tokenizer
from winnowkv.explain.texts import token_texts

TEXTS = ["plain words, and a line\nbreak", "naïve 日本語 🙂🙂 end", "🙂", "a \ufffd b\ufffd", " leading", "", "x" * 50]


class Blanks:
    """Words as tokens that bring the blank before them, which decoding drops at the beginning, as SentencePiece does."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" w{one}" for one in ids).removeprefix(" ")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_become_the_characters_that_they_end(text: str) -> None:
    tokenizer = byte_tokenizer(bos=False)
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) == len(text.encode())
    assert "".join(texts) == text
    whole = [one for one in texts if one]
    if "\ufffd" not in text:
        assert whole == list(text)  # nothing of a character before its last byte


def test_special_tokens_have_their_text() -> None:
    tokenizer = byte_tokenizer(bos=True)
    assert token_texts(tokenizer, tokenizer("ab").input_ids) == ["<s>", "a", "b"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = byte_tokenizer(bos=False)
    assert token_texts(tokenizer, tokenizer("a🙂").input_ids[:-1]) == ["a", "", "", "\ufffd"]


def test_blanks_that_decoding_drops_at_the_beginning_are_there_in_the_middle() -> None:
    assert token_texts(Blanks(), range(30)) == ["w0", *(f" w{n}" for n in range(1, 30))]
