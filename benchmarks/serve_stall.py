"""How long running streams wait while a long prompt is read, and what their steps meanwhile cost the prompt.

Some streams decode; then one request with a long prompt comes. Measured of each stream is the time from a token to its next
one while that prompt is read. Without interleaving (``none``) every stream waits once, for the whole prompt. With it the prompt
pays for the steps of the others with its own time to first token. Each value of ``--interleave`` has a server of its own;
servers run in turns, one at a time.

    python benchmarks/serve_stall.py [--streams 8] [--prompt-tokens 4000] [--interleaves 512,none] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from serve_client import ask, percentiles, stream
from serve_servers import Served, parsed, winnow_server
from serve_speed import prompts_of
from transformers import PreTrainedTokenizerFast

from winnowkv.cli.main import one_sentence
from winnowkv.cli.tables import ResultTable, keys, note, numbers
from winnowkv.errors import InputError
from winnowkv.evaluate.report.machine import machine, revision, versions
from winnowkv.evaluate.report.store import write_json
from winnowkv.models.load import EMBEDDED, model_folder

NONE = 10**9  # tokens: more than any prompt has
SHORT = 64  # tokens of a stream's prompt
MOST_NEW = 4000  # tokens of a stream: it is left once the prompt was read
Cell = dict[str, Any]


async def measured(served: Served, short: list[list[int]], long: list[int]) -> Cell:
    """Streams that decode, and a prompt that comes meanwhile: the streams' gaps before and during, and its first token."""
    more = {"model": EMBEDDED, "temperature": 0, "ignore_eos": True}
    times: list[list[float]] = [[] for _ in short]
    running = [
        asyncio.create_task(stream(served.port, more | {"prompt": ids, "max_tokens": MOST_NEW}, times=times[at]))
        for at, ids in enumerate(short)
    ]
    while min(map(len, times)) < 2:
        await asyncio.sleep(0.05)
    settled = time.time()
    while min(map(len, times)) < 12:  # the time of a step without a prompt
        await asyncio.sleep(0.05)
    asked = await stream(served.port, more | {"prompt": long, "max_tokens": 1})
    reached = [len(one) for one in times]
    while any(len(one) < most + 2 for one, most in zip(times, reached, strict=True)):  # those that waited for the whole prompt
        await asyncio.sleep(0.05)
    for each in running:
        each.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    if not asked.whole:
        raise InputError(f"the prompt of {len(long)} tokens failed: {asked.status} {asked.error}")
    while parsed((await ask(served.port, "GET", "/metrics"))[1])["winnow_active_requests"]:
        await asyncio.sleep(0.05)
    pairs = [pair for one in times for pair in pairwise(one)]
    before = [b - a for a, b in pairs if a >= settled and b <= asked.begun]
    during = [b - a for a, b in pairs if b > asked.begun and a < asked.times[0]]
    return {
        "first_token_s": asked.times[0] - asked.begun, "before_s": percentiles(before), "during_s": percentiles(during),
        "tokens_during": len(during) / len(short),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--interleaves", default="512,none", help="tokens of a prompt between two steps of the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the server's model")
    parser.add_argument("--out", type=Path, default=Path("winnow-out/serve-stall"))
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    args = parse()
    sides = args.interleaves.split(",")
    if not all(side == "none" or side.isdigit() for side in sides):
        raise InputError(f"--interleaves {args.interleaves!r}: give numbers of tokens, or none: 512,none")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder(EMBEDDED, torch.bfloat16))
    short, long = prompts_of(tokenizer, args.streams, SHORT), prompts_of(tokenizer, args.rounds, args.prompt_tokens)
    lines: list[Cell] = []
    for number in range(args.rounds):
        for side in sides[:: 1 if number % 2 else -1]:
            options = ["--interleave", str(NONE) if side == "none" else side, "--max-rows", str(args.streams + 1)]
            with winnow_server(args.out / f"{side}.log", *options, threads=args.threads) as served:
                found = asyncio.run(measured(served, short, long[number]))
            lines.append({"interleave": side, "round": number, "load": os.getloadavg()[0], **found})
            about = f"first token {found['first_token_s']:.2f} s, next token at most {found['during_s']['max']:.3f} s"
            print(f"{time.strftime('%H:%M:%S')} {side}, round {number}: {about}", file=sys.stderr, flush=True)
    result = {
        "lines": lines, "machine": machine(), "versions": versions(), "revision": revision(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }  # fmt: skip
    write_json(args.out / "result.json", result)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    columns = ("first token, s", "next token, ms", "p99 meanwhile, ms", "most, ms", "tokens meanwhile")
    table = ResultTable([*keys("interleave"), *numbers(columns)], f"Streams while {args.prompt_tokens} tokens are read")
    for side in sides:
        mine = [line for line in lines if line["interleave"] == side]

        def of(part: str, name: str, mine: list[Cell] = mine) -> str:
            return f"{1000 * median(line[part][name] for line in mine):.0f}"

        table.add(
            side, f"{median(line['first_token_s'] for line in mine):.2f}", of("before_s", "p50"), of("during_s", "p99"),
            of("during_s", "max"), f"{median(line['tokens_during'] for line in mine):.1f}",
        )  # fmt: skip
    table.print()
    loads = [line["load"] for line in lines]
    note(f"{args.streams} streams, medians of {args.rounds} rounds, load average {min(loads):.1f} to {max(loads):.1f}")


if __name__ == "__main__":
    with one_sentence("serve_stall"):
        main()
