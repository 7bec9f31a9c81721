"""Result lines of an evaluation as a run writes them, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSIONS = {"winnowkv": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"}
CONFIG = {"command": "eval", "model": "tiny", "dtype": "float32", "chat": True, "protocol": "official", "max_context": 6000}
MACHINE = {"processor": "AMD EPYC", "threads": 2, "accelerator": None}


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
    """The line of a row that failed before it was read: it says no more than this."""
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
