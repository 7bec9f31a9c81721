"""One vLLM engine of vllm_speed.py, in a process of its own: requests come in as JSON lines, measurements go out as JSON lines.

    .venv-vllm/bin/python benchmarks/vllm_speed_engine.py JOB.json

A job holds the arguments of ``vllm.LLM``. vLLM runs step by step in this process, so that every step can be timed and the
scheduler's requests can be counted. Each line read is ``{"requests": [...], "new_tokens": n, "reset": bool}``; a request has
``ids``, and on a context ``salt`` and ``params`` (its ``kv_transfer_params``).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps run, and are timed, in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def serve(engine: Any, requests: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    """Serve these requests at once, greedily and to exactly ``new_tokens``, and say what every step took.

    Returns
    -------
    seconds, cpu_seconds: of everything, by the clock and of this process. steps: of each step both, the requests that got a
    token, those whose first it was, and those that the scheduler had running. cached: prompt tokens that were not computed.
    preempted: requests that lost their blocks.
    """
    from vllm import SamplingParams

    scheduler = engine.engine_core.engine_core.scheduler
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for number, request in enumerate(requests):
        extra = {"kv_transfer_params": request["params"]} if "params" in request else None
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0.0, detokenize=False, extra_args=extra)
        prompt = {"prompt_token_ids": request["ids"]}
        if "salt" in request:
            prompt["cache_salt"] = request["salt"]
        engine.add_request(f"{time.monotonic_ns()}-{number}", prompt, params)
    made: dict[str, int] = {}
    steps, cached, reasons, preempted = [], {}, [], set()
    while engine.has_unfinished_requests():
        start, cpu_start = time.perf_counter(), time.process_time()
        outputs = engine.step()
        took = (time.perf_counter() - start, time.process_time() - cpu_start)
        grown = {o.request_id: len(o.outputs[0].token_ids) for o in outputs if o.outputs}
        emitted = [name for name, tokens in grown.items() if tokens > made.get(name, 0)]
        steps.append((*took, len(emitted), sum(name not in made for name in emitted), len(scheduler.running)))
        preempted |= {one.request_id for one in scheduler.waiting if one.num_preemptions}
        made.update(grown)
        cached |= {o.request_id: o.num_cached_tokens or 0 for o in outputs}
        reasons += [o.outputs[0].finish_reason for o in outputs if o.finished]
    seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu_begin}
    if reasons != ["length"] * len(requests):
        raise RuntimeError(f"{len(requests)} requests ended with {reasons}")
    return {**seconds, "steps": steps, "cached": sum(cached.values()), "preempted": len(preempted)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out, sys.stdout = sys.stdout, sys.stderr  # other output must not get between our lines
    import torch
    import vllm

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    begin = time.perf_counter()
    engine = vllm.LLM(**job).llm_engine
    config = engine.vllm_config
    write(
        {
            "start_s": time.perf_counter() - begin,
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "blocks": config.cache_config.num_gpu_blocks,
            "block": config.cache_config.block_size,
            "tokens_a_step": config.scheduler_config.max_num_batched_tokens,
            "compiled": not config.model_config.enforce_eager,
        }
    )
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["reset"] and not engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        write(serve(engine, asked["requests"], asked["new_tokens"]))


if __name__ == "__main__":
    main()
