"""The README's picture: needle prompts answered against the kept fraction of the cache's bytes, a line for each policy.

Reads the results of ``winnow needle``, one folder or several. Counted are the prompts that the full cache answers and that
were measured for every drawn policy and budget. ``winnow`` is drawn strong; the legend is sorted by prompts answered.

    winnow needle --policies full,winnow,snapkv,... --budgets 0.03,0.06,0.12,0.25 --out DIR
    python benchmarks/kept_fraction.py DIR [DIR ...] [--out docs/kept_fraction.svg] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.needle import answer_text
from winnowkv.evaluate.report.plot import distinct, draw_line, tokens_label
from winnowkv.evaluate.report.store import parse_lines, read_config
from winnowkv.evaluate.settings import Setting

RUN_FIELDS = (
    "model",
    "dtype",
    "chat",
    "task",
    "variant",
    "max_new_tokens",
    "haystack_sha256",
)  # settings that decide prompts and answers
FULL = "full"
STRONG_STYLE = 3  # number of the strong line's style, a red that no other line has
Line = dict[str, Any]
Prompt = tuple[Any, ...]


def read_lines(folders: Sequence[Path]) -> list[Line]:
    """Lines of all folders, each with the settings of its run. Raises InputError if a folder has none."""
    lines = []
    for folder in folders:
        file, config = folder / "results.jsonl", read_config(folder)
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from None
        run = {name: str(config.get(name)) for name in RUN_FIELDS}
        lines += [{**line, "run": run} for line in parse_lines(file, text)]
    return lines


def prompt_of(line: Line) -> Prompt:
    """What identifies a prompt."""
    return (*line["run"].values(), line["length"], line["depth"], line["question"], answer_text(line))


def counted(lines: Sequence[Line], policies: Sequence[str] = ()) -> tuple[list[Line], int]:
    """The lines of prompts that the full cache answers and all settings measured, and how many prompts it answers.

    ``policies``: those to draw beside the full cache; empty: all. Raises InputError if no prompt is left.
    """
    mine = [line for line in lines if not policies or line["policy"] in (FULL, *policies)]
    for policy in policies:
        if policy not in {line["policy"] for line in mine}:
            raise InputError(f"policy {policy!r} has no lines: there are {', '.join(distinct(lines, 'policy'))}")
    found = {(Setting(line["policy"], line["budget"]), prompt_of(line)): line for line in mine}
    answered = {prompt for (setting, prompt), line in found.items() if setting.policy == FULL and line["correct"]}
    if not answered:
        raise InputError(
            "no prompt here is answered by the full cache: run winnow needle with --policies full,... or other prompts"
        )
    asked: dict[Setting, set[Prompt]] = {}
    for setting, prompt in found:
        if setting.policy != FULL:
            asked.setdefault(setting, set()).add(prompt)
    common = answered.intersection(*asked.values())
    if not common:
        fewest = min(asked, key=lambda setting: len(asked[setting] & answered))
        raise InputError(
            f"no prompt was measured for all policies and budgets; {fewest.policy} at {fewest.budget} has the fewest, "
            f"{len(asked[fewest] & answered)} of {len(answered)}: let winnow needle finish, or leave it out with --policies"
        )
    return [line for (_, prompt), line in found.items() if prompt in common], len(answered)


def points(lines: Sequence[Line]) -> list[Line]:
    """For each policy and budget, the share of prompts answered and the mean bytes; policies with most answers first."""
    groups: dict[Setting, list[Line]] = {}
    for line in lines:
        groups.setdefault(Setting(line["policy"], line["budget"]), []).append(line)
    made = [
        {
            "policy": setting.policy, "budget": setting.budget, "evicts": setting.policy != FULL, "prompts": len(group),
            "correct": mean(bool(line["correct"]) for line in group),
            "kept_bytes": mean(line["kept_bytes"] for line in group), "full_bytes": mean(line["full_bytes"] for line in group),
        }
        for setting, group in groups.items()
    ]  # fmt: skip
    share = {policy: mean(p["correct"] for p in made if p["policy"] == policy) for policy in distinct(made, "policy")}
    return sorted(made, key=lambda p: (p["evicts"], -share[p["policy"]], p["policy"]))


def draw(
    made: Sequence[Line],
    title: str,
    shown: str,
    files: Sequence[Path],
    *,
    label: str = "needle prompts answered",
    least: float = 0.0,
) -> None:
    """Draw the picture, 800 pixels wide on white, into each of ``files`` (SVG, PNG).

    ``label`` says what ``correct`` of the points is; the axis begins at ``least``.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(8, 4.6), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    styles = iter(number for number in range(100) if number % 10 != STRONG_STYLE)
    for policy in distinct(made, "policy"):
        style = STRONG_STYLE if policy == shown else 0 if policy == FULL else next(styles)
        draw_line(panel, [point for point in made if point["policy"] == policy], "correct", style)
        line = panel.lines[-1]
        if policy == shown:
            line.set(linewidth=3.2, markersize=8, alpha=1, zorder=5)
        else:
            line.set(linewidth=1, markersize=4)
        if policy == FULL:
            line.set_label("full cache")
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f"{100 * kept:.3g}%"))
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{100 * part:.0f}%"))
    panel.set_ylim(least - 0.04 * (1 - least), 1 + 0.04 * (1 - least))
    panel.grid(alpha=0.3)
    panel.set_xlabel("kept of the KV cache's bytes", fontsize=11)
    panel.set_ylabel(label, fontsize=11)
    panel.set_title(title, fontsize=10)
    for text in figure.legend(loc="outside right upper", fontsize=10, frameon=False).get_texts():
        text.set_fontweight("bold" if text.get_text() == shown else "normal")
    with rc_context({"svg.hashsalt": "winnowkv"}):  # the same points give the same file
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def title_of(lines: Sequence[Line]) -> str:
    """The title: number of prompts, their lengths, and the model."""
    prompts = len({prompt_of(line) for line in lines})
    lengths = " and ".join(tokens_label(length) for length in sorted(distinct(lines, "length")))
    models = ", ".join(sorted({f"{line['run']['model']} in {line['run']['dtype']}" for line in lines}))
    return f"{prompts} needle prompts of {lengths} tokens, {models}"


def main(words: Sequence[str] | None = None) -> None:
    """Read results, draw the picture, print the file names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="result folders of winnow needle")
    parser.add_argument("--policies", default="", help="comma-separated; default: all in the results")
    parser.add_argument("--strong", default="winnow", help="the policy that is drawn strong")
    parser.add_argument("--out", type=Path, default=Path("docs/kept_fraction.svg"), help="a PNG is written beside it")
    parser.add_argument("--json", action="store_true", help="print the points as JSON and nothing else")
    args = parser.parse_args(words)
    if args.out.suffix != ".svg":
        raise InputError(f"--out {args.out} does not end in .svg")
    lines, answered = counted(read_lines(args.folders), [name.strip() for name in args.policies.split(",") if name.strip()])
    made, files = points(lines), (args.out, args.out.with_suffix(".png"))
    draw(made, title_of(lines), args.strong, files)
    if args.json:
        print(json.dumps({"title": title_of(lines), "points": made}, indent=2))
        return
    left_out = answered - len({prompt_of(line) for line in lines})
    print(
        f"{title_of(lines)}: those that the full cache answers; {left_out} more were not measured for all policies and budgets"
    )
    print(f"written to {' and '.join(map(str, files))}")


if __name__ == "__main__":
    with one_sentence("kept_fraction"):
        main()
