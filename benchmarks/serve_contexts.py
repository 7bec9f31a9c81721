"""Time to the first token of a question on a stored context, beside that of the whole text sent again; and what is answered.

One server in this process over loopback, one client. A row of LongBench (``--dataset``, ``--row``) is stored in the ways that
``--ways`` names: ``portable`` and ``unequal`` know nothing of the question (study=lean), ``hinted`` gets it as the hint. Then
the question is asked on each context and of the whole text, compressed (``--policy``, ``--budget``) and with ``--full`` not at
all, in turn, so often (``--rounds``). Every number is a median over the rounds, by the client's clock, until the first text of
the stream. ``cold``: the first question on a context, which reads its file.

    python benchmarks/serve_contexts.py --data ../shared/data [--dataset multifieldqa_en] [--row 11] [--ways hinted]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

import winnowkv as wk
from winnowkv.engine.engine import Engine
from winnowkv.serve.app import make_app
from winnowkv.serve.server import Server, address_of, listen
from winnowkv.serve.settings import ServeSettings

WAYS: dict[str, dict[str, Any]] = {"portable": {}, "unequal": {"portable": False}, "hinted": {"hint": True}}
MINUTES = 60.0
Line = dict[str, Any]


@contextmanager
def serving(store: str, args: argparse.Namespace) -> Iterator[tuple[str, Server]]:
    """A server on a free port: its address, and the server."""
    model, tokenizer = wk.load(args.model)
    engine = Engine(model, tokenizer, args.policy, args.budget, interleave=512)
    seconds = {"request_timeout": 60 * MINUTES, "queue_deadline": 10 * MINUTES}
    settings = ServeSettings(
        model=args.model, policy=args.policy, budget=args.budget, store=store, port=0, host="127.0.0.1", **seconds
    )
    bound = listen(settings)
    server = Server(make_app(engine, settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    address = address_of(bound, settings)
    while True:
        try:
            if httpx.get(f"{address}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.05)
    yield address, server
    server.should_exit = True
    thread.join(30)


def streamed(client: httpx.Client, body: dict[str, Any]) -> Line:
    """Seconds to the first text of a chat's stream and to its end, and the answer with its usage."""
    begin, first, text, usage = time.perf_counter(), 0.0, "", {}
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    with client.stream("POST", "/v1/chat/completions", json=body | options) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(chunk["error"]["message"])
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - begin
                text += chunk["choices"][0]["delta"]["content"]
            usage = chunk.get("usage") or usage
    return {"first": first, "total": time.perf_counter() - begin, "text": text, "usage": usage}


def measured(args: argparse.Namespace, address: str, server: Server, text: str, question: str) -> tuple[list[Line], list[Line]]:
    """What storing took, and what each way of asking took and answered."""
    client = httpx.Client(base_url=address, timeout=60 * MINUTES)
    ask = {"model": args.model, "max_tokens": args.new_tokens, "messages": [{"role": "user", "content": question}]}
    whole = ask | {"messages": [{"role": "user", "content": f"{text}\n\n{question}"}]}
    made, bodies = [], {"whole text": whole}
    if args.full:
        bodies["whole text, full cache"] = whole | {"winnow": {"policy": "full"}}
    for way in args.ways:
        fields = WAYS[way] | ({"hint": question} if "hint" in WAYS[way] else {})
        begin = time.perf_counter()
        answer = client.post("/v1/contexts", json={"text": text, "budget": args.budget, "name": way, **fields})
        if answer.status_code != 200:
            raise SystemExit(answer.text)
        made.append(answer.json() | {"way": way, "elapsed": time.perf_counter() - begin})
        print(f"stored {way} in {made[-1]['elapsed']:.1f} s", file=sys.stderr, flush=True)
        bodies[f"context, {way}"] = ask | {"winnow_context": answer.json()["id"]}
    contexts = server.serving.prompts.contexts
    streamed(client, ask)  # the first request of a process is slower than all others
    lines: dict[str, list[Line]] = {name: [] for name in bodies}
    for _ in range(args.rounds):
        for name, body in bodies.items():
            reads = contexts.reads
            line = streamed(client, body)
            lines[name].append(line | {"cold": contexts.reads > reads})
            print(f"{name}: {line['first']:.3f} s, {line['text']!r}", file=sys.stderr, flush=True)
            if "winnow_context" in body and lines[name][-1]["cold"]:
                lines[name].append(streamed(client, body) | {"cold": False})
    return made, [summary(name, each) for name, each in lines.items()]


def summary(name: str, lines: list[Line]) -> Line:
    """Medians of what was measured in one way."""
    warm = [line["first"] for line in lines if not line["cold"]]
    cold = [line["first"] for line in lines if line["cold"]]
    usage = lines[-1]["usage"]
    return {
        "way": name, "first": statistics.median(warm), "cold": statistics.median(cold) if cold else None, "times": len(warm),
        "answer": lines[-1]["text"], "same_every_time": len({line["text"] for line in lines}) == 1,
        "kept": usage["winnow"]["kept_entries"], "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "prompt_tokens": usage["prompt_tokens"],
    }  # fmt: skip


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--dataset", default="multifieldqa_en")
    parser.add_argument("--row", type=int, default=11)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--policy", default="winnow")
    parser.add_argument("--budget", type=float, default=0.12)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="also ask the whole text without any compression")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = (args.data / "longbench" / f"{args.dataset}.jsonl").read_text().splitlines()
    row = json.loads(rows[args.row])
    with tempfile.TemporaryDirectory() as store, serving(store, args) as (address, server):
        made, lines = measured(args, address, server, row["context"], row["input"])
    reference = next(line["first"] for line in lines if line["way"] == "whole text")
    for line in lines:
        line["times_faster"] = reference / line["first"]
    if args.json:
        about = {"dataset": args.dataset, "row": args.row, "question": row["input"], "answers": row["answers"]}
        print(json.dumps({**about, "threads": torch.get_num_threads(), "stored": made, "asked": lines}, indent=2))
        return
    print(f"{args.dataset} row {args.row}: {row['input']} (right: {row['answers']})")
    for one in made:
        kept = f"{one['kept']} of {one['seen']} entries, {one['bytes'] / 2**20:.1f} MiB"
        print(f"stored {one['way']}: {kept} by {one['policy']} in {one['seconds']:.1f} s")
    for line in lines:
        cold = "" if line["cold"] is None else f" (cold {line['cold']:.3f})"
        print(f"{line['way']}: first token {line['first']:.3f} s{cold}, {line['times_faster']:.1f}x; {line['answer']!r}")


if __name__ == "__main__":
    main()
