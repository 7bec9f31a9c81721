"""The README's picture: how much of an answer stays the full cache's, against the kept fraction of the cache's bytes.

Reads the results of ``winnow_parts.py texts``. Counted are the rows that were measured for every drawn variant and budget,
and of their answers the tokens after the N-th.

    python benchmarks/winnow_parts.py texts --budgets 0.03,0.06,0.12,0.25 --variants winnow,balanced,best --out DIR ...
    python benchmarks/levels_picture.py DIR [--after 64] [--out docs/levels.svg] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from kept_fraction import draw

from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError
from winnowkv.evaluate.audit.audit import after as after_tokens
from winnowkv.evaluate.report.store import parse_lines, read_config
from winnowkv.evaluate.settings import Setting

NAMES = {"winnow": "winnow, lean", "balanced": "winnow, balanced", "best": "winnow, best"}
STRONG = "winnow, balanced"
Line = dict[str, Any]


def points(lines: Sequence[Line], after: int, variants: Sequence[str] = ()) -> tuple[list[Line], int]:
    """Of each variant and budget the mean share of equal tokens after the ``after``-th, and the rows that count.

    Raises InputError if no row was measured for all of them, with an answer that goes on so long.
    """
    found: dict[Setting, dict[tuple[str, str], Line]] = {}
    for line in lines:
        usable = not line.get("failed") and not line.get("skipped")
        if usable and after_tokens(line, after) is not None and (not variants or line["policy"] in variants):
            found.setdefault(Setting(line["policy"], line["budget"]), {})[line["task"], line["row"]] = line
    common = set.intersection(*map(set, found.values())) if found else set()
    if not common:
        raise InputError(f"no row was measured for all variants and budgets with more than {after} tokens: lower --after")
    made = []
    for setting, rows in found.items():
        mine = [rows[row] for row in sorted(common)]
        same = [found for line in mine if (found := after_tokens(line, after)) is not None]
        made.append(
            {
                "policy": NAMES.get(setting.policy, setting.policy), "budget": setting.budget, "evicts": True,
                "correct": mean(agreement for agreement, _ in same),
                **{name: mean(line[name] for line in mine) for name in ("kept_bytes", "full_bytes")},
            }
        )  # fmt: skip
    share = {point["policy"]: 0.0 for point in made}
    for point in made:
        share[point["policy"]] += point["correct"]
    return sorted(made, key=lambda point: (-share[point["policy"]], point["policy"], point["kept_bytes"])), len(common)


def main(words: Sequence[str] | None = None) -> None:
    """Read results, draw the picture, print the file names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a result folder of winnow_parts.py texts")
    parser.add_argument("--after", type=int, default=64, help="count the tokens after so many of an answer")
    parser.add_argument("--variants", default="", help="comma-separated; default: all in the results")
    parser.add_argument("--out", type=Path, default=Path("docs/levels.svg"), help="a PNG is written beside it")
    parser.add_argument("--json", action="store_true", help="print the points as JSON and nothing else")
    args = parser.parse_args(words)
    if args.out.suffix != ".svg" or args.after < 1:
        raise InputError(f"--out {args.out} must end in .svg, and --after {args.after} be at least 1")
    file = args.folder / "results.jsonl"
    if not file.is_file():
        raise InputError(f"{file} is not there: run winnow_parts.py texts --out {args.folder}")
    wanted = [name.strip() for name in args.variants.split(",") if name.strip()]
    made, rows = points(parse_lines(file, file.read_text(encoding="utf-8")), args.after, wanted)
    config = read_config(args.folder)
    title = f"{rows} summaries, after {args.after} tokens of an answer, {config.get('model')} in {config.get('dtype')}"
    files = (args.out, args.out.with_suffix(".png"))
    label = "same token as the full cache"
    draw(made, title, STRONG, files, label=label, least=0.6)
    if args.json:
        print(json.dumps({"title": title, "points": made}, indent=2))
        return
    print(f"{title}; written to {' and '.join(map(str, files))}")


if __name__ == "__main__":
    with one_sentence("levels_picture"):
        main()
