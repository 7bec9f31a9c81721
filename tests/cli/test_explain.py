"""``winnow generate --explain``: a line for each layer, a count, and the same as plain data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import winnowkv as wk
from support.evaluation import write_model
from support.tokenizers import byte_tokenizer
from winnowkv.cache.explain import Explanation
from winnowkv.cache.reading import prefill
from winnowkv.cli.explain import find_token, last_occurrence, layer_line, lines, ranges
from winnowkv.models.load import load

Winnow = Callable[..., tuple[int, str, str]]
TOKENS, LAYERS, HEADS = 60, 5, 2
WORDS = [f"w{(7 * n) % 120 + 1}" for n in range(TOKENS)]
PROMPT = " ".join(WORDS)
ASKED = ("--policy", "snapkv:observe=8:sinks=2", "--budget", "20", "--max-new-tokens", "3", "--no-chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are words."""
    return write_model(tmp_path_factory.mktemp("model"))


def explained(winnow: Winnow, folder: Path, token: object, *more: str) -> tuple[list[str], str]:
    """What is printed after the report, and the whole output."""
    code, out, _ = winnow("generate", PROMPT, "--model", folder, *ASKED, "--explain", token, *more)
    assert code == 0
    printed = out.splitlines()
    begin = next((at for at, line in enumerate(printed) if line.startswith("-- token ")), len(printed))
    return printed[begin:], out


def test_every_layer_has_a_line_and_the_count_is_that_of_the_cache(winnow: Winnow, folder: Path) -> None:
    model, tokenizer = load(str(folder))
    cache = wk.CompactCache(model, ASKED[1], 20)
    ids = tokenizer(PROMPT)["input_ids"]
    prefill(model, torch.tensor([ids]), cache)
    kept = torch.stack([(layer.positions[0] == 30).any(-1) for layer in cache.compact_layers])
    assert 0 < kept.sum() < kept.numel(), "a token that some heads keep"
    (title, _, header, *layers, count), whole = explained(winnow, folder, 30)
    assert whole.splitlines()[1].startswith("-- policy snapkv:observe=8:sinks=2, budget 20: ")
    assert title == f"-- token 30: {WORDS[30]!r}"
    assert header.split() == ["layer", "KV", "heads", "kept", "by", "score", "rank", "threshold"]
    assert [line.split()[0] for line in layers] == [str(layer) for layer in range(LAYERS)]
    assert all(len(line) <= 80 for line in (header, *layers))
    for line, heads in zip(layers, kept.tolist(), strict=True):
        sides = "all 2 kept" if all(heads) else "0 kept, 1 went" if heads[0] else "1 kept, 0 went" if heads[1] else "all 2 went"
        assert line[6:].startswith(sides)
        assert ("score" in line) == any(heads)
    assert count == f"-- kept in {int(kept.any(1).sum())} of {LAYERS} layers, {int(kept.sum())} of {LAYERS * HEADS} heads"


def test_the_report_names_policy_and_budget(winnow: Winnow, folder: Path) -> None:
    asked = ("generate", PROMPT, "--model", folder, "--max-new-tokens", "2", "--no-chat")
    code, out, _ = winnow(*asked)
    assert code == 0
    assert "-- policy winnow, budget 0.12 (the default): " in out
    code, out, _ = winnow(*asked, "--policy", "adakv:floor=0.1:of=snapkv:observe=8", "--budget", "20")
    assert code == 0
    assert "-- policy adakv:floor=0.1:of=snapkv:observe=8, budget 20: " in out
    report = json.loads(winnow(*asked, "--json")[1])
    assert (report["policy"], report["budget"]) == ("winnow", 0.12)


@pytest.mark.parametrize(("token", "reason"), [(1, "sink"), (-1, "recent window")])
def test_what_always_stays_says_so(winnow: Winnow, folder: Path, token: int, reason: str) -> None:
    printed, _ = explained(winnow, folder, token)
    assert all(reason in line for line in printed[3:-1])
    assert printed[-1] == "-- kept in 5 of 5 layers, 10 of 10 heads"
    assert printed[0].startswith(f"-- token {token % TOKENS}: ")


def test_a_policy_that_evicts_nothing_keeps_everything(winnow: Winnow, folder: Path) -> None:
    printed, _ = explained(winnow, folder, 30, "--policy", "full")
    assert all("everything kept" in line for line in printed[3:-1])


def test_json_has_an_entry_for_each_layer_and_head(winnow: Winnow, folder: Path) -> None:
    _, out = explained(winnow, folder, WORDS[30], "--json")
    model, tokenizer = load(str(folder))
    cache = wk.CompactCache(model, ASKED[1], 20, keep_scores=True)
    prefill(model, torch.tensor([tokenizer(PROMPT)["input_ids"]]), cache)
    found = json.loads(out)
    wanted = [vars(one) for layer in range(LAYERS) for one in cache.explain(layer, 30)]
    assert [{**entry, "text": None} for entry in found["explain"]] == [{**entry, "text": None} for entry in wanted]
    assert {entry["text"] for entry in found["explain"]} == {WORDS[30]}
    assert len(found["explain"]) == LAYERS * HEADS
    code, out, _ = winnow("generate", PROMPT, "--model", folder, *ASKED, "--json")
    assert code == 0
    assert "explain" not in json.loads(out)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (60, "--explain 60: the prompt has tokens 0 to 59, or -60 to -1 from its end"),
        (-61, "--explain -61: the prompt has tokens 0 to 59"),
        ("nowhere", "--explain 'nowhere': this text does not occur in the prompt"),
        ("", "--explain '': this text does not occur in the prompt"),
    ],
)
def test_a_token_that_is_not_there_is_named(winnow: Winnow, folder: Path, token: object, message: str) -> None:
    code, out, err = winnow("generate", PROMPT, "--model", folder, *ASKED, "--explain", token)
    assert (code, out) == (2, "")
    assert message in err


def test_a_text_is_found_at_the_last_token_of_its_last_occurrence() -> None:
    tokenizer = byte_tokenizer(bos=True)
    ids = tokenizer("the code is 4417, the code is 99; é")["input_ids"]
    text = "".join(tokenizer.decode([i]) for i in ids[: last_occurrence(tokenizer, ids, "code") + 1])
    assert text == "<s>the code is 4417, the code"
    assert find_token(tokenizer, ids, "4417,") == 1 + len("the code is 4417")
    assert find_token(tokenizer, ids, "é") == len(ids) - 1, "two bytes: the second"
    assert find_token(tokenizer, ids, "; ") == len(ids) - 3
    assert find_token(tokenizer, ids, "<s>") == 0
    assert (find_token(tokenizer, ids, "-1"), find_token(tokenizer, ids, "3")) == (len(ids) - 1, 3)


def one(layer: int, head: int, **more: Any) -> Explanation:
    made = {"kept": True, "reason": "score", "score": 0.5, "rank": 1, "threshold": 0.1, "competing": 9, **more}
    return Explanation(layer, head, 4, **made)


def test_heads_are_folded() -> None:
    assert ranges([0, 2, 4, 5, 6, 7, 9, 10]) == "0,2,4-7,9,10"
    went = {"kept": False, "reason": "evicted"}
    line = layer_line([one(12, 0, rank=4, score=0.25), one(12, 1, **went, rank=30), one(12, 2, reason="its span", rank=3)])
    assert line.strip().split("  ")[0] == "12 0,2 kept, 1 went"
    assert " score, its span " in line
    assert line.split()[-3:] == ["0.5", "3/9", "0.1"], "of the head in which it ranks best"
    ragged = [one(0, 0, **went, rank=2, threshold=0.7), one(0, 1, rank=5)]
    assert layer_line(ragged).split()[-3:] == ["0.5", "5/9", "0.1"], "of a head that kept it"
    assert layer_line([one(0, 0, **went), one(0, 1, **went)]).split()[1:5] == ["all", "2", "went", "-"]


def test_lines_fit_80_columns_whatever_the_numbers() -> None:
    draw = random.Random(0)
    for heads in (1, 3, 8, 32):
        layers = []
        for layer in range(128):
            scores = [draw.choice([None, 0.0, 1.0, 123456.7, 1.2345e-12]) for _ in range(heads)]
            reasons = [draw.choice(["score", "its span"]) for _ in scores] if layer % 2 else ["shared by all layers"] * heads
            layers.append([
                one(layer, head, kept=draw.random() < 0.5, reason=reason, score=score, threshold=score, competing=131072,
                    rank=None if score is None else draw.randint(100000, 131072))
                for head, (score, reason) in enumerate(zip(scores, reasons, strict=True))
            ])  # fmt: skip
        printed = list(lines(layers, "text"))
        assert len(printed) == 128 + 4
        assert all(len(line) <= 80 for line in printed)
