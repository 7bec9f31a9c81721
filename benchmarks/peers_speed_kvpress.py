"""The kvpress side of peers_speed.py. Runs in kvpress's own environment and imports nothing of winnowkv.

    .venv-peers/bin/python benchmarks/peers_speed_kvpress.py JOB.json

A job holds the model's folder, prompts as token ids, and the cells to measure. Each cell is timed in turns with the same
model without a press. Results are written to standard output as JSON lines. A press is a Python expression.
"""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

WARMUP_STEPS = 3  # decode steps that are not timed


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that the work takes, work on the accelerator included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def turns(ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both in each round; they take turns in going first."""
    took: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds):
        for which in (0, 1) if round_ % 2 else (1, 0):
            took[which].append(seconds((ours, plain)[which]))
    return took


def read(model: Any, ids: torch.Tensor, press: Any) -> DynamicCache:
    """Read a prompt, with a press or without."""
    cache = DynamicCache()
    with press(model) if press else contextlib.nullcontext():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def stepping(model: Any, cache: DynamicCache, rows: int, seen: int) -> Callable[[], Any]:
    """One decode step of ``rows`` copies of a cache's row; positions continue after the whole prompt."""
    mine = copy.deepcopy(cache)
    if rows > 1:
        mine.batch_repeat_interleave(rows)
    token, at = torch.zeros(rows, 1, dtype=torch.long, device=model.device), iter(range(seen, sys.maxsize))

    def step() -> None:
        where = torch.full_like(token, next(at))
        model(token, past_key_values=mine, position_ids=where, use_cache=True, logits_to_keep=1)

    return step


def held(cache: DynamicCache) -> int:
    """Bytes of storage of keys and values."""
    return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))


def measure(model: Any, cell: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """Measure one cell: prefill, or decode steps."""
    press = eval(cell["press"], vars(kvpress).copy())  # the text comes from our own command line
    press.compression_ratio = cell["ratio"]
    if cell["kind"] == "prefill":
        read(model, ids, press)
        ours, plain = turns(lambda: read(model, ids, press), lambda: read(model, ids, None), cell["rounds"])
        return {"prefill_s": median(ours), "over_plain": median(a / b for a, b in zip(ours, plain, strict=True))}
    compact, whole = read(model, ids, press), read(model, ids, None)
    room = cell["new_tokens"] * held(whole) // ids.shape[1]
    rows = cell.get("batch") or max(cell["kv_memory"] // (held(compact) + room), 1)
    full = cell.get("batch") or max(cell["kv_memory"] // (held(whole) + room), 1)
    ours, plain = stepping(model, compact, rows, ids.shape[1]), stepping(model, whole, full, ids.shape[1])
    turns(ours, plain, WARMUP_STEPS)
    mine, theirs = turns(ours, plain, cell["steps"])
    return {
        "running": rows,
        "step_ms": 1000 * median(mine),
        "tokens_s": rows / median(mine),
        "kv_bytes": rows * held(compact),
        "speedup": median((rows / a) / (full / b) for a, b in zip(mine, theirs, strict=True)),
    }


@torch.no_grad()
def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out, sys.stdout = sys.stdout, sys.stderr  # other output must not get between our lines
    torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(job["device"]).eval()

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    versions = {"kvpress": version("kvpress"), "torch": torch.__version__, "transformers": transformers.__version__}
    write({"versions": {**versions, "python": platform.python_version()}})
    for cell in job["cells"]:
        ids = torch.tensor([job["prompts"][str(cell["context"])]], device=model.device)
        write({**cell, **measure(model, cell, ids)})


if __name__ == "__main__":
    main()
