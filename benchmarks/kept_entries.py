"""Digests of the entries that each policy keeps of ten prompts, compared with the recorded digests.

    python benchmarks/kept_entries.py             compare with benchmarks/kept_entries.json; exit 1 if a digest differs
    python benchmarks/kept_entries.py --record    write that file anew

Only public names are used, so that the same script runs on older and newer trees. The model is the embedded one in float32.
On another processor rounding may differ, and so may the choice between tokens of nearly equal scores: record on the same
machine, on the tree before the change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

import torch

import winnowkv as wk
from winnowkv.policies import names

RECORDED = Path(__file__).with_suffix(".json")
BUDGETS = (0.12, 64, 0.3)
SKIP = ("int4", "int8")  # they keep everything


def prompts() -> list[tuple[str, str]]:
    """Ten prompts of 300 to 900 tokens, each with its task: an invented archive to answer a question about or to summarize."""
    made = []
    for n in range(10):
        lines = [
            f"Box {n}{k}: the {('red', 'blue', 'green')[k % 3]} key of room {17 * k + n} was given to clerk {k * k % 97}. "
            f"{'The rain had stopped by noon.' if k % 4 == 0 else 'Nothing else was written down that day.'}"
            for k in range(8 + 2 * n)
        ]
        ask = f"Who was given the key of room {17 * n + n}?" if n % 3 else "Write a summary of the archive in two sentences."
        made.append(("\n".join([*lines, "", ask]), "localization" if n % 3 else "aggregation"))
    return made


def digests(policies: list[str]) -> dict[str, str]:
    """For each policy, a digest of the positions that all layers and heads keep of all prompts."""
    model, tokenizer = wk.load("embedded", dtype=torch.float32, device="cpu")
    found = {}
    for name in policies:
        digest = hashlib.sha256()
        for at, (text, task) in enumerate(prompts()):
            messages = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
            budget = BUDGETS[at % len(BUDGETS)]
            with torch.no_grad(), wk.compress(model, name, budget, task=task, tokenizer=tokenizer):
                cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            for layer in cache.compact_layers:
                (kept,) = layer.positions
                digest.update(json.dumps(None if kept is None else kept.tolist()).encode())
        found[name] = digest.hexdigest()[:16]
        print(f"{name:12} {found[name]}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name}")
    parser.add_argument("--policies", default="", help="comma-separated; default: those recorded, all when recording")
    asked = parser.parse_args()
    before = {} if asked.record else json.loads(RECORDED.read_text())["digests"]
    chosen = asked.policies.split(",") if asked.policies else list(before) or [n for n in names() if n not in SKIP]
    now = digests(chosen)
    if asked.record:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "digests": now}
        RECORDED.write_text(json.dumps(about, indent=1) + "\n")
        return 0
    print(f"{'policy':12} {'recorded':16} {'now':16}")
    for name in chosen:
        print(f"{name:12} {before.get(name, '-'):16} {now[name]:16} {'same' if before.get(name) == now[name] else 'DIFFERENT'}")
    return int(any(before.get(name) != now[name] for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
