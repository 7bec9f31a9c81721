"""Calibration prompts: facts, spans, lengths, and prompts of a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import winnowkv as wk
from support.tokenizers import byte_tokenizer
from winnowkv.calibrate.prompts import LENGTH_TOLERANCE, build, generate_facts, read_filler, read_prompts, schedule
from winnowkv.evaluate.needle.prompts import read_haystack, read_needles


@pytest.mark.parametrize("bos", [False, True])
def test_spans_are_exact_and_bos_stands_at_the_start_only(bos: bool) -> None:
    words, filler = byte_tokenizer(bos=bos), read_filler()
    for fact, length, depth, offset in schedule(20, (900, 1500), (0.0, 0.5, 1.0), 0):
        made = build(words, filler, fact, length, depth, offset, chat=False)
        assert length - LENGTH_TOLERANCE <= len(made.ids) <= length
        begin, end = made.span
        text = "".join(bytes_of(words, made.ids[begin:end]))
        assert text == fact.answer
        assert made.ids.count(0) == int(bos)


def bytes_of(words: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    decode = {c: i for i, c in enumerate_bytes()}
    return [bytes([decode[token]]).decode() for token in words.convert_ids_to_tokens(ids)]


def enumerate_bytes() -> list[tuple[int, str]]:
    """The byte-level alphabet: printable bytes stand for themselves, the space for a character of its own."""
    return [(byte, "\u0120" if byte == 32 else chr(byte)) for byte in range(32, 127)]


def test_facts_depend_on_their_seed_and_share_nothing_with_the_evaluation() -> None:
    first, again, other = generate_facts(60, 0), generate_facts(60, 0), generate_facts(60, 1)
    assert first == again != other
    assert len({fact.question for fact in first}) == 60
    assert {fact.kind for fact in first} == {"fact", "code", "name", "date", "multi"}
    evaluated = {text for needle in read_needles() for text in (needle.needle, needle.question, needle.answer)}
    for fact in first + other:
        assert fact.needle.count(fact.answer) == 1
        assert not {fact.needle, fact.question, fact.answer} & evaluated
    sentences = {s.strip() for s in read_filler().split(".") if len(s) > 20}
    assert not sentences & {s.strip() for s in read_haystack().split(".")}


def test_every_kind_meets_every_length() -> None:
    cases = schedule(60, (100, 200), (0.1, 0.9), 0)
    assert len({(fact.kind, length) for fact, length, _, _ in cases}) == 10


def test_prompts_of_a_users_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"needle": "The key is blue.", "question": "Which key?", "answer": "blue"}\n')
    assert read_prompts(file)[0].kind == "own"
    file.write_text('{"needle": "The key is blue.", "question": "Which key?", "answer": "red"}\n')
    with pytest.raises(wk.InputError, match="row 1: the answer 'red' must be in the needle"):
        read_prompts(file)
    file.write_text("")
    with pytest.raises(wk.InputError, match="holds no needle"):
        read_prompts(file)
    file.write_text('{"needle": "x"\n')
    with pytest.raises(wk.InputError, match="line 1"):
        read_prompts(file)
