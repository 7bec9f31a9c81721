"""`--quality`, lookahead, draft and refit on the command line, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.evaluation import write_model, write_rows
from support.terminal import too_wide
from winnowkv.cli import loading
from winnowkv.cli.needle import asked_policies
from winnowkv.cli.options import with_quality

Winnow = Callable[..., tuple[int, str, str]]
PROMPT = " ".join(f"w{(7 * n) % 120 + 1}" for n in range(150))
SPEC = "snapkv:observe=8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are words, and rows for it."""
    made = tmp_path_factory.mktemp("model")
    write_rows(made / "data", 3)
    return write_model(made / "model").parent


def generated(winnow: Winnow, folder: Path, tokens: int, *more: object) -> dict[str, Any]:
    asked = ("generate", PROMPT, "--model", folder / "model", "--no-chat", "--dtype", "float32", "--budget", 0.3)
    code, out, err = winnow(*asked, "--max-new-tokens", tokens, *more, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_generate_takes_a_level_or_its_options(winnow: Winnow, folder: Path) -> None:
    spelled = f"{SPEC}:lookahead=64:draft=64:rounds=2:refit=true"
    best, same, full = (
        generated(winnow, folder, 72, "--policy", policy, *more)
        for policy, more in ((SPEC, ("--quality", "best")), (spelled, ()), ("full", ("--quality", "best")))
    )
    assert best["policy"] == spelled
    for name in ("answer", "kept_entries", "lookahead_tokens", "draft_tokens", "refitted"):
        assert best[name] == same[name]
    assert (best["lookahead_tokens"], best["draft_tokens"], full["draft_tokens"]) == (64, 128, 0)
    assert best["answer"].split()[:64] == full["answer"].split()[:64]
    assert best["kept_bytes"] < full["kept_bytes"] == best["full_bytes"]


def test_generate_says_what_was_heard_and_what_ended_before(
    winnow: Winnow, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked = ("generate", PROMPT, "--model", folder / "model", "--no-chat", "--policy", SPEC, "--quality", "best")
    code, out, _ = winnow(*asked, "--max-new-tokens", 72)
    words = " ".join(out.split())
    assert code == 0
    assert (
        "-- the first 64 tokens are the full cache's, and chose what stays; a draft of 128 tokens was heard, too, in" in words
    )
    code, out, _ = winnow(*asked, "--max-new-tokens", 4, "--explain", 3)
    assert code == 0
    assert "an answer that ends before, within lookahead=64, evicts nothing" in " ".join(out.split())
    assert too_wide("\n".join(out.splitlines()[1:])) == []


@pytest.mark.parametrize("command", ["generate", "needle", "audit", "eval"])
def test_an_unknown_level_and_a_contradiction_are_refused_before_a_model_loads(
    winnow: Winnow, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "load_model", None)
    given = ("--prompts", __file__) if command == "audit" else ("hello",) if command == "generate" else ()
    code, _, err = winnow(command, *given, "--quality", "lavish")
    assert code == 2
    assert "quality 'lavish' is unknown: it is one of lean, balanced, best" in " ".join(err.split())
    option = "--policy" if command == "generate" else "--policies"
    code, _, err = winnow(command, *given, option, "winnow:lookahead=8", "--quality", "best")
    assert code == 2
    assert "lookahead=8 contradicts quality=best" in " ".join(err.split())


def test_an_audit_shows_the_tokens_after_the_lookahead(
    winnow: Winnow, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "mine.txt").write_text(PROMPT)
    asked = ("audit", "--prompts", tmp_path / "mine.txt", "--model", folder / "model", "--policies", f"full,{SPEC}",
             "--no-chat", "--budgets", 0.3, "--max-new-tokens", 76, "--quality", "balanced",
             "--out", tmp_path / "out")  # fmt: skip
    code, out, err = winnow(*asked)
    assert code == 0, err
    assert too_wide(out) == []
    assert "after 64: of the tokens after an answer's first 64" in " ".join(out.split())
    code, out, _ = winnow(*asked, "--after", 70, "--json")  # of the lines that are there
    summary = json.loads(out)
    assert summary["after"] == 70
    assert [group["policy"] for group in summary["groups"]] == ["full", f"{SPEC}:lookahead=64"]
    assert [group["prompts_after"] for group in summary["groups"]] == [1, 1]
    assert summary["groups"][0]["kl_after"]["mean"] == pytest.approx(0, abs=1e-6)
    assert summary["groups"][1]["kl_after"]["mean"] > 1e-4


def test_eval_answers_with_a_level_and_refuses_it_where_the_question_comes_later(
    winnow: Winnow, folder: Path, tmp_path: Path
) -> None:
    asked = ("eval", "--tasks", "longeval", "--data", folder / "data", "--model", folder / "model", "--budgets", 20,
             "--no-chat", "--policies", f"full,{SPEC}:lookahead=2:draft=3", "--batch", 3)  # fmt: skip
    code, _, err = winnow(*asked, "--out", tmp_path / "out")
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    looking = [line for line in lines if line["policy"] != "full"]
    assert len(looking) == 3
    for line in looking:
        assert line["failed"] is None
        assert line["whole"] or (line["lookahead_tokens"], line["draft_tokens"]) == (2, 3)
    code, _, err = winnow(*asked, "--protocol", "context-only", "--out", tmp_path / "later")
    assert code == 2
    assert "hears the answer before it evicts" in " ".join(err.split())


def test_lists_of_policies_get_the_options_one_by_one() -> None:
    specs = asked_policies(f"full,winnow,adakv,adakv:of={SPEC},int8", factorial=False)
    assert with_quality(specs, None) == specs
    balanced = ["full", "winnow:lookahead=64", "adakv:of=snapkv:lookahead=64", f"adakv:of={SPEC}:lookahead=64", "int8"]
    assert with_quality(specs, "balanced") == balanced


def test_a_plan_takes_a_level_for_policies_that_are_named(winnow: Winnow) -> None:
    asked = ("plan", "--context", "4k", "--memory", "4GiB", "--budgets", "0.12", "--json")
    code, out, err = winnow(*asked, "--policies", "snapkv", "--quality", "best")
    assert code == 0, err
    assert any("lookahead=64" in fit["policy"] for fit in json.loads(out)["settings"])
    code, _, err = winnow(*asked, "--quality", "best")
    assert code == 2
    assert "--quality best needs the policies that it is for" in " ".join(err.split())
