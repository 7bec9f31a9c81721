"""Sampling: limits of its options, draws that depend on the seed only, and streamed text that never changes later."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import winnowkv as wk
from support.tokenizers import byte_tokenizer
from winnowkv.engine.detokenizer import TextStream
from winnowkv.engine.sampling import Sampler, Sampling, choose

CPU = torch.device("cpu")
TEXTS = (
    "plain words, and more of them so that the window is cut a few times over; again and again and again.",
    "Größe, naïve, 你好世界, Ελλάδα, 🎉🎊, 👩‍👩‍👧 and é",
    "tail \U0001f600",
)


def logits(rows: int = 1, seed: int = 0, size: int = 50) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def draws(sampling: Sampling, count: int = 30, ends: tuple[int, ...] = ()) -> list[int]:
    sampler = Sampler(sampling, ends, CPU)
    for seed in range(count):
        choose(logits(seed=seed), [sampler])
    return sampler.tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be a whole number"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must be a whole number of at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is above max_new_tokens=8: lower"),
        ({"temperature": -0.5}, "temperature=-0.5 must be 0 .* or at least 1e-06"),
        ({"temperature": 1e-9}, "temperature=1e-09 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": "1"}, "temperature='1' must be a finite number"),
        ({"top_p": 0}, "top_p=0 must be above 0 and at most 1; 1 draws from all"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0"),
        ({"top_k": -1}, "top_k=-1 must be a whole number of at least 0; 0 draws from all"),
        ({"top_k": True}, "top_k=True must be a whole number"),
        ({"seed": -1}, "seed=-1 must be .* or None for a new one"),
        ({"seed": 2**63}, "seed=9223372036854775808 is too large: give a number below"),
        ({"logprobs": -1}, "logprobs=-1 must be .* or None for none"),
        ({"stop": "word"}, r"stop='word' must be strings .* give stop=\('...',\)"),
        ({"stop": ("a", "")}, "at least one character"),
        ({"stop": (1,)}, "must be strings"),
    ],
)
def test_values_outside_their_limits_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(wk.InputError, match=message):
        Sampling(**values)


def test_stop_strings_may_be_a_list_and_sampling_is_frozen() -> None:
    assert Sampling(stop=["a", "b"]) == Sampling(stop=("a", "b"))
    assert hash(Sampling(stop=["a"])) == hash(Sampling(stop=("a",)))


def test_greedy_takes_the_first_of_the_largest() -> None:
    rows = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]], dtype=torch.bfloat16)
    assert [one and one[0] for one in choose(rows, [Sampler(Sampling(), (), CPU) for _ in rows])] == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_logits_that_are_not_finite_gives_none_and_the_others_tokens(bad: float) -> None:
    rows = logits(3)
    rows[1, 4] = bad
    samplers = [Sampler(Sampling(temperature=1.0, seed=1), (), CPU) for _ in rows]
    chosen = choose(rows, samplers)
    assert chosen[1] is None
    assert not samplers[1].tokens
    assert chosen[0] is not None
    assert chosen[2] is not None


def test_draws_depend_on_their_seed_only() -> None:
    hot = {"temperature": 1.3, "top_p": 0.95, "top_k": 20}
    alone = draws(Sampling(seed=5, **hot))
    assert alone == draws(Sampling(seed=5, **hot)) != draws(Sampling(seed=6, **hot))
    assert draws(Sampling(**hot)) != draws(Sampling(**hot))
    beside = [Sampler(Sampling(seed=5, **hot), (), CPU), Sampler(Sampling(seed=9, temperature=2.0), (), CPU)]
    for seed in range(30):
        choose(torch.cat([logits(seed=seed), logits(seed=seed + 100)]), beside)
    assert beside[0].tokens == alone


def test_top_k_and_top_p_leave_only_likely_tokens() -> None:
    order = [logits(seed=seed)[0].argsort(descending=True).tolist() for seed in range(200)]
    tokens = draws(Sampling(temperature=3.0, top_k=3, seed=0), 200)
    ranks = [row.index(token) for row, token in zip(order, tokens, strict=True)]
    assert set(ranks) == {0, 1, 2}
    assert draws(Sampling(temperature=1.0, top_p=1e-6, seed=0)) == [row[0] for row in order[:30]]
    assert draws(Sampling(temperature=1e-6, seed=0)) == [row[0] for row in order[:30]]


def test_end_tokens_are_excluded_before_min_new_tokens() -> None:
    order = [logits(seed=seed)[0].argsort(descending=True).tolist() for seed in range(4)]
    ends = {row[0] for row in order}
    for sampling in (Sampling(min_new_tokens=3), Sampling(min_new_tokens=3, temperature=1e-6, seed=0)):
        tokens = draws(sampling, 4, tuple(ends))
        assert tokens[:3] == [next(token for token in row if token not in ends) for row in order[:3]]
        assert tokens[3] == order[3][0]


def test_logprobs_are_those_of_the_model_with_any_options() -> None:
    rows = logits()
    expected = rows[0].log_softmax(-1)
    for sampling in (Sampling(logprobs=4), Sampling(logprobs=4, temperature=5.0, top_k=10, seed=3)):
        ((token, logprob),) = choose(rows, [Sampler(sampling, (), CPU)])
        assert logprob is not None
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(float(expected[token]))
        assert [token for token, _ in logprob.top] == expected.topk(4).indices.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(expected.topk(4).values.tolist())
    ((_, nothing),) = choose(rows, [Sampler(Sampling(logprobs=0), (), CPU)])
    assert nothing is not None
    assert nothing.top == ()
    ((_, every),) = choose(rows, [Sampler(Sampling(logprobs=999), (), CPU)])
    assert every is not None
    assert len(every.top) == 50


def bytes_of(text: str) -> list[int]:
    return byte_tokenizer(bos=False)(text).input_ids


def fallback() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: words with a blank in front, unknown characters as bytes that must come together."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    vocabulary |= {word: 258 + n for n, word in enumerate(("▁Once", "▁upon", "▁a", "▁time", ".", "▁"))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_no_half_character_comes_out(text: str) -> None:
    stream = TextStream(byte_tokenizer(bos=False))
    pieces = [stream.push(token) for token in bytes_of(text)]
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_incomplete_bytes_come_out_at_the_end() -> None:
    words, ids = byte_tokenizer(bos=False), [*bytes_of("a"), *bytes_of("é")[:1]]
    stream = TextStream(words)
    assert [stream.push(token) for token in ids] == ["a", ""]
    assert stream.flush() == "\ufffd"
    assert stream.text == "a\ufffd"
    broken = [*bytes_of("é")[:1], *bytes_of("b")]
    stream = TextStream(words)
    assert [stream.push(token) for token in broken] == ["", "\ufffdb"]


def test_words_and_bytes_of_sentence_pieces() -> None:
    words = fallback()
    known = words.convert_tokens_to_ids(["▁Once", "▁upon", "▁a", "▁time", "."])
    two = [byte + 2 for byte in "你好".encode()]
    ids = [known[0], *two, *known[1:], words.bos_token_id, *known * 5, words.bos_token_id, *known, *two]
    stream = TextStream(words)
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == words.decode(ids, skip_special_tokens=True)
    assert pieces[:8] == ["Once", "", "", "你", "", "", "好", " upon"]


@pytest.mark.parametrize("before", range(6, 20))
def test_the_text_is_the_same_wherever_the_window_is_cut(before: int) -> None:
    words = fallback()
    upon, a, time = words.convert_tokens_to_ids(["▁upon", "▁a", "▁time"])
    smiles = [byte + 2 for byte in "\U0001f600\U0001f601".encode()]
    ids = [*[upon] * before, words.bos_token_id, a, *smiles, time]
    stream = TextStream(words)
    assert "".join(stream.push(token) for token in ids) == words.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(cut: int) -> None:
    """Tokens of up to ``cut`` characters: the stop string may lie in one, across several, or begin in vain."""
    text, stop = "abab" * 5 + "abac and so on", ("abac", "ba x")
    made = Tokenizer(models.WordLevel({text[at : at + cut]: at for at in range(len(text))} | {"?": 999}, unk_token="?"))
    made.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
    stream, pieces = TextStream(words, stop), []
    for at in range(0, len(text), cut):
        pieces.append(stream.push(words.convert_tokens_to_ids(text[at : at + cut])))
        if stream.stopped:
            break
    assert stream.stopped
    assert "".join(pieces) == stream.text == "abab" * 5
    assert stream.flush() == ""


def test_a_possible_start_of_a_stop_string_is_withheld_until_it_is_decided() -> None:
    stream = TextStream(byte_tokenizer(bos=False), ("###",))
    assert [stream.push(token) for token in bytes_of("a#b##c##")] == ["a", "", "#b", "", "", "##c", "", ""]
    assert stream.flush() == "##"
    assert not stream.stopped


def test_stop_strings_do_not_count_before_min_new_tokens() -> None:
    stream = TextStream(byte_tokenizer(bos=False), ("xx",), min_tokens=4)
    pieces = [stream.push(token) for token in bytes_of("xxxxx")]
    assert stream.stopped
    assert "".join(pieces) == "xxx"  # the first that ends after the fourth token
    stream = TextStream(byte_tokenizer(bos=False), ("xx",), min_tokens=4)
    assert "".join(stream.push(token) for token in bytes_of("xxabcxx")) == "xxabc"


def test_streamed_pieces_with_stop_strings_equal_a_search_in_the_whole_text() -> None:
    draw = random.Random(0)
    words = byte_tokenizer(bos=False)
    for _ in range(300):
        text = "".join(draw.choice("aé你b") for _ in range(40))
        stop = tuple("".join(draw.choice("aé你b") for _ in range(draw.randint(1, 4))) for _ in range(2))
        stream, pieces = TextStream(words, stop), []
        for token in bytes_of(text):
            pieces.append(stream.push(token))
            if stream.stopped:
                break
        pieces.append(stream.flush())
        ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
        assert "".join(pieces) == stream.text == (text[: min(ends)[1]] if ends else text)
