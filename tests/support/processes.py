"""Two processes that share a model's heads by transformers' tensor parallelism, and what each says of the cases it is given."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import winnowkv as wk
from support.batch import padded
from support.models import PROMPT, prompt
from support.paths import ROOT
from support.reference import positions
from winnowkv.cache.reading import greedy, prefill

PROCESSES = 2
NEW_TOKENS = 4  # greedy tokens of each case
SECONDS = 240


def in_processes(folder: Path, jobs: dict[str, list[dict[str, Any]]]) -> list[dict[str, list[Any]]]:
    """What each process says of each job (:func:`outcome`), by the model in a subfolder of that name."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    shared |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.processes", str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def heads_kept(outcomes: list[dict[str, Any]], kv_heads: int) -> list[list[list[int]] | None]:
    """Positions that each KV head of the model keeps, by layer: those of one process, or of all side by side."""
    found: list[list[list[int]] | None] = []
    for layer in zip(*(each["kept"] for each in outcomes), strict=True):
        if layer[0] is None:
            found.append(None)
            continue
        rows = [row for kept in layer for row in kept * (kv_heads // len(outcomes) // len(kept))]
        found.append([[position for position in row if position >= 0] for row in rows])
    return found


def shared_model(folder: Path | str) -> PreTrainedModel:
    """The model in a folder, its heads shared by the processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases want a DistributedConfig, which older ones do not have
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()


def outcome(model: PreTrainedModel, job: dict[str, Any]) -> dict[str, Any]:
    """What a cache keeps of a prompt, its report, what it takes and what follows from it; plain data.

    ``job``: the cache's ``settings``; perhaps ``tokens`` of the prompt and how it is ``read``, lengths of a padded batch
    (``rows``), what is ``replayed`` from the cache, or ``new`` tokens to generate.
    """
    cache = wk.CompactCache(model, **job["settings"])
    if "rows" in job:
        ids, mask = padded([prompt(length, seed=length) for length in job["rows"]])
        logits = prefill(model, ids, cache, mask)
        tokens = logits.argmax(-1).tolist()
    else:
        logits = prefill(model, prompt(job.get("tokens", PROMPT)), cache, **job.get("read", {}))
        cache = cache.replay(**job["replayed"]) if "replayed" in job else cache
        tokens = list(greedy(model, cache, logits, job.get("new", NEW_TOKENS)))
    report = {name: value for name, value in cache.report.to_dict().items() if not name.endswith(("seconds", "per_token"))}
    report["kept_mass"] = [round(mass, 5) for mass in report["kept_mass"]]
    kept = [positions(cache, row) for row in range(len(job.get("rows", [0])))]
    return {
        "kept": [None if one is None else one.tolist() for row in kept for one in row],
        "report": report,
        "held": cache.held_bytes,
        "tokens": tokens,
        "why": [str(each) for each in cache.explain(1, 9)] if cache.compression.keep_scores else [],
    }


def main() -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    folder, outcomes = Path(sys.argv[1]), {}
    for name, jobs in json.loads((folder / "jobs.json").read_text()).items():
        model = shared_model(folder / name)
        outcomes[name] = [outcome(model, job) for job in jobs]
    torch.distributed.destroy_process_group()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
