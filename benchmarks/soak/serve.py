"""``winnow serve`` under load: concurrent streams, aborts, a full queue; every answer is the one that its prompt gets alone.

A server on the embedded model, in a process of its own, gets requests of all kinds from many clients at once: chats and
completions, prompts of 200 to 4,000 tokens, policies of their own, several choices; some clients leave in the middle, some ask
about a stored context. More of them come than the queue holds. Checked are:

- no error but 429 of the full queue, with its Retry-After, and a request's id with every answer;
- every stream that its client did not leave ends with a reason, usage and ``[DONE]``;
- answers equal those of an engine in this process that has nothing else to do (of contexts: of the idle server). In bfloat16
  batches of other shapes may differ in the last bit of a sum, so the model is in float32 unless ``--dtype`` says otherwise. A
  token may still differ where two were equally likely: to the hundredth of a percent (``TIE``), looked up in the engine alone;
- KV bytes stay within ``--kv-memory``; resident memory stays within the most that the process had while the longest
  prompt was read alone, and ``--kv-memory``, and a tenth of it for the copy of a layer that grows, and ``BESIDE``;
- afterwards nothing is active, nothing waits, no byte of keys and values is held.

    python benchmarks/soak/serve.py [--minutes 10] [--clients 64] [--seed 0] [--dtype float32] [--json out.json]

Exits with 1 on any fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import winnowkv as wk
from winnowkv.evaluate.needle.prompts import read_haystack
from winnowkv.memory.sizes import read_size

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from serve_client import Outcome, ask, percentiles, stream
from serve_servers import Served, Watch, parsed, winnow_server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LENGTHS = 200, 4000  # tokens of a prompt, as many short as long ones by their logarithm
KINDS, QUESTIONS = 40, 4  # different requests, and questions on the context
NEW = 16, 32, 64
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"budget": 0.3}, {"policy": "snapkv", "budget": 128}, {"policy": "streaming", "budget": 96}, {"policy": "full"},
)  # fmt: skip
ABORTS, ON_CONTEXTS = 0.15, 0.1  # shares of the requests
QUEUE, ROWS, KV_MEMORY = 24, 32, "256MiB"
BESIDE = 128 * 2**20  # bytes of sockets, texts of requests, and what the allocator cannot give back
TIE = 1e-4  # difference of log probabilities
LAST = 1800.0  # seconds in which streams have to end once no more are sent


@dataclass(frozen=True)
class Kind:
    """A request that may come often: what is sent, and how an engine is asked the same."""

    path: str
    body: dict[str, Any]
    prompt: Any
    options: dict[str, Any]
    context: bool = False

    @cached_property
    def choices(self) -> int:
        """Of its answer."""
        return int(self.body.get("n", 1))


@dataclass
class Found:
    """What was counted, and sentences about what should not be."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    outcomes: list[tuple[int, Outcome, list[str]]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def fault(self, text: str) -> None:
        """Note a fault."""
        self.counts["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append(text)
            print(f"fault: {text}", file=sys.stderr, flush=True)


def kinds_of(tokenizer: Any, draw: random.Random) -> list[Kind]:
    """Requests of all kinds, the first one the longest."""
    ids = tokenizer(read_haystack(), add_special_tokens=False)["input_ids"]
    low, high = LENGTHS
    found = []
    for number in range(KINDS):
        tokens = high if not number else round(low * (high / low) ** draw.random())
        begin = draw.randrange(len(ids) - tokens)
        part, options = ids[begin : begin + tokens], draw.choice(OPTIONS) if number else {}
        body: dict[str, Any] = {"model": "embedded", "temperature": 0, "max_tokens": draw.choice(NEW)}
        body |= {"stream_options": {"include_usage": True}} | ({"winnow": options} if options else {})
        if number and options.get("policy") != "full" and draw.random() < 0.1:
            body["n"] = 2
        how = draw.randrange(3)
        if how == 0:
            prompt: Any = [{"role": "user", "content": tokenizer.decode(part[:-40]) + "\n\nWhat is this about?"}]
            found.append(Kind(CHAT, body | {"messages": prompt}, prompt, options))
        else:
            prompt = part if how == 1 else tokenizer.decode(part)
            found.append(Kind(TEXT, body | {"prompt": prompt}, prompt, options))
    return found


async def with_context(served: Served, tokenizer: Any) -> list[Kind]:
    """Questions on a context that is stored now; none if the server stores none."""
    text = read_haystack()[:9000]
    status, answer = await ask(served.port, "POST", "/v1/contexts", {"text": text, "study": "none", "policy": "snapkv"})
    if status == 404:
        return []
    if status != 200:
        raise RuntimeError(f"a context could not be stored: {status} {answer[:200]!r}")
    more = {"model": "embedded", "temperature": 0, "max_tokens": 32, "stream_options": {"include_usage": True}}
    questions = [f"Answer in {number + 3} words: what does the text say first?" for number in range(QUESTIONS)]
    each = [{"messages": [{"role": "user", "content": one}], "winnow_context": json.loads(answer)["id"]} for one in questions]
    return [Kind(CHAT, more | one, None, {}, context=True) for one in each]


async def texts_of(port: int, kind: Kind, abort_after: int | None) -> tuple[Outcome, list[str]]:
    """One stream, and the text of each of its choices."""
    out = await stream(port, kind.body, path=kind.path, abort_after=abort_after)
    return out, [out.texts.get(index, "") for index in range(kind.choices)]


class Load:
    """Clients that send requests until their time is over."""

    def __init__(self, served: Served, kinds: list[Kind], on_context: list[Kind], seed: int, found: Found) -> None:
        self.served, self.kinds, self.on_context, self.seed, self.found = served, kinds, on_context, seed, found
        self.end = 0.0
        self.alone: dict[int, list[str]] = {}  # answers about the context by the idle server

    async def run(self, clients: int, seconds: float) -> None:
        """So many clients for so long; then wait until all streams have ended."""
        self.end = time.monotonic() + seconds
        async with asyncio.timeout(seconds + LAST):
            await asyncio.gather(*(self.client(number) for number in range(clients)))

    async def client(self, number: int) -> None:
        """One client."""
        draw = random.Random(f"{self.seed}-{number}")
        while time.monotonic() < self.end:
            asks = self.on_context and draw.random() < ON_CONTEXTS
            at = draw.randrange(len(self.on_context)) if asks else draw.randrange(len(self.kinds))
            kind = (self.on_context if asks else self.kinds)[at]
            leaves = draw.randrange(12) if draw.random() < ABORTS else None
            out, texts = await texts_of(self.served.port, kind, leaves)
            self.look(len(self.kinds) + at if asks else at, kind, out, texts)
            if out.status == 429:
                await asyncio.sleep(min(float(out.retry_after or 1), 1 + 4 * draw.random()))

    def look(self, at: int, kind: Kind, out: Outcome, texts: list[str]) -> None:
        """Count what came of a request, and note what should not have."""
        counts = self.found.counts
        counts["requests"] += 1
        where = f"{kind.path}, request {at}, status {out.status}, id {out.request_id}"
        if out.status and out.request_id is None:
            self.found.fault(f"{where}: no id")
        if out.status == 429:
            counts["queue full"] += 1
            if out.retry_after is None or "queue_full" not in (out.error or ""):
                self.found.fault(f"{where}: {out.error}, Retry-After {out.retry_after}")
        elif out.aborted:
            counts["left by the client"] += 1
        elif not out.whole or len(out.finishes) != kind.choices or out.usage is None:
            self.found.fault(f"{where}: {out.error}, reasons {out.finishes}, done {out.done}, usage {out.usage}")
        else:
            counts["whole answers"] += 1
            counts["of a context"] += kind.context
            counts["generated tokens"] += out.tokens
            self.found.outcomes.append((at, out, texts))


def engine_texts(engine: wk.Engine, kind: Kind, **more: Any) -> Any:
    """The completion of a request by an engine that has nothing else to do."""
    own = {name: value for name, value in kind.options.items() if name in ("policy", "budget")}
    sampling = wk.Sampling(max_new_tokens=kind.body["max_tokens"], n=kind.choices, **more)
    request = engine.submit(kind.prompt, sampling, **own)
    while request.completion is None:
        engine.step()
    return request.completion


def compare(found: Found, kinds: list[Kind], alone: dict[int, list[str]], dtype: str, tokenizer: Any, model: Any) -> None:
    """Compare every whole answer with the same prompt's alone; ``alone``: of contexts."""
    engine = wk.Engine(model, tokenizer)
    truths = dict(alone)
    for at, out, texts in found.outcomes:
        if at not in truths:
            truths[at] = [choice.text for choice in engine_texts(engine, kinds[at]).choices]
        for index, (text, truth) in enumerate(zip(texts, truths[at], strict=True)):
            found.counts["answers compared"] += 1
            if text == truth:
                continue
            margin = None if at in alone else tie(engine, kinds[at], index, text, tokenizer)
            found.counts["answers that differ"] += 1
            if dtype == "float32" and (margin is None or margin > TIE):
                found.fault(f"request {at}, id {out.request_id}: {text!r}, alone {truth!r}, margin {margin}")


def tie(engine: wk.Engine, kind: Kind, index: int, text: str, tokenizer: Any) -> float | None:
    """By how much the likeliest token alone was likelier than the second where an answer first differs."""
    choice = engine_texts(engine, kind, logprobs=2).choices[index]
    for count in range(1, len(choice.tokens) + 1):
        if not text.startswith(tokenizer.decode(choice.tokens[:count], skip_special_tokens=True).rstrip("�")):
            (_, first), (_, second) = choice.logprobs[count - 1].top[:2]
            return float(first - second)
    return None


async def soak(
    served: Served, kinds: list[Kind], asked: argparse.Namespace, found: Found, tokenizer: Any
) -> dict[int, list[str]]:
    """Warm up, load, and look at what is left; returns the idle server's answers about its context."""
    warm = Watch()
    warm.start(served, 0.2, [])
    for kind in (kinds[0], kinds[0]):
        out, _ = await texts_of(served.port, kind, None)
        if not out.whole:
            found.fault(f"the longest prompt, the server idle: {out.status} {out.error}")
    warm.stop()
    on_context = await with_context(served, tokenizer)
    alone = {}
    for number, kind in enumerate(on_context):
        out, texts = await texts_of(served.port, kind, None)
        if not out.whole:
            found.fault(f"a question on a context, the server idle: {out.status} {out.error}")
        alone[len(kinds) + number] = texts
    watch, limit = Watch(), read_size(asked.kv_memory, "--kv-memory")
    bound = int(warm.most("rss")) + limit + limit // 10 + BESIDE
    watch.start(served, 1.0, ["winnow_kv_bytes", "winnow_active_requests", "winnow_queue_length"])
    begin, cpu = time.time(), served.cpu_seconds
    await Load(served, kinds, on_context, asked.seed, found).run(asked.clients, 60 * asked.minutes)
    seconds = time.time() - begin
    for _ in range(50):  # those who left last are gone a step later
        left = parsed((await ask(served.port, "GET", "/metrics"))[1])
        if not left["winnow_active_requests"] and not left["winnow_kv_bytes"]:
            break
        await asyncio.sleep(0.2)
    watch.stop()
    for name in ("winnow_active_requests", "winnow_queue_length", "winnow_kv_bytes"):
        if left[name]:
            found.fault(f"{name} is {left[name]:g} after all streams have ended")
    if watch.most("winnow_kv_bytes") > limit:
        found.fault(f"{watch.most('winnow_kv_bytes'):g} bytes of keys and values were held, the limit is {limit}")
    if watch.most("rss") > bound:
        found.fault(f"the process grew to {watch.most('rss') / 2**20:.0f} MiB, its bound is {bound / 2**20:.0f} MiB")
    good = [out for _, out, _ in found.outcomes]
    over_time = [round(each["rss"] / 2**20) for each in watch.samples[:: max(len(watch.samples) // 40, 1)]]
    gaps = [after - at for out in good if len(out.finishes) == 1 for at, after in zip(out.times, out.times[1:], strict=False)]
    found.numbers = {
        "seconds": seconds, "server_cpu_s": served.cpu_seconds - cpu, "rss_warm": int(warm.most("rss")),
        "rss_most": int(watch.most("rss")),
        "rss_bound": bound, "rss_end": served.rss, "kv_most": int(watch.most("winnow_kv_bytes")), "kv_limit": limit,
        "active_most": watch.most("winnow_active_requests"), "queue_most": watch.most("winnow_queue_length"),
        "rss_mib_over_time": over_time, "first_token_s": percentiles([out.times[0] - out.begun for out in good]),
        "inter_token_s": percentiles(gaps),
        "tokens_s": found.counts["generated tokens"] / seconds,
    }  # fmt: skip
    return alone


def main() -> int:
    """Read the command line, soak, print."""
    asking = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asking.add_argument("--minutes", type=float, default=10)
    asking.add_argument("--clients", type=int, default=64)
    asking.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asking.add_argument("--kv-memory", default=KV_MEMORY)
    asking.add_argument("--seed", type=int, default=0)
    asking.add_argument("--out", type=Path, default=Path("winnow-out/soak"))
    asking.add_argument("--json", type=Path, help="write the counts to this file, too")
    asked = asking.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = wk.load("embedded", dtype=getattr(torch, asked.dtype))
    kinds, found = kinds_of(tokenizer, random.Random(asked.seed)), Found()
    log = asked.out / "serve.log"
    options = [
        "--dtype", asked.dtype, "--kv-memory", asked.kv_memory, "--max-rows", str(ROWS), "--queue", str(QUEUE),
        "--queue-deadline", str(60 * asked.minutes + LAST), "--request-timeout", str(60 * asked.minutes + LAST),
        "--store", str((asked.out / f"store-{time.time_ns()}").resolve()),
    ]  # fmt: skip
    with winnow_server(log, *options) as served:
        alone = asyncio.run(soak(served, kinds, asked, found, tokenizer))
        code = served.stop()
    if code:
        found.fault(f"the server ended with {code}: {served.tail()}")
    if "Traceback" in log.read_text(errors="replace"):
        found.fault(f"the server's log has a traceback: {log}")
    compare(found, kinds, alone, asked.dtype, tokenizer, model)
    for name, count in sorted(found.counts.items()):
        print(f" {name:32} {count:8,}")
    for name, value in found.numbers.items():
        print(f" {name:32} {value}")
    print(f"{asked.clients} clients in {asked.minutes:g} minutes, {found.counts['faults']} faults")
    if asked.json:
        about = {"command": "soak/serve", "seed": asked.seed, "minutes": asked.minutes, "clients": asked.clients}
        about |= {"dtype": asked.dtype, "counts": found.counts, "numbers": found.numbers, "faults": found.faults}
        asked.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
