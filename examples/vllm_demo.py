"""A stored document inside unmodified vLLM, beside the same document sent as text (``make vllm-demo``).

It reads a text with three facts in it once, stores a part of its cache as a context, starts vLLM's server with winnowkv's
connector and middleware, and asks about the facts through the OpenAI client: with the whole text as a message, with the whole
text once vLLM has it in its prefix cache, and on the context. A hint names the questions while the text is compressed: without
one, contexts with the same number of entries in all heads lose most single facts (docs/winnow-measurements.md).

    .venv-vllm/bin/python examples/vllm_demo.py [--budget 0.12] [--tokens 3584] [--out winnow-out/vllm-demo] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import winnowkv as wk
from winnowkv.cli.main import one_sentence
from winnowkv.cli.tables import ResultTable, keys, note, numbers, say
from winnowkv.contexts.context import CONTEXT_PARAM, Context
from winnowkv.contexts.export import VLLM_BLOCK, export_context, whole_blocks
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import SENTENCE_END, Needle, read_haystack, read_needles
from winnowkv.evaluate.report.machine import machine
from winnowkv.integrations.vllm.launch import server_command
from winnowkv.models.load import EMBEDDED
from winnowkv.prompt.chat import BEFORE_QUESTION
from winnowkv.report import MIB

if TYPE_CHECKING:
    from openai import OpenAI

POLICY = "winnow:equal=true"
FACTS = 3
NEW_TOKENS = 24  # at most, of one sentence
LONGEST_ANSWER = 62  # characters, which one line holds
KV_MEMORY = 512 * MIB
START_SECONDS = 240
FLAGS = (
    "--dtype", "bfloat16", "--max-model-len", "8192", "--kv-cache-memory-bytes", str(KV_MEMORY), "--enforce-eager",
    "--host", "127.0.0.1", "--uvicorn-log-level", "warning",
)  # fmt: skip
WAYS = ("text", "text, cached", "context")
COLUMNS = (
    *(("first token, s:" if way == "text" else "", way) for way in WAYS), ("KV, MiB:", "text"), ("", "context"),
)  # fmt: skip


def hidden(tokenizer: Any, facts: Sequence[str], tokens: int) -> str:
    """The beginning of the needle test's essays, so many tokens with the facts, which are spread over it."""
    book = read_haystack()
    offsets = tokenizer(book, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    taken = tokens - len(tokenizer(" ".join(facts), add_special_tokens=False).input_ids)
    if not 16 <= taken <= len(offsets):
        raise InputError(f"--tokens {tokens}: give {tokens - taken + 16} to {len(offsets)}")
    book = book[: offsets[taken - 1][1]]
    ends = [match.end() for match in SENTENCE_END.finditer(book)]
    for at, fact in reversed(list(enumerate(facts, 1))):
        place = max((end for end in ends if end <= len(book) * at / (len(facts) + 1)), default=0)
        book = f"{book[:place]}{fact} {book[place:]}"
    return book


def store_document(text: str, hint: str, budget: float, place: Path) -> tuple[Context, float]:
    """Read, compress and store a text; the context, and the seconds of it."""
    begin = time.perf_counter()
    model, tokenizer = wk.load(EMBEDDED, dtype=torch.bfloat16)
    tokens = len(tokenizer(text).input_ids)
    doc = wk.read(model, tokenizer, text, POLICY, whole_blocks(tokens, budget), hint=hint)
    return export_context(doc, place, name="the demo's document"), time.perf_counter() - begin


@contextmanager
def server(store: Path, log: Path) -> Iterator[str]:
    """vLLM's server with the connector until the block is left; yields its address. Raises InputError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = server_command(EMBEDDED, str(store), [*FLAGS, "--port", str(port)])
    # vLLM's server and its engine are two processes: one thread each, and no cores of their own.
    own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command.arguments, stdout=output, stderr=output, env={**own, **os.environ, **command.environment},
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address
    finally:
        stop(process)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers. Raises InputError if it ended, or took too long."""
    begin = time.monotonic()
    while time.monotonic() - begin < START_SECONDS:
        if process.poll() is not None:
            raise InputError(f"vLLM ended with {process.returncode} before it served anything: its output is in {log}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            pass  # not yet
        time.sleep(0.5)
    raise InputError(f"vLLM did not answer within {START_SECONDS} seconds: its output is in {log}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its engine."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def ask(client: OpenAI, messages: str, body: dict[str, Any]) -> dict[str, Any]:
    """One chat request: the answer, seconds to its first token, and the tokens of prompt and answer."""
    begin, first, text, usage = time.perf_counter(), None, "", None
    stream = client.chat.completions.create(
        model=EMBEDDED, messages=[{"role": "user", "content": messages}], temperature=0, max_tokens=NEW_TOKENS, stop=["."],
        stream=True, stream_options={"include_usage": True}, extra_body=body,
    )  # fmt: skip
    for event in stream:
        usage = event.usage or usage
        piece = event.choices[0].delta.content if event.choices else None
        if piece:
            first = first or time.perf_counter() - begin
            text += piece
    assert usage is not None
    return {"answer": " ".join(text.split()), "first_s": first, "tokens": usage.prompt_tokens + usage.completion_tokens}


def ask_all(client: OpenAI, text: str, context: Context, needles: Sequence[Needle]) -> list[dict[str, Any]]:
    """Each question in each of the three ways.

    A ``cache_salt`` of its own keeps a request from what vLLM has in its prefix cache; the second way takes the salt of another
    question's first request, so that the document is there and the question is not.
    """
    whole = [f"{text.rstrip()}{BEFORE_QUESTION}{needle.question}" for needle in needles]
    ask(client, "Say yes.", {})  # the first request warms vLLM up
    rows = []
    for way in WAYS:
        for number, needle in enumerate(needles):
            other = (number + 1) % len(needles)
            body, said = {
                "text": ({"cache_salt": f"text {number}"}, whole[number]),
                "text, cached": ({"cache_salt": f"text {other}"}, whole[number]),
                "context": ({CONTEXT_PARAM: context.id}, needle.question),
            }[way]
            found = ask(client, said, body)
            right = needle.answer.casefold() in found["answer"].casefold()
            rows.append({"question": number + 1, "way": way, **found, "right": right})
    return rows


def token_bytes(context: Context) -> int:
    """Bytes of keys and values of one token in all layers."""
    header = context.header
    return 2 * header.layers * header.kv_heads * header.head_dim * torch.bfloat16.itemsize


def show(
    rows: Sequence[dict[str, Any]], context: Context, needles: Sequence[Needle], seconds: dict[str, float], release: str
) -> None:
    """Print everything on one screen of 80 columns."""
    size = token_bytes(context)
    say(
        f"A text of {context.seen} tokens, SmolLM2-135M in bfloat16, {machine()['cores']} cores. "
        f"Read, compressed (the questions are its hint) and stored in {seconds['store']:.0f} s: {context.kept} tokens of each "
        f"layer and head, {context.bytes / MIB:.1f} MiB. vLLM {release} started in {seconds['start']:.0f} s."
    )
    table = ResultTable([*keys("question"), *numbers(f"{what}\n{way}" for what, way in COLUMNS)])
    for number, needle in enumerate(needles, 1):
        say(f"{number}: {needle.question}")
        mine = {row["way"]: row for row in rows if row["question"] == number}
        for way in ("text", "context"):
            answer = mine[way]["answer"]
            short = answer if len(answer) <= LONGEST_ANSWER else f"{answer[: LONGEST_ANSWER - 4]} ..."
            say(f" {way}, {'right' if mine[way]['right'] else 'wrong'}: {short}")
        kept = {way: -(-row["tokens"] // VLLM_BLOCK) * VLLM_BLOCK * size / MIB for way, row in mine.items()}
        waited = (f"{mine[way]['first_s']:.2f}" for way in WAYS)
        table.add(str(number), *waited, *(f"{kept[way]:.1f}" for way in ("text", "context")))
    table.print()
    right = {way: sum(row["right"] for row in rows if row["way"] == way) for way in WAYS}
    firsts = {way: sorted(row["first_s"] for row in rows if row["way"] == way)[len(needles) // 2] for way in WAYS}
    first, again, ours = (firsts[way] for way in WAYS)
    note(
        f"right of {len(needles)}: text {right['text']}, context {right['context']}; median first token {first:.2f} s, with "
        f"the text in vLLM's prefix cache {again:.2f} s, on the context {ours:.2f} s: {first / ours:.0f} and "
        f"{again / ours:.1f} times as soon"
    )
    note(f"KV: whole blocks of {VLLM_BLOCK} tokens of prompt and answer, counted from vLLM's usage and the model's config")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3584)
    parser.add_argument("--budget", type=float, default=0.12, help="share of the tokens that stays, in whole blocks")
    parser.add_argument("--out", type=Path, default=Path("winnow-out/vllm-demo"), help="folder of the store and vLLM's log")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    from openai import OpenAI  # in vLLM's environment only

    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then, too
    args.out.mkdir(parents=True, exist_ok=True)
    needles = read_needles()[:FACTS]
    _, tokenizer = wk.load(EMBEDDED)
    text = hidden(tokenizer, [needle.needle for needle in needles], args.tokens)
    hint = " ".join(needle.question for needle in needles)
    context, seconds = store_document(text, hint, args.budget, args.out / "store")
    begin = time.perf_counter()
    with server(args.out / "store", args.out / "vllm.log") as address:
        took = {"store": seconds, "start": time.perf_counter() - begin}
        rows = ask_all(OpenAI(base_url=f"{address}/v1", api_key="none"), text, context, needles)
    if args.json:
        print(json.dumps({"rows": rows, "context": context.id, "kept": context.kept, "seen": context.seen, **took}, indent=2))
        return
    show(rows, context, needles, took, version("vllm-cpu"))


if __name__ == "__main__":
    with one_sentence("vllm_demo"):
        main()
