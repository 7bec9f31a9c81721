"""docs/support.md: every family of models tried in every way, with this release of transformers.

    PYTHONPATH=tests python -m support.matrix run      try them, write docs/data/support-<transformers>.json
    PYTHONPATH=tests python -m support.matrix render   write docs/support.md from all of these files

``make support`` runs both, for the newest and the oldest supported release. A family is tried in a process of its own, which is
stopped after ten minutes, so that one that hangs or dies is shown as such.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers

import winnowkv as wk
from support.cells import CELLS, WORKS, outcome
from support.families import FAMILIES
from support.paths import ROOT

DATA, PAGE = ROOT / "docs" / "data", ROOT / "docs" / "support.md"
SECONDS = 600  # for all checks of one family; compiling takes most of them
ABSENT = "not in this release"
SIGNS = {"refused": "⊘", "transformers": "≈", "FAILS": "✗"}  # how an outcome begins, and what stands for it
# Names that differ from model to model, so that one note serves all.
NAMES = re.compile(r"\b[A-Z]\w*?(?:ForCausalLM|ForConditionalGeneration|LMHeadModel|Attention)\b")
MEANING = {cell: (check.__doc__ or "").split("\n")[0] for cell, check in CELLS.items()}
HEADER = """# Which models are served

Written by `make support`, which tries every family below in every way; do not edit. Each model is a tiny random one of that
family's own configuration class, in float32 on the CPU, so the table speaks of architectures, not of checkpoints.

| sign | meaning |
|---|---|
| ✓ | works: the law of that column holds |
| ⊘n | refused by name, with the sentence of note n |
| ≈n | as transformers: its own cache does not give the logits of one pass either, and ours gives what that gives (note n) |
| ✗n | fails, as note n says |
| · | not in this release of transformers |
"""


def try_family(name: str, cells: Sequence[str], pipe: Connection) -> None:
    """These checks of one family, in order; sends ``(cell, outcome)`` after each."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for cell in cells:
        pipe.send((cell, outcome(FAMILIES[name], cell)))


def run(
    names: Sequence[str],
    cells: Sequence[str] = tuple(CELLS),
    *,
    workers: int = 1,
    seconds: float = SECONDS,
    child: Callable[[str, Sequence[str], Connection], None] = try_family,
) -> dict[str, dict[str, str]]:
    """The outcomes of these families, ``workers`` at a time: ``{family: {cell: outcome}}``, nothing for one that is absent."""
    results: dict[str, dict[str, str]] = {name: {} for name in names}
    waiting, running = [name for name in names if FAMILIES[name].exists], dict[Connection, Any]()
    context = multiprocessing.get_context("fork")  # transformers is imported once, here
    while waiting or running:
        while waiting and len(running) < workers:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(name := waiting.pop(0), cells, send), daemon=True)
            process.start()
            send.close()
            running[receive] = name, process, time.monotonic() + seconds
        left = min(end for _, _, end in running.values()) - time.monotonic()
        ready = wait(list(running), timeout=max(left, 0))
        for pipe in list(running):
            name, process, end = running[pipe]
            late = time.monotonic() > end
            try:
                if pipe in ready and not late:
                    cell, result = pipe.recv()
                    results[name][cell] = result
                    continue
            except EOFError:
                late = False
            else:
                if not late:
                    continue
                process.kill()
            process.join()
            for cell in cells:
                said = f"no answer within {seconds:.0f} seconds" if late else f"the process ended with {process.exitcode}"
                results[name].setdefault(cell, f"FAILS: {said}")
            print(f"{transformers.__version__:8} {name:24}", " ".join(map(_sign, results[name].values())), flush=True)
            del running[pipe]
    return results


def _sign(result: str) -> str:
    return "✓" if result == WORKS else SIGNS[result.split(":")[0]]


def record(results: dict[str, dict[str, str]]) -> Path:
    """Write outcomes, and what they were found with, to the file of this release; what was not tried stays."""
    path = DATA / f"support-{transformers.__version__}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["families"] if path.exists() else {}
    about = {
        "transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "winnowkv": wk.__version__, "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "families": {name: in_order(before.get(name, {}) | results.get(name, {})) for name in FAMILIES},
    }  # fmt: skip
    DATA.mkdir(exist_ok=True)
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def in_order(cells: dict[str, str]) -> dict[str, str]:
    """The same, in the order of the columns."""
    return {cell: cells[cell] for cell in CELLS if cell in cells}


def recorded() -> list[dict[str, Any]]:
    """What the files of all releases say, newest release first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in DATA.glob("support-*.json")]
    return sorted(found, key=lambda one: [int(part) for part in re.findall(r"\d+", one["transformers"])[:3]], reverse=True)


def render(releases: Sequence[dict[str, Any]]) -> str:
    """The page: one table for each release, then the notes of all."""
    notes: dict[str, int] = {}
    parts = [HEADER, "| column | what is tried |\n|---|---|\n" + "".join(f"| {cell} | {MEANING[cell]} |\n" for cell in CELLS)]
    for release in releases:
        about = "transformers {transformers}, torch {torch}, Python {python}, winnowkv {winnowkv}, {date}".format(**release)
        parts.append(f"## transformers {release['transformers']}\n\n{counted(release)} ({about})\n\n{table(release, notes)}")
    parts.append("## Notes\n\n" + "".join(f"{number}. {note}\n" for note, number in notes.items()))
    return "\n".join(parts)


def table(release: dict[str, Any], notes: dict[str, int]) -> str:
    """One row for each family; ``notes`` numbers the sentences and grows."""
    lines = ["| family | " + " | ".join(CELLS) + " |", "|---|" + ":-:|" * len(CELLS)]
    for name, cells in release["families"].items():
        shown = (_shown(cells.get(cell, ABSENT), notes) for cell in CELLS)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _shown(result: str, notes: dict[str, int]) -> str:
    if result in (WORKS, ABSENT):
        return "✓" if result == WORKS else "·"
    text = re.sub(r"\blayer \d+", "layer n", NAMES.sub("*model*", result.split(": ", 1)[1]))
    return f"{_sign(result)}{notes.setdefault(text, len(notes) + 1)}"


def counted(release: dict[str, Any]) -> str:
    """How many cells of how many families have each outcome."""
    every = [result for cells in release["families"].values() for result in cells.values()]
    kinds = [result.split(":")[0] for result in every]
    said = (f"{kinds.count(kind)} {words}" for kind, words in
            ((WORKS, "work"), ("refused", "are refused by name"), ("transformers", "are as transformers"), ("FAILS", "fail"))
            if kinds.count(kind))  # fmt: skip
    present = sum(bool(cells) for cells in release["families"].values())
    return f"{present} of {len(release['families'])} families are in this release. Of {len(every)} cells " + ", ".join(said)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "render"])
    parser.add_argument("families", nargs="*", help="of these only, by the names of the table; all if none is given")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="of these columns only")
    given = parser.parse_args(None if arguments is None else list(arguments))
    if unknown := set(given.families) - set(FAMILIES):
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    if given.what == "run":
        print(record(run(given.families or list(FAMILIES), given.cells, workers=given.workers)))
    else:
        PAGE.write_text(render(recorded()), encoding="utf-8")
        print(PAGE)


if __name__ == "__main__":
    main()
