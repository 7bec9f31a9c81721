"""Needles asked on stored contexts: through vLLM and by our own engine from the same entries. Are as many found?

Texts of ``--lengths`` tokens in turn, one needle each, at depths 0.1, 0.3, 0.5, 0.7, 0.9 in turn. Each is read and compressed
once with its question as the hint (``--policy``, ``--budget``, raised to whole blocks), asked by the document itself, stored,
and asked again by a request on the context, all of them at once. The default needles are those that no policy was tuned on.

    make .venv-vllm/done
    .venv-vllm/bin/python benchmarks/vllm_needles.py [--texts 12] [--lengths 2000,3000,5000,7000] [--full] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import winnowkv as wk
from winnowkv.budget import Budget
from winnowkv.contexts.context import ContextPrompt
from winnowkv.contexts.export import export_context, whole_blocks
from winnowkv.contexts.store import ContextStore
from winnowkv.evaluate.needle.prompts import Needle, PromptBuilder, read_haystack, read_needles
from winnowkv.integrations.vllm.options import transfer_config
from winnowkv.models.load import model_folder
from winnowkv.prompt.chat import open_turn

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
HERE = Path(__file__).parent
Line = dict[str, Any]


def texts(tokenizer: Any, args: argparse.Namespace) -> Iterator[tuple[Needle, float, str]]:
    """A needle, its depth and the text around it."""
    builder, needles = PromptBuilder(tokenizer, read_haystack(), chat=True), read_needles(args.needles)
    for at in range(args.texts):
        needle, depth, length = needles[at % len(needles)], DEPTHS[at % len(DEPTHS)], args.lengths[at % len(args.lengths)]
        take = min(length, builder.haystack_tokens)
        yield needle, depth, builder._hide(needle.needles, take - len(tokenizer(needle.needle).input_ids), depth)


def stored(args: argparse.Namespace, store: ContextStore) -> Iterator[tuple[Line, ContextPrompt, list[int]]]:
    """What our own engine answers, the request on the stored context, and the whole prompt."""
    model, tokenizer = wk.load("embedded", dtype=torch.float32)
    for needle, depth, text in texts(tokenizer, args):
        begin, ids = time.perf_counter(), open_turn(tokenizer, text, chat=True)
        budget = whole_blocks(len(ids), args.budget)
        document = wk.read(model, tokenizer, text, args.policy, budget, hint=needle.question)
        answer = document.ask(needle.question, args.new_tokens)
        context = export_context(document, store)
        prompt = context.ask(tokenizer, needle.question)
        line = {"needle": needle.needle, "depth": depth, "answer": needle.answer, "tokens": context.seen, "kept": context.kept,
                "ours": answer.text, "ours_tokens": answer.tokens, "read_seconds": time.perf_counter() - begin}  # fmt: skip
        yield line, prompt, [*ids, *prompt.ids[context.kept :]]


def ask_vllm(args: argparse.Namespace, store: ContextStore, prompts: list[ContextPrompt], whole: list[list[int]]) -> list[Any]:
    """The outputs of the requests on contexts, then those of the whole prompts."""
    import vllm

    longest = max(len(ids) for ids in [*(prompt.ids for prompt in prompts), *whole]) + args.new_tokens
    engine = vllm.LLM(
        model=str(model_folder("embedded", torch.float32)), dtype="float32", max_model_len=longest + 1, enforce_eager=True,
        kv_cache_memory_bytes=args.memory << 20,
        kv_transfer_config=transfer_config(store.place),
    )  # fmt: skip
    outputs = []
    for requests, extra in (
        ([prompt.inputs for prompt in prompts], [prompt.extra_args for prompt in prompts]),
        ([{"prompt_token_ids": ids} for ids in whole], [None] * len(whole)),
    ):
        if requests:
            sampling = [vllm.SamplingParams(temperature=0, max_tokens=args.new_tokens, extra_args=each) for each in extra]
            outputs += engine.generate(requests, sampling, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--needles", type=Path, default=HERE / "needles_report.jsonl", help="JSONL: needle, question, answer")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--lengths", default="2000,3000,5000,7000", help="tokens of a text, in turn")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--budget", default="0.12")
    parser.add_argument("--new-tokens", type=int, default=28)
    parser.add_argument("--memory", type=int, default=1024, help="MiB of vLLM's KV cache")
    parser.add_argument("--full", action="store_true", help="also ask vLLM with the whole text")
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")
    args = parser.parse_args()
    args.lengths, args.budget = [int(each) for each in args.lengths.split(",")], Budget.of(json.loads(args.budget))
    return args


def main() -> None:
    args = parse()
    for name, value in (("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("VLLM_NO_USAGE_STATS", "1")):
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        store = ContextStore(folder)
        lines, prompts, whole = zip(*stored(args, store), strict=True)
        outputs = ask_vllm(args, store, list(prompts), list(whole) if args.full else [])
    for at, line in enumerate(lines):
        output = outputs[at]
        line |= {"vllm": output.text, "finish_reason": output.finish_reason}
        line["same_tokens"] = [*output.token_ids][: len(line["ours_tokens"])] == line["ours_tokens"]
        engines = ["ours", "vllm"]
        if args.full:
            line["whole"] = outputs[len(lines) + at].text
            engines.append("whole")
        line["found"] = {engine: line["answer"].lower() in line[engine].lower() for engine in engines}
        if args.json:
            print(json.dumps(line))
    counts = {engine: sum(line["found"][engine] for line in lines) for engine in lines[0]["found"]}
    sizes = sorted({line["tokens"] for line in lines})
    print(f"{len(lines)} texts of {sizes[0]} to {sizes[-1]} tokens, {args.policy} at {args.budget}, float32: found {counts}; "
          f"same tokens in {sum(line['same_tokens'] for line in lines)} of {len(lines)}")  # fmt: skip


if __name__ == "__main__":
    main()
