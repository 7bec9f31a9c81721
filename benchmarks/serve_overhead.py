"""What the server costs over the bare engine: tokens a second of N streams over HTTP beside the same requests in a step() loop.

One process holds one engine. In turns it steps the engine itself, and serves it by uvicorn to a client in a process of its
own (serve_client.py), which streams the same prompts at once. So both have the same model, memory and machine; the order of the
turns alternates, and the ratio is that of each round. The client takes processor time, too: how much is said.

    python benchmarks/serve_overhead.py [--streams 16] [--new-tokens 256] [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from serve_client import Outcome

import winnowkv as wk
from winnowkv.cli.main import one_sentence
from winnowkv.cli.tables import ResultTable, keys, note, numbers
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import read_haystack
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.store import write_json
from winnowkv.serve.app import make_app
from winnowkv.serve.server import Server, listen
from winnowkv.serve.settings import ServeSettings

THREADS = "uvicorn", "winnow-engine"
CLIENT = Path(__file__).with_name("serve_client.py")
Cell = dict[str, Any]


def prompts_of(tokenizer: Any, streams: int, tokens: int) -> list[list[int]]:
    """So many prompts of so many tokens of the essays, as token ids."""
    ids = tokenizer(read_haystack(), add_special_tokens=False)["input_ids"]
    return [ids[at * tokens : (at + 1) * tokens] for at in range(streams)]


def bare(engine: wk.Engine, prompts: list[list[int]], new_tokens: int) -> Cell:
    """The engine alone: all prompts at once, stepped until they have ended."""
    sampling = wk.Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    begin, cpu = time.perf_counter(), time.process_time()
    requests = [engine.submit(ids, sampling) for ids in prompts]
    texts, steps = [""] * len(requests), []
    places = {id(request): at for at, request in enumerate(requests)}
    while any(request.completion is None for request in requests):
        start = time.perf_counter()
        events = engine.step()
        steps.append((time.perf_counter() - start, len(events)))
        for event in events:
            texts[places[id(event.request)]] += event.text
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    full = [took for took, events in steps if events == len(prompts)]
    tokens = len(prompts) * new_tokens
    return {
        "tokens_s": tokens / seconds,
        "cpu_ms_token": 1000 * cpu / tokens,
        "step_ms": median(full) * 1000 if full else None,
        "texts": texts,
    }


def thread_seconds() -> dict[str, float]:
    """Processor seconds of the server's two threads: of its event loop and of its engine."""
    clocks = {one.name: time.pthread_getcpuclockid(one.ident) for one in threading.enumerate() if one.ident is not None}
    return {name: time.clock_gettime(clocks[name]) for name in THREADS}


def served(port: int, prompts: list[list[int]], new_tokens: int, folder: Path) -> Cell:
    """The same over HTTP, by a client in another process."""
    more = {"model": "embedded", "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    calls = [{"body": {"prompt": ids, **more, "stream_options": {"include_usage": True}}} for ids in prompts]
    job = folder / "overhead-job.json"
    write_json(job, {"port": port, "calls": calls, "clients": len(calls)})
    cpu, threads = time.process_time(), thread_seconds()
    done = subprocess.run([sys.executable, str(CLIENT), str(job)], capture_output=True, text=True, check=True)
    cpu, ended = time.process_time() - cpu, thread_seconds()
    found = json.loads(done.stdout)
    outcomes = [Outcome(**one) for one in found["outcomes"]]
    bad = [one for one in outcomes if not one.whole or one.tokens != new_tokens]
    if bad:
        raise InputError(f"{len(bad)} of {len(outcomes)} streams failed, the first: {bad[0].error} (status {bad[0].status})")
    seconds = max(one.ended for one in outcomes) - min(one.begun for one in outcomes)
    tokens = len(prompts) * new_tokens
    return {
        "tokens_s": tokens / seconds, "cpu_ms_token": 1000 * cpu / tokens, "client_cpu_s": found["cpu_seconds"],
        "client_share": found["cpu_seconds"] / seconds, "step_ms": None, "texts": [one.texts["0"] for one in outcomes],
        "threads_ms_token": {name: 1000 * (ended[name] - threads[name]) / tokens for name in THREADS},
    }  # fmt: skip


@contextmanager
def server(engine: wk.Engine, settings: ServeSettings) -> Iterator[int]:
    """Serve an engine of this process on a free port until the block is left."""
    bound = listen(settings)
    there = threading.Event()
    made = Server(make_app(engine, settings, loaded=lambda _: there.set()))
    thread = threading.Thread(target=lambda: asyncio.run(made.serve(sockets=[bound])), name="uvicorn", daemon=True)
    thread.start()
    there.wait()
    try:
        yield bound.getsockname()[1]
    finally:
        made.should_exit = True
        thread.join()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--switch-interval", type=float, help="of Python's threads, in seconds; its own if not given")
    parser.add_argument("--out", type=Path, default=Path("winnow-out/serve-overhead"))
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.switch_interval is not None:
        sys.setswitchinterval(args.switch_interval)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = wk.load("embedded")
    settings = ServeSettings(port=0, max_rows=args.streams, keep_whole=0)
    engine = wk.Engine(model, tokenizer, **settings.engine_options())
    prompts = prompts_of(tokenizer, args.streams, args.prompt_tokens)
    lines: list[Cell] = []
    loads = [os.getloadavg()[0]]
    with server(engine, settings) as port:
        bare(engine, prompts, 8)
        served(port, prompts, 8, args.out)
        for number in range(args.rounds):
            found: dict[str, Cell] = {}
            for side in ("bare", "served")[:: 1 if number % 2 else -1]:
                each = engine, prompts, args.new_tokens
                found[side] = bare(*each) if side == "bare" else served(port, *each[1:], args.out)
            same = sum(a == b for a, b in zip(found["bare"].pop("texts"), found["served"].pop("texts"), strict=True))
            line = {"round": number, "load": os.getloadavg()[0], **found, "same_texts": same}
            line["ratio"] = found["served"]["tokens_s"] / found["bare"]["tokens_s"]
            line["cpu_ratio"] = found["served"]["cpu_ms_token"] / found["bare"]["cpu_ms_token"]
            lines.append(line)
            print(
                f"{time.strftime('%H:%M:%S')} round {number}: bare {found['bare']['tokens_s']:.1f}, served "
                f"{found['served']['tokens_s']:.1f} tokens/s: {line['ratio']:.3f}, processor time {line['cpu_ratio']:.3f}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    loads.append(os.getloadavg()[0])
    summary = {
        side: {name: median(line[side][name] for line in lines) for name in ("tokens_s", "cpu_ms_token")}
        for side in ("bare", "served")
    }
    result = {
        "summary": summary, "ratio": median(line["ratio"] for line in lines),
        "cpu_ratio": median(line["cpu_ratio"] for line in lines), "lines": lines, "load": loads,
        "same_texts": [line["same_texts"] for line in lines],
        "threads_ms_token": {name: median(line["served"]["threads_ms_token"][name] for line in lines) for name in THREADS},
        "client_share": median(line["served"]["client_share"] for line in lines), "machine": machine(), "versions": versions(),
        "revision": revision(), "arguments": {name: str(value) for name, value in vars(args).items()},
    }  # fmt: skip
    write_json(args.out / "result.json", result)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    table = ResultTable([*keys("requests"), *numbers(("tokens/s", "processor ms a token"))], "The server over the bare engine")
    for side, found in summary.items():
        table.add(side, f"{found['tokens_s']:.1f}", f"{found['cpu_ms_token']:.3f}")
    table.print()
    note(
        f"{args.streams} streams of {args.new_tokens} tokens, {args.rounds} rounds: the server gives {result['ratio']:.1%} of "
        f"the bare engine's tokens a second (median of the rounds' ratios), processor time {result['cpu_ratio'] - 1:+.1%}, "
        f"the event loop's thread alone {result['threads_ms_token'][THREADS[0]]:.3f} ms a token; the "
        f"client took {result['client_share']:.0%} of a core beside it; load average {loads[0]:.1f} to {loads[1]:.1f}"
    )


if __name__ == "__main__":
    with one_sentence("serve_overhead"):
        main()
