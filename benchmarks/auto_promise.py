"""What ``budget="auto"`` promised and what it gave: the mean over prompts of each target, with its 95% interval.

winnow audit --prompts MINE --policies winnow --budgets 0.05,0.12,0.25,0.5,0.75,0.9 --curves p.json
winnow audit --prompts OTHERS --policies winnow --budgets auto:0.8:p.json,auto:0.9:p.json,auto:0.95:p.json --out DIR
python benchmarks/auto_promise.py DIR [--json]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from winnowkv.budget import Budget
from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError
from winnowkv.evaluate.report.stats import mean_interval
from winnowkv.evaluate.report.store import parse_lines


def promises(folder: Path) -> list[dict[str, Any]]:
    """For each policy and target: prompts, realised agreement with a 95% interval, mean kept fraction of the bytes."""
    file = folder / "results.jsonl"
    if not file.is_file():
        raise InputError(f"{folder} holds no results.jsonl: give a folder that winnow audit wrote")
    found = defaultdict(list)
    for line in parse_lines(file, file.read_text(encoding="utf-8")):
        target = Budget.of(line["budget"]).target
        if target is not None and line["failed"] is None and line["compared_tokens"]:
            found[line["policy"], target].append((line["agreement"], line["kept_bytes"] / line["full_bytes"]))
    if not found:
        raise InputError(f"{folder} holds no line of a budget auto: ask for --budgets auto:0.9:p.json")
    rows = []
    for (policy, target), values in sorted(found.items()):
        agreements = [agreement for agreement, _ in values]
        average, low, high = mean_interval(agreements)
        rows.append(
            {
                "policy": policy, "target": target, "prompts": len(values), "agreement": average, "low": low, "high": high,
                "kept": mean(kept for _, kept in values), "agreements": agreements,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = promises(args.folder)
    if args.json:
        print(json.dumps({"rows": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['policy']} auto:{row['target']:g}: {100 * row['agreement']:.1f}% "
            f"({100 * row['low']:.1f} to {100 * row['high']:.1f}) on {row['prompts']} prompts, {100 * row['kept']:.0f}% kept"
        )


if __name__ == "__main__":
    with one_sentence("auto_promise"):
        main()
