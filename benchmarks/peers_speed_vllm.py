"""The vLLM side of peers_speed.py. Runs in vLLM's own environment and imports nothing of winnowkv.

    .venv-vllm/bin/python benchmarks/peers_speed_vllm.py JOB.json

A job holds the model's folder, the bytes of KV memory, prompts as token ids, and the cells to measure. vLLM runs step by
step in this process, so that decode steps can be distinguished from steps that read prompts. Results are written to
standard output as JSON lines. The first start of a model compiles it, which takes a minute or two.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps run, and are timed, in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

Step = tuple[float, int, int]  # seconds, requests that got a token, requests that got their first token


def steps(engine: Any, prompts: list[list[int]], new_tokens: int) -> Iterator[Step]:
    """Serve these prompts step by step, greedily and up to ``new_tokens``."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
    for number, ids in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": ids}, params)
    made: dict[str, int] = {}
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - begin
        grown = {o.request_id: len(o.outputs[0].token_ids) for o in outputs if o.outputs}
        emitted = [name for name, tokens in grown.items() if tokens > made.get(name, 0)]
        yield seconds, len(emitted), sum(name not in made for name in emitted)
        made.update(grown)


def prefill(engine: Any, ids: list[int], rounds: int) -> dict[str, Any]:
    """Median seconds to the first token of one prompt; the first round warms up."""
    took = [sum(seconds for seconds, *_ in steps(engine, [ids], 1)) for _ in range(rounds + 1)]
    return {"prefill_s": median(took[1:])}


def decode(engine: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Speed of decode steps with the largest number of running requests, and of everything, prompts included.

    A step counts if as many requests got a token as in any step, and none got its first token.
    """
    taken = list(steps(engine, prompts, new_tokens))
    most = max(emitted for _, emitted, _ in taken)
    pure = [seconds for seconds, emitted, first in taken if emitted == most and not first]
    total = sum(seconds for seconds, *_ in taken)
    return {
        "running": most,
        "steps": len(pure),
        "step_ms": 1000 * median(pure) if pure else None,
        "tokens_s": most / median(pure) if pure else None,
        "with_prefill_tokens_s": len(prompts) * new_tokens / total,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out, sys.stdout = sys.stdout, sys.stderr  # other output must not get between our lines
    import torch
    import vllm

    begin = time.perf_counter()
    torch.set_num_threads(job["threads"])
    model = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["longest"],
        max_num_seqs=job["most_rows"],
        kv_cache_memory_bytes=job["kv_bytes"],
        enable_prefix_caching=False,  # all prompts are the same text, and each must be read
    )

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    write({"versions": versions, "start_s": time.perf_counter() - begin})
    for cell in job["cells"]:
        ids = job["prompts"][str(cell["context"])]
        if cell["kind"] == "prefill":
            measured = prefill(model.llm_engine, ids, cell["rounds"])
        else:
            measured = decode(model.llm_engine, [ids] * cell["batch"], cell["new_tokens"])
        write({**cell, **measured})


if __name__ == "__main__":
    main()
