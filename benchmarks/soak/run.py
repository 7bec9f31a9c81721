"""Everything that runs for long, one after the other, and docs/reliability.md from what it found.

    python benchmarks/soak/run.py [--share 1.0] [--seed 0] [--render]

``--share 0.1`` runs a tenth of it. Each part writes its counts to ``docs/data/soak-PART.json`` once it has passed; ``--render``
only writes the page from those. Exits with 1 if a part fails, and goes on with the next one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "data"
PAGE = ROOT / "docs" / "reliability.md"
HERE = "benchmarks/soak"
EXAMPLES, REQUESTS, FILES, MINUTES = 2000, 1000, 2000, 12.0
SERVE_MINUTES, CLIENTS, FAULTS = 10.0, 64, 1000


@dataclass(frozen=True)
class Part:
    """One long run: its name, what it proves, and its command for a share of the whole."""

    name: str
    proves: str
    command: Sequence[str]
    variables: dict[str, str]


def parts(share: float, seed: int, counts: Path) -> list[Part]:
    """The long runs; each writes its counts to ``counts/NAME.json`` if it can."""

    def script(name: str, proves: str, *options: str) -> Part:
        command = [f"{HERE}/{name}.py", *options, "--seed", str(seed), "--json", str(counts / f"{name}.json")]
        return Part(name, proves, command, {})

    laws = ["-m", "pytest", "tests/laws/test_any_shape.py", "-p", "no:randomly", f"--hypothesis-seed={seed}", "--timeout=7200"]
    number = str(max(int(EXAMPLES * share), 1))
    many, faults = ("--minutes", f"{SERVE_MINUTES * share:g}"), ("--count", str(max(int(FAULTS * share), 20)))
    return [
        Part("laws", "laws over drawn lengths, budgets, dtypes, batches and chunks", laws, {"WINNOW_EXAMPLES": number}),
        script("engine", "requests together give what each gives alone", "--count", str(max(int(REQUESTS * share), 20))),
        script("parsers", "damaged files are refused in one sentence", "--count", str(max(int(FILES * share), 20))),
        script("threads", "threads on one model give what each gives alone", "--minutes", f"{MINUTES * share:g}"),
        script("serve", "streams of many clients give what each gives alone", *many, "--clients", str(CLIENTS)),
        script("serve_faults", "a server that is killed, left, slowed or sent nonsense leaks nothing", *faults),
    ]


def run(part: Part, counts: Path) -> dict[str, Any] | None:
    """Run one part; what is to be recorded, None if it failed."""
    print(f"== {part.name}: {part.proves}", flush=True)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *part.command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **part.variables}, check=False
    )
    if done.returncode:
        print(f"== {part.name} failed (exit code {done.returncode})", flush=True)
        return None
    found = counts / f"{part.name}.json"
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "command": " ".join(["python", *[word for word in part.command if word not in ("--json", str(found))]]),
        "variables": part.variables,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "found": json.loads(found.read_text(encoding="utf-8")) if found.exists() else {},
    }


def machine() -> str:
    """Processor and versions."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}"


def rows_of(name: str, about: dict[str, Any]) -> list[tuple[str, str]]:
    """What a part counted, as rows of its table."""
    found = about["found"]
    if name == "laws":
        return [("examples of each of four laws", about["variables"]["WINNOW_EXAMPLES"])]
    if name == "parsers":
        kinds = {
            kind: {what: count for what, count in each.items() if isinstance(count, int)}
            for kind, each in found["kinds"].items()
        }
        return [(kind, ", ".join(f"{count} {what}" for what, count in each.items())) for kind, each in kinds.items()]
    if name == "engine":
        whole = {"requests": found["requests"], "answers": found["choices"], "engines": found["rounds"]}
        counted = {**whole, **found["kinds"], "answers that differ from those alone": len(found["mismatches"])}
    elif name == "serve":
        counted = {**found["counts"], **memory_of(found["numbers"]), "faults": len(found["faults"])}
    elif name == "serve_faults":
        counted = {**found["counts"], "faults": len(found["faults"])}
    else:
        counted = {**found["counts"], "threads": found["threads"], "faults": len(found["faults"])}
    return [(key, f"{value:,}") for key, value in counted.items()]


def memory_of(numbers: dict[str, Any]) -> dict[str, int]:
    """What a server held at most, and what bounds it."""
    names = {
        "kv_limit": "MiB of keys and values allowed", "kv_most": "MiB of keys and values held at most",
        "rss_warm": "MiB resident at most while the longest prompt was read alone",
        "rss_bound": "MiB resident allowed under load", "rss_most": "MiB resident at most under load",
    }  # fmt: skip
    sizes = {text: round(numbers[name] / 2**20) for name, text in names.items()}
    return {**sizes, "requests active at most": round(numbers["active_most"]), "seconds of load": round(numbers["seconds"])}


def render() -> str:
    """docs/reliability.md from the recorded counts."""
    out = [
        "# Reliability", "",
        "What runs for long, beside the test suite, and what it found. Written by `make soak` from `docs/data/soak-*.json`;",
        "do not edit. A part that fails prints the command that repeats the failing case.", "",
    ]  # fmt: skip
    for part in parts(1.0, 0, Path("docs/data")):
        path = DATA / f"soak-{part.name}.json"
        out += [f"## {part.name}: {part.proves}", ""]
        if not path.exists():
            out += ["Not run yet.", ""]
            continue
        about = json.loads(path.read_text(encoding="utf-8"))
        variables = "".join(f"{name}={value} " for name, value in about["variables"].items())
        out += [f"`{variables}{about['command']}`", "", f"{about['date']}, {about['machine']}, {about['seconds']:.0f} s.", ""]
        if rows := rows_of(part.name, about):
            out += ["| what | count |", "|---|---|", *[f"| {what} | {count} |" for what, count in rows], ""]
    return "\n".join(out).rstrip() + "\n"


def main() -> int:
    """Read the command line, run the parts, write the page."""
    asking = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asking.add_argument("--share", type=float, default=1.0, help="of the whole, above 0 (default: 1.0)")
    asking.add_argument("--seed", type=int, default=0)
    asking.add_argument("--part", action="append", default=[], help="only this part; may be given more than once")
    asking.add_argument("--render", action="store_true", help="only write the page")
    asked = asking.parse_args()
    failed = []
    DATA.mkdir(parents=True, exist_ok=True)
    if not asked.render:
        counts = ROOT / "winnow-out" / "soak"
        counts.mkdir(parents=True, exist_ok=True)
        for part in parts(asked.share, asked.seed, counts):
            if asked.part and part.name not in asked.part:
                continue
            about = run(part, counts)
            if about is None:
                failed.append(part.name)
                continue
            (DATA / f"soak-{part.name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(), encoding="utf-8")
    print(f"failed: {', '.join(failed)}" if failed else f"passed; {PAGE.relative_to(ROOT)} is written")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
