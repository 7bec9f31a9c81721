"""What to run whenever a GPU is at hand: at most eight minutes on an H200-class GPU, one JSON file and one Markdown table.

``laws``: tests/laws on the device. ``prefill``: reading and compressing a prompt beside plain transformers. ``decode``: steps
at batch 1, 8 and 32, eager and compiled. ``serve``: requests and tokens a second in a given KV memory, beside transformers'
static cache. ``options``: what lookahead, draft and refit cost, or any policies named on the command line.

The model has the shape of Llama-3.1-8B and random weights, for only shapes matter to speed; neither hub nor wheel is needed.
Each step is a process of its own with a time limit; what a step leaves over goes to the next ones. A step or a cell that
fails is reported by name and the others go on. ``gpu-check.json`` is written after each step, also on Ctrl-C.

    python benchmarks/gpu_check.py [winnow winnow:lookahead=32 ...] [--steps laws,prefill] [--out DIR]
    python benchmarks/gpu_check.py --small      # every step with a tiny model, on the CPU too
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check_table import Cell, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # a machine with a GPU may have nothing installed

OPTIONS = (
    "winnow", "winnow:lookahead=32", "winnow:lookahead=32:draft=64", "winnow:lookahead=32:draft=64:refit=true",
    "snapkv", "snapkv:refit=true",
)  # fmt: skip
POLICIES, BUDGET = ("winnow", "snapkv"), 0.12
# The laws that a GPU can break, those that matter most first: what the limit cuts off is the end.
LAWS = (
    "scoring/test_kernels.py", "laws/test_equality.py", "laws/test_sums.py", "laws/test_batch.py", "laws/test_isolation.py",
    "laws/test_memory.py", "laws/test_quantization.py", "laws/test_snapshot.py", "laws/test_sliding_windows.py",
    "laws/test_devices.py", "laws/test_offload.py",
)  # fmt: skip
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TINY = {
    **LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8192, "max_position_embeddings": 4096,
}  # fmt: skip
AFTER_CHOOSING = 16  # decode steps that are timed after a choice


class Sizes(NamedTuple):
    """What is measured. ``seconds`` of a step add up: one that ends early leaves its rest to the next.

    ``batches`` are those of eager steps, ``compiled`` those of compiled ones.
    """

    config: Cell
    seconds: dict[str, int]
    laws: Sequence[str]
    context: int
    batches: Sequence[int]
    compiled: Sequence[int]
    rounds: int
    steps: int
    serve_context: int
    kv_memory: int
    new_tokens: int


WHOLE = Sizes(
    LLAMA_8B, {"laws": 90, "prefill": 50, "options": 70, "serve": 70, "decode": 180}, LAWS, context=8192,
    batches=(1, 8, 32), compiled=(1, 8, 32), rounds=5, steps=20, serve_context=4096, kv_memory=4 << 30, new_tokens=128,
)  # fmt: skip
SMALL = Sizes(
    TINY, {"laws": 40, "prefill": 40, "options": 40, "serve": 40, "decode": 80}, ("laws/test_sums.py",), context=300,
    batches=(1, 2), compiled=(1,), rounds=1, steps=2, serve_context=200, kv_memory=128 << 10, new_tokens=40,
)  # fmt: skip


def cells(step: str, sizes: Sizes, specs: Sequence[str]) -> list[Cell]:
    """What a step measures, one line of its results each; what takes longest comes last."""
    if step == "laws":
        return [{"step": step, "cell": "tests"}]
    common: Cell = {"step": step, "policy": POLICIES[0], "budget": BUDGET, "context": sizes.context, "compiled": False}
    if step == "prefill":
        return [{**common, "policy": policy, "cell": policy} for policy in POLICIES]
    if step == "options":
        return [{**common, "policy": spec, "cell": spec} for spec in specs]
    if step == "serve":
        common |= {"context": sizes.serve_context, "kv_memory": sizes.kv_memory}
        return [{**common, "cell": "static cache"}, {**common, "cell": "engine"}]
    return [
        {**common, "batch": batch, "compiled": compiled, "cell": f"batch {batch}, {'compiled' if compiled else 'eager'}"}
        for compiled, batches in ((False, sizes.batches), (True, sizes.compiled))
        for batch in batches
    ]


def write_model(folder: Path, config: Cell) -> Path:
    """A model's config and a tokenizer of the haystack's words, as a folder of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from winnowkv.evaluate.needle.prompts import read_haystack

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=config["vocab_size"], special_tokens=["[UNK]"], show_progress=False)
    words.train_from_iterator([read_haystack(None)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(step: str, sizes: Sizes, specs: Sequence[str], out: Path) -> None:
    """Measure a step's cells in this process; each is a line of its file as soon as it is measured, failed ones too."""
    from winnowkv.evaluate.bench.cells import BenchSetup, decode, prefill, serve
    from winnowkv.evaluate.bench.clock import Clock
    from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack
    from winnowkv.models.load import load_random

    model, tokenizer = load_random(str(write_model(out / "model", sizes.config)))
    text = " ".join([read_haystack(None)] * (1 + 2 * sizes.context // 8192))
    room = max(sizes.new_tokens, 3 * sizes.steps)
    builder = PromptBuilder(tokenizer, text, chat=False)
    setup = BenchSetup(model, tokenizer, builder, text, room, Clock(model.device))
    for context in {sizes.context, sizes.serve_context}:
        setup.prompt(context).quantized = without_quanto
    works: dict[str, Callable[[Cell], Cell]] = {
        "prefill": lambda cell: prefill(setup, cell, sizes.rounds),
        "decode": lambda cell: decode(setup, cell, sizes.steps),
        "options": lambda cell: option_cost(setup, cell, sizes.rounds),
        "serve": lambda cell: (static_pace if cell["cell"] == "static cache" else serve)(
            setup, cell, sizes.steps, sizes.new_tokens
        ),
    }
    for cell in cells(step, sizes, specs):
        begin = time.perf_counter()
        try:
            found = works[step](cell)
        except Exception as error:  # out of memory, a compiler's: the next cells may do
            found = {"failed": first_line(error)}
        add(out, {**cell, **found, "cell_s": round(time.perf_counter() - begin, 1)})


def without_quanto() -> None:
    """In place of transformers' quantized cache, whose package first compiles kernels for minutes, or waits for a lock."""
    from winnowkv.errors import InputError

    raise InputError("its kernels would have to be compiled first")


def option_cost(setup: Any, cell: Cell, rounds: int) -> Cell:
    """Seconds of a prompt, of a step before the choice, of the step that chooses, and of a step after it, with the bytes held.

    A policy that does not look chooses while the prompt is read. The first round is not counted: it compiles kernels.
    """
    from winnowkv.errors import PolicyError
    from winnowkv.evaluate.bench.caches import stepping
    from winnowkv.evaluate.bench.clock import peak_of, spread
    from winnowkv.policies import policy as make_policy

    try:
        look = getattr(make_policy(cell["policy"]), "lookahead", 0)
    except PolicyError as error:
        return {"skipped": f"this version does not know it: {first_line(error)}"}
    prompt = setup.prompt(cell["context"])
    took: dict[str, list[float]] = {name: [] for name in ("prefill_s", "before_s", "choosing_s", "after_s")}
    caches: list[Any] = []

    def once() -> None:
        caches.clear()
        took["prefill_s"].append(setup.clock.seconds(lambda: caches.append(prompt.read(cell["policy"], cell["budget"]))))
        step = stepping(setup.model, caches[0], 1)
        every = [setup.clock.seconds(step) for _ in range(look + 1 + AFTER_CHOOSING)]
        took["before_s"] += every[:look]
        took["choosing_s"] += every[look : look + 1] if look else []
        took["after_s"] += every[look + 1 :]

    once()
    for values in took.values():
        values.clear()
    peak = peak_of(lambda: [once() for _ in range(rounds)])
    report = caches[0].report
    return {
        "prompt_tokens": prompt.tokens, **{name: spread(values) for name, values in took.items() if values},
        "kept_bytes": report.kept_bytes, "full_bytes": report.full_bytes, "peak_bytes": report.peak_bytes, "peak_memory": peak,
        **{name: getattr(report, name, None) for name in ("lookahead_tokens", "draft_tokens", "draft_seconds", "refitted")},
    }  # fmt: skip


def static_pace(setup: Any, cell: Cell, steps: int, new_tokens: int) -> Cell:
    """Requests that fit in the KV memory as rows of transformers' static cache, and their tokens a second."""
    from transformers import StaticCache

    from winnowkv.evaluate.bench.caches import cache_bytes, stepping
    from winnowkv.evaluate.bench.cells import WARMUP_STEPS
    from winnowkv.evaluate.bench.clock import spread

    prompt = setup.prompt(cell["context"])
    rows = cell["kv_memory"] // setup.shape.full_bytes(prompt.tokens + new_tokens)
    if not rows:
        return {"fits": 0, "skipped": f"{cell['kv_memory']} bytes hold no full cache of {prompt.tokens + new_tokens} tokens"}
    static = StaticCache(setup.model.config, max_cache_len=prompt.tokens + new_tokens)
    for layer, source in zip(static.layers, prompt.dynamic(rows).layers, strict=True):
        layer.update(source.keys, source.values)
    work = {"static": stepping(setup.plain, static, rows)}
    took = setup.clock.turns(work, min(steps, new_tokens - WARMUP_STEPS), WARMUP_STEPS)["static"]
    return {"fits": rows, "tokens_s": spread([rows / each for each in took]), "kv_bytes": cache_bytes(static)}


def run_laws(sizes: Sizes, out: Path) -> None:
    """Run the laws on the best device, and store what every test said, also if this process is ended meanwhile."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = [str(ROOT / "tests" / name) for name in sizes.laws]
    env = {**os.environ, "WINNOW_TEST_DEVICE": device, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pytest", "-vv", "-m", "fast", "-p", "no:cacheprovider", "--tb=line", *files]
    with (out / "laws.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    (out / "laws.code").write_text(str(code))


def law_line(out: Path) -> Cell:
    """How many tests passed, failed and skipped so far, and the names of those that failed."""
    log, code = out / "laws.log", out / "laws.code"
    said = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", log.read_text() if log.exists() else "", re.M)
    passed, skipped = (sum(result == word for _, result in said) for word in ("PASSED", "SKIPPED"))
    wrong = [name for name, result in said if result in ("FAILED", "ERROR")]
    line: Cell = {"step": "laws", "cell": "tests", "passed": passed, "skipped": skipped, "wrong": wrong}
    if not said or (code.exists() and code.read_text() not in ("0", "1")):
        line["failed"] = f"pytest did not run its tests: see {log}"
    return line


def add(out: Path, line: Cell) -> None:
    """Append a line to its step's file."""
    with (out / f"{line['step']}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def lines_of(step: str, out: Path) -> list[Cell]:
    """The lines that a step has stored; the last one may have been cut off with its process."""
    if step == "laws":
        return [law_line(out)]
    found = []
    file = out / f"{step}.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def ended(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run a process and all that it starts for at most these seconds; what became of it, in words."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"out of time after {seconds:.0f} s"
    finally:  # also on Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        last = ([line for line in log.read_text().splitlines() if line.strip()] or ["it said nothing"])[-1]
        return f"failed with {process.returncode}: {last}"
    return "done"


def check(steps: Sequence[str], sizes: Sizes, own: Sequence[str], specs: Sequence[str], out: Path) -> Cell:
    """Run every step; the result is written after each, and as far as it went on Ctrl-C. ``own`` are our own arguments."""
    begin, deadline = time.perf_counter(), 0.0
    found: Cell = {**about(sizes), "steps": {}}
    for step in steps:
        deadline += sizes.seconds[step]
        left, status = begin + deadline - time.perf_counter(), "interrupted"
        started = time.perf_counter()
        print(f"{step}: at most {left:.0f} s", file=sys.stderr, flush=True)
        try:
            status = ended([sys.executable, __file__, *own, "--child", step], out / f"{step}.txt", left)
        finally:
            lines, wanted = lines_of(step, out), len(cells(step, sizes, specs))
            found["steps"][step] = {
                "status": status, "seconds": round(time.perf_counter() - started, 1), "measured": len(lines), "of": wanted,
                "lines": lines,
            }  # fmt: skip
            write(found, out)
            print(f"{step}: {status}", file=sys.stderr, flush=True)
    return found


def about(sizes: Sizes) -> Cell:
    """Machine, versions, revision and sizes."""
    from winnowkv.evaluate.report.machine import machine, revision, versions

    return {"machine": machine(), "versions": versions(), "git": revision(), "sizes": sizes._asdict()}


def write(found: Cell, out: Path) -> None:
    """The JSON file and the table, whole or not at all."""
    for name, text in (("gpu-check.json", json.dumps(found, indent=2)), ("gpu-check.md", table(found))):
        part = out / f"{name}.part"
        part.write_text(text + "\n")
        part.replace(out / name)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with ``sizes``, the asked ``steps`` in order, and ``own``: the arguments that a step's process gets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=list(OPTIONS), help=f"policies of the step options: {' '.join(OPTIONS)}")
    parser.add_argument("--small", action="store_true", help="a tiny model and few tests: every step in a few minutes on a CPU")
    parser.add_argument("--steps", default=",".join(WHOLE.seconds), help="comma-separated: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("winnow-out/gpu-check"), help="folder for all files: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    asked.sizes, asked.steps = SMALL if asked.small else WHOLE, [name for name in asked.steps.split(",") if name]
    if unknown := [name for name in asked.steps if name not in WHOLE.seconds]:
        parser.error(f"step {unknown[0]!r} is unknown: it is one of {', '.join(WHOLE.seconds)}")
    asked.own = [*asked.specs, "--out", str(asked.out), *(["--small"] if asked.small else [])]
    return asked


@contextlib.contextmanager
def emptied(out: Path) -> Iterator[None]:
    """The folder without an earlier check's files."""
    out.mkdir(parents=True, exist_ok=True)
    for step in WHOLE.seconds:
        for name in (f"{step}.jsonl", f"{step}.txt", "laws.log", "laws.code"):
            (out / name).unlink(missing_ok=True)
    yield


def main(given: Sequence[str] | None = None) -> int:
    """Run what was asked; 0 if every step was done and no law failed."""
    asked = arguments(given)
    if asked.child == "laws":
        run_laws(asked.sizes, asked.out)
        return 0
    if asked.child:
        measure(asked.child, asked.sizes, asked.specs, asked.out)
        return 0
    import torch

    if not asked.small and not torch.cuda.is_available():
        print("no CUDA device is available: give --small to try every step on the CPU", file=sys.stderr)
        return 2
    try:
        with emptied(asked.out):
            found = check(asked.steps, asked.sizes, asked.own, asked.specs, asked.out)
    except KeyboardInterrupt:
        print(f"interrupted: what was measured is in {asked.out / 'gpu-check.json'}", file=sys.stderr)
        return 130
    print((asked.out / "gpu-check.md").read_text(), end="")
    return int(any(map(went_wrong, found["steps"].values())))


def went_wrong(step: Cell) -> bool:
    """Whether a step failed or measured less than it should; time may run out for the laws that come last."""
    late = step["status"].startswith("out of time") and step["measured"] == step["of"]
    return not (late or step["status"] == "done") or any(line.get("failed") or line.get("wrong") for line in step["lines"])


if __name__ == "__main__":
    sys.exit(main())
