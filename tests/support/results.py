"""Result lines of an evaluation as a run writes them, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSIONS = {"winnowkv": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"}
CONFIG = {"command": "eval", "model": "tiny", "dtype": "float32", "chat": True, "protocol": "official", "max_context": 6000}
MACHINE = {"processor": "AMD EPYC", "threads": 2, "accelerator": None}
POLICIES = {"full": 0.0, "streaming": 0.3, "snapkv:observe=16": 0.1, "int8": 0.01}
# Scores of the rows of two tasks.
FULL_SCORES = {"a": [0.5, 0.7, 0.9, 0.1], "b": [1.0, 0.0]}
SNAPKV_SCORES = {"a": [0.5, 0.1, 0.8, 0.2], "b": [0.0, 0.0]}


def line(policy: str = "full", score: float | None = 0.5, **different: Any) -> dict[str, Any]:
    """One line; the prompt has 1000 tokens of 100 bytes, of which all or the fraction asked is kept."""
    budget = different.get("budget", 0.12)
    kept = 1000 if policy in ("full", "int8") else budget if isinstance(budget, int) else 1000 * budget
    return {
        "task": "qa", "row": "r0", "protocol": "official", "policy": policy, "budget": budget,
        "prediction": f"what {policy} said", "answers": ["right"], "score": score, "metric": "qa_f1_score",
        "failed": None, "prompt_tail": "Question: who?\nAnswer:", "prompt_tokens": 1000, "truncated_tokens": 0,
        "kept_entries": kept, "kept_bytes": int(100 * kept), "full_bytes": 100_000, "held_bytes": int(110 * kept),
        "peak_bytes": 100_000, "prefill_s": 2.0, "compress_s": 0.1, "decode_s": 0.5, "decode_tokens": 20,
        "decode_batch": 3, "peak_rss": 10**9, "versions": VERSIONS, "git": "0123456789ab", "seed": 0, **different,
    }  # fmt: skip


def broken(reason: str, **different: Any) -> dict[str, Any]:
    """The line of a row that failed before it was read: it has only these fields."""
    frame = {"task": "qa", "row": "r0", "protocol": "official", "policy": "snapkv", "budget": 0.12}
    return {**frame, "score": None, "failed": reason, "versions": VERSIONS, "git": None, "seed": 0, **different}


def write_run(folder: Path, lines: list[dict[str, Any]], machine: dict[str, Any] | None = MACHINE, **different: Any) -> Path:
    """A result folder with these lines; ``different`` replaces fields of the config."""
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({**CONFIG, **different}))  # JSON is YAML
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if machine is not None:
        (folder / "summary.json").write_text(json.dumps({"machine": machine}))
    return folder


def mass_line(policy: str, at: int, mass: float, agreement: float) -> dict[str, Any]:
    """A line of an audit: the share of the scores' mass that was kept for a prompt, and the agreement with the full cache."""
    return {
        "policy": policy, "budget": 0.1, "prompt": f"p{at}", "kept_mass": mass, "agreement": agreement, "failed": None,
        "compared_tokens": 5,
    }  # fmt: skip


def evaluation() -> list[dict[str, Any]]:
    """Two tasks in one protocol and one in the other; scores fall with the policy's cost and rise with the budget."""
    lines = []
    for protocol, tasks in (("official", ("qasper", "trec")), ("context-only", ("qasper",))):
        for task in tasks:
            for row in range(3):
                for policy, cost in POLICIES.items():
                    for budget in (0.12, 256) if cost >= 0.1 else (0.12,):
                        score = 0.6 + 0.1 * row - cost * (1.0 if budget == 0.12 else 0.5)
                        lines.append(line(policy, score, task=task, row=f"{task}-{row}", protocol=protocol, budget=budget))
    return lines


def lines_of(policy: str, scores: dict[str, list[float]], **different: Any) -> list[dict[str, Any]]:
    """A line for each score of each task."""
    return [line(policy, score, task=task, row=f"{task}{r}", **different)
            for task, values in scores.items() for r, score in enumerate(values)]  # fmt: skip


def group(summary: dict[str, Any], task: str, policy: str, budget: float = 0.12, section: int = 0) -> dict[str, Any]:
    """The one group of a summary's section with this task, policy and budget."""
    found = [
        g for g in summary["sections"][section]["groups"] if (g["task"], g["policy"], g["budget"]) == (task, policy, budget)
    ]
    assert len(found) == 1
    return found[0]
