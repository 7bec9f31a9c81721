"""`winnow context`: add, list and rm on a tiny model's store; what is printed, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import winnowkv as wk
from support.contexts import drawn_context
from support.models import tiny_model
from support.terminal import blocks, too_wide
from support.tokenizers import ChatLetters
from winnowkv.contexts.defaults import EQUAL_BLIND_POLICY, EQUAL_HINTED_POLICY
from winnowkv.contexts.saved import SavedContexts
from winnowkv.contexts.store import ContextStore
from winnowkv.policies import policy as make_policy
from winnowkv.prompt.chat import PROBES

Winnow = Callable[..., tuple[int, str, str]]
TEXT = " ".join(f"w{(7 * n) % 120 + 1}" for n in range(150))
SNAPKV = ("--policy", "snapkv:observe=8", "--block", 16, "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are words, and a document. The tokenizer tells questions' first words apart."""
    made = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(made)
    words = {"[UNK]": 0, **{f"w{n}": n for n in range(1, 121)}, **{probe: 121 + n for n, probe in enumerate(PROBES)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(made)
    (made / "report.txt").write_text(TEXT)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def add(winnow: Winnow, folder: Path, store: Path, *more: object) -> tuple[int, str, str]:
    return winnow("context", "add", folder / "report.txt", "--model", folder, "--store", store, *SNAPKV, *more)


def test_a_document_is_added_listed_and_removed(
    winnow: Winnow, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(store.parent)  # a long path would not fit
    store = Path(store.name)
    code, out, err = add(winnow, folder, store, "--budget", 0.3)
    assert code == 0, err
    first, *notes = out.splitlines()
    context = ContextStore(store).context(first)
    assert (context.kept, context.seen, context.header.name) == (48, 150, "report.txt")  # 45 entries are three blocks
    assert "48 of 150 entries kept by snapkv" in notes[0]
    assert too_wide(out) == []
    code, out, _ = winnow("context", "list", "--store", store)
    (table,) = blocks(out)
    assert code == 0
    assert [row.split() for row in table.rows] == [
        [context.id, "48", "150", f"{context.bytes / 2**20:.2f}", "report.txt", "snapkv:observe=8"]
    ]
    assert too_wide(out) == []
    code, out, _ = winnow("context", "rm", context.id[:6], "--store", store)
    assert (code, out) == (0, f"removed {context.id}\n")
    assert ContextStore(store).ids() == []


def test_json_and_standard_input(winnow: Winnow, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_STORE", str(store))
    how = ("--model", folder, *SNAPKV, "--budget", 20, "--name", "notes", "--json")
    code, out, err = winnow("context", "add", "-", *how, stdin=TEXT + "\r\n")
    assert code == 0, err
    found = json.loads(out)
    assert {name: found[name] for name in ("kept", "seen", "name", "policy", "budget", "dtype", "chat", "store")} == {
        "kept": 32, "seen": 150, "name": "notes", "policy": "snapkv:observe=8", "budget": "32", "dtype": "float32",
        "chat": False, "store": str(store),
    }  # fmt: skip
    assert found["seconds"] > 0
    _, same, _ = winnow("context", "add", "-", *how, stdin=TEXT)
    assert json.loads(same)["id"] == found["id"]
    _, out, _ = winnow("context", "list", "--json")
    assert found.pop("notes") == []
    del found["store"], found["seconds"]
    assert json.loads(out) == {"store": str(store), "contexts": [found], "damaged": []}
    _, out, _ = winnow("context", "rm", found["id"], "--json")
    assert json.loads(out) == {"store": str(store), "removed": [found["id"]]}
    _, out, _ = winnow("context", "list")
    assert "no contexts in" in out


def test_a_budget_above_the_document_keeps_all_of_it(winnow: Winnow, folder: Path, store: Path) -> None:
    for budget in (1.0, 149):
        _, out, _ = add(winnow, folder, store, "--budget", budget, "--json")
        assert (json.loads(out)["kept"], json.loads(out)["seen"]) == (150, 150)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["add", "/no/such/file"], "document /no/such/file cannot be read"),
        (["add", "REPORT", "--budget", "auto:0.9"], "a context needs a number beforehand"),
        (["add", "REPORT", "--budget", "0"], "budget"),
        (["add", "REPORT", "--policy", "nope"], "nope"),
        (["add", "REPORT", "--study", "much", "--policy", "snapkv"], "study='much'"),
        (["add", "REPORT", "--store", "nope://x"], "store 'nope://x'"),
        (["add", "REPORT", "--policy", "adakv:floor=0:of=snapkv:observe=8"], "needs the same number in all: use winnow:equal"),
        (["add", "REPORT", "--policy", "snapkv", "--study", "lean"], "of a text that is studied, a context needs the same"),
        (["add", "REPORT", "--policy", "snapkv", "--system", "Be kind."], "a system message needs a chat template"),
        (["list", "--store", "nope://x"], "store 'nope://x'"),
        (["rm", "abc"], "id 'abc' is too short: give at least 4 characters"),
        (["rm", "abcd"], "no context of store"),
    ],
)
def test_what_is_refused(winnow: Winnow, folder: Path, store: Path, arguments: list[str], why: str) -> None:
    given = [str(folder / "report.txt") if one == "REPORT" else one for one in arguments]
    more = ["--model", folder, "--block", 16] if given[0] == "add" else []
    place = [] if "--store" in given else ["--store", store]
    code, out, err = winnow("context", *given, *more, *place)
    assert (code, out) == (2, "")
    assert err.startswith("winnow: ")
    assert why in " ".join(err.split())
    assert ContextStore(store).ids() == []


@pytest.mark.parametrize("data", [b"", b" \n ", b"\xff\xfe"])
def test_a_document_is_text(winnow: Winnow, folder: Path, store: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad").write_bytes(data)
    code, _, err = winnow("context", "add", tmp_path / "bad", "--model", folder, "--store", store)
    assert code == 2
    assert "is empty" in err or "not UTF-8" in err


def test_standard_input_that_is_no_text(winnow: Winnow, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    code, _, err = winnow("context", "add", "-", "--model", folder, "--store", store)
    assert (code, "standard input is not UTF-8" in err) == (2, True)


def test_an_ambiguous_id_removes_nothing(winnow: Winnow, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [drawn_context(store, ChatLetters(), name=str(n)) for n in range(2)]
    monkeypatch.setattr(ContextStore, "ids", lambda self: [f"abcd{one.id[4:]}" for one in made])
    monkeypatch.setattr(ContextStore, "remove", lambda self, one: pytest.fail("removed"))
    code, _, err = winnow("context", "rm", "abcd", "--store", store)
    assert (code, "2 contexts of store" in err) == (2, True)
    code, _, err = winnow("context", "rm", f"abcd{made[0].id[4:]}", "ffff", "--store", store)
    assert (code, "no context of store" in err) == (2, True)


def test_damaged_files_are_listed_beside_the_others(winnow: Winnow, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bad, good = (drawn_context(store, ChatLetters(), name=name) for name in ("bad", "a\nlong name " * 8))
    file = store / f"{bad.id}.context"
    file.write_bytes(file.read_bytes()[:40])
    code, out, _ = winnow("context", "list", "--store", store)
    assert code == 0
    assert f"context {bad.id} in store" in " ".join(out.split())
    assert any(row.startswith(good.id) for row in blocks(out)[0].rows)
    _, out, _ = winnow("context", "list", "--store", store, "--json")
    found = json.loads(out)
    assert [row["id"] for row in found["contexts"]] == [good.id]
    assert [row["id"] for row in found["damaged"]] == [bad.id]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "policy"),
    [
        ([], EQUAL_BLIND_POLICY),
        (["--study", "none"], EQUAL_BLIND_POLICY),
        (["--hint", "What was founded?"], EQUAL_HINTED_POLICY),
    ],
)
def test_default_policies_keep_equally_many(winnow: Winnow, tmp_path: Path, more: list[str], policy: str) -> None:
    (tmp_path / "report.txt").write_text("The archive of Oakham was founded in 1712. It has nine rooms and a tower. " * 8)
    code, out, err = winnow(
        "context", "add", tmp_path / "report.txt", "--store", tmp_path, "--block", 16, "--budget", 0.2, *more, "--json"
    )
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    assert (found["policy"], found["kept"] % 16, found["chat"]) == (make_policy(policy).spec, 0, True)
    assert found["kept"] < found["seen"]


def test_a_document_is_studied_by_default_if_there_is_room(winnow: Winnow, folder: Path, tmp_path: Path) -> None:
    limit = tiny_model("llama").config.max_position_embeddings
    (tmp_path / "long.txt").write_text(" ".join(f"w{n % 120 + 1}" for n in range(limit - 8)))
    more = ("--model", folder, "--store", tmp_path, "--block", 16, "--dtype", "float32", "--no-chat")
    code, out, err = winnow("context", "add", tmp_path / "long.txt", *more)
    assert code == 0, err
    assert "no positions left to read the document again" in " ".join(out.split())
    code, out, err = winnow("context", "add", folder / "report.txt", *more)
    assert code == 0, err
    assert "no positions left" not in " ".join(out.split())
    code, _, err = winnow("context", "add", tmp_path / "long.txt", *more, "--study", "lean")
    assert code == 2
    assert "study" in err


def test_saved_caches_of_a_server_are_listed_and_removed_beside_the_others(
    winnow: Winnow, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("WINNOW_STORE", str(store))
    flat = drawn_context(store, ChatLetters())
    document = wk.read(
        tiny_model("llama"), ChatLetters(), "A text of some words. " * 4, "snapkv:observe=4", 24, decode_budget=None
    )
    saved = SavedContexts(store).add(document, name="from a server")
    _, out, _ = winnow("context", "list", "--json")
    assert {row["id"]: row["portable"] for row in json.loads(out)["contexts"]} == {flat.id: True, saved.id: False}
    _, out, _ = winnow("context", "list")
    assert f"vLLM cannot serve {saved.id[:8]}" in out
    assert too_wide(out) == []
    assert winnow("context", "rm", saved.id, flat.id)[0] == 0
    assert not list(store.iterdir())
