"""``winnow explain``: the page holds what each policy's own cache keeps, a table says it in short, errors are one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import winnowkv as wk
from support.evaluation import write_model
from winnowkv.cache.kept import KeptTokens
from winnowkv.cache.reading import prefill
from winnowkv.explain.page import component_data
from winnowkv.models.load import load

Winnow = Callable[..., tuple[int, str, str]]
TOKENS, LAYERS, HEADS = 90, 5, 2
PROMPT = " ".join(f"w{(7 * n) % 120 + 1}" for n in range(TOKENS))
SPECS = ("snapkv:observe=8:sinks=2", "adakv:floor=0:of=snapkv:observe=4", "streaming:sinks=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are words."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def explained(winnow: Winnow, folder: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str, str]]:
    """The data in the page, what was printed, and what was said beside."""

    def ask(*more: object, policies: str = ",".join(SPECS)) -> tuple[dict[str, Any], str, str]:
        (tmp_path / "text.txt").write_text(PROMPT)
        asked = ("--model", folder, "--policies", policies, "--budget", "20", "--dtype", "float32", "--no-chat")
        code, out, err = winnow("explain", "-f", tmp_path / "text.txt", "--out", tmp_path / "why.html", *asked, *more)
        assert code == 0, err
        page = (tmp_path / "why.html").read_text(encoding="utf-8")
        return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]), out, err

    return ask


def kept_alone(folder: Path, spec: str) -> KeptTokens:
    """What a cache of its own keeps of the prompt."""
    model, tokenizer = load(str(folder), dtype=torch.float32)
    ids = tokenizer(PROMPT)["input_ids"]
    cache = wk.CompactCache(model, spec, 20, keep_scores=True)
    logits = prefill(model, torch.tensor([ids]), cache)
    if cache.looking is not None:
        list(wk.greedy(model, cache, logits, 8))
    return KeptTokens.of(cache, ids)


def test_the_page_holds_what_each_policy_keeps(explained: Any, folder: Path) -> None:
    data, *_ = explained()
    words = PROMPT.split()
    assert [text.strip() for text in data["tokens"]] == words
    assert [one["policy"] for one in data["selections"]] == list(SPECS)
    for spec, found in zip(SPECS, data["selections"], strict=True):
        (alone,) = component_data(data["tokens"], [kept_alone(folder, spec)])["selections"]
        assert {name: found[name] for name in ("ids", "positions", "reasons", "entries", "tokens", "layers", "heads")} == {
            name: alone[name] for name in ("ids", "positions", "reasons", "entries", "tokens", "layers", "heads")
        }
        assert sum(map(sum, found["entries"])) == 20 * LAYERS * HEADS


def test_a_policy_that_looks_at_the_answer_is_shown_as_it_chooses_then(explained: Any, folder: Path) -> None:
    spec = "snapkv:observe=8:lookahead=3"
    data, out, _ = explained(policies=f"{spec},{SPECS[0]}")
    assert data["selections"][0]["positions"] == kept_alone(folder, spec).to_dict()["positions"]
    assert "first 3 tokens are the full cache's" in " ".join(data["selections"][0]["notes"])
    assert "first 3 tokens" in out


@pytest.mark.parametrize("policies", [",".join(SPECS), "full", "winnow,expected:observe=4:samples=16"])
def test_the_table_fits_a_terminal_and_names_the_page(explained: Any, policies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = explained(policies=policies)
    lines = out.splitlines()
    assert lines[0] == "What was kept of 90 tokens"
    assert max(map(len, lines)) <= 80 or "why.html" in max(lines, key=len)
    assert re.search(r"-- page:\s+\S+why\.html$", out, re.MULTILINE)  # a long path stands on a line of its own
    assert "22.2%" in out or policies == "full"


def test_json_is_a_summary_of_the_page(explained: Any) -> None:
    data, out, _ = explained("--json")
    found = json.loads(out)
    assert (found["tokens"], [one["policy"] for one in found["policies"]]) == (TOKENS, list(SPECS))
    for one, kept in zip(found["policies"], data["selections"], strict=True):
        assert one["entries"] == [sum(layer) / HEADS for layer in kept["entries"]]
        assert sum(one["decided"].values()) == TOKENS * LAYERS * HEADS
        assert one["kept_fraction"] == pytest.approx(20 / TOKENS)
        assert 0 < one["kept_bytes"] < one["full_bytes"]
    streaming = found["policies"][2]
    assert streaming["tokens_in_all_layers"] == 20
    assert streaming["tokens_in_no_layer"] == TOKENS - 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policies", "nothing"), "nothing"),
        (("--policies", " , "), "no policy was named"),
        (("--budget", "0"), "budget"),
        (("--budget", "3", "--policies", "snapkv:observe=8"), "budget of 3"),
        (("--out", "/no/such/folder/why.html"), "does not exist"),
        (("--chat",), "has no chat template"),
        (("--task", "poetry"), "poetry"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(winnow: Winnow, folder: Path, tmp_path: Path, arguments, said) -> None:
    before = ("--model", folder, "--out", tmp_path / "why.html")
    code, out, err = winnow("explain", PROMPT, *before, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("winnow: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "why.html").exists()


def test_a_prompt_longer_than_the_model_is_refused(winnow: Winnow, folder: Path, tmp_path: Path) -> None:
    code, _, err = winnow("explain", "w1 " * 1100, "--model", folder, "--out", tmp_path / "why.html")
    assert code == 2
    assert "the prompt has 1100 tokens, more than the model's 1024 positions" in err


@pytest.mark.slow
def test_a_text_with_a_question_is_explained_on_the_embedded_model(winnow: Winnow, tmp_path: Path) -> None:
    """The needle stands where most layers of winnow keep it, and where those of streaming do not."""
    filler = "The harbour was quiet that morning, and nobody had written anything down. "
    text = f"{filler * 12}The access code of the vault is 4417. {filler * 12}\n\nWhat is the access code of the vault?"
    asked = ("--policies", "winnow,streaming", "--budget", "0.25", "--out", tmp_path / "why.html")
    code, _, err = winnow("explain", text, *asked)
    assert code == 0, err
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    whole = "".join(data["tokens"])
    assert text in whole
    needle, at, places = whole.index("4417"), 0, []
    for number, one in enumerate(data["tokens"]):
        if needle - len(one) < at < needle + 4 and one:
            places.append(number)
        at += len(one)
    shares = []
    for kept in data["selections"]:
        held = [set(rows[0]) if len(rows) == 1 else set.union(*map(set, rows)) for rows in kept["positions"]]
        shares.append(sum(place in layer for layer in held for place in places) / (len(held) * len(places)))
    assert shares[0] > 0.8
    assert shares[1] == 0
