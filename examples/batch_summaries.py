"""Summaries of many texts: as many at once as fit in the memory that you give, each printed as it finishes.

    python examples/batch_summaries.py
    python examples/batch_summaries.py --model Qwen/Qwen3-0.6B --kv-memory 2GiB reports/*.txt

A prompt is read alone, compressed, and decodes together with the others. The next one is read as soon as its bytes fit.
"""

import argparse
import time
from pathlib import Path

import winnowkv as wk
from winnowkv.evaluate.needle.prompts import read_haystack


def essays(count: int) -> dict[str, str]:
    """The first of the essays that come with winnowkv, some 650 tokens each, by their titles."""
    paragraphs = read_haystack().split("\n\n")
    starts = [at for at, paragraph in enumerate(paragraphs) if len(paragraph) < 60]  # the titles
    ends = [*starts[1:], len(paragraphs)]
    return {paragraphs[a]: "\n\n".join(paragraphs[a:b]) for a, b in list(zip(starts, ends, strict=True))[:count]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="texts; without any, essays that come with winnowkv")
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, or the model that comes with winnowkv")
    parser.add_argument("--budget", type=float, default=0.25, help="the part of each prompt's cache that is kept")
    parser.add_argument("--kv-memory", default="32MiB", help="most memory for all keys and values")
    parser.add_argument("--new", type=int, default=48, help="most tokens of a summary")
    asked = parser.parse_args(arguments)
    texts = {file.name: file.read_text(encoding="utf-8") for file in asked.files} or essays(6)

    model, tokenizer = wk.load(asked.model)
    engine = wk.Engine(model, tokenizer, budget=asked.budget, kv_memory=asked.kv_memory)
    sampling = wk.Sampling(max_new_tokens=asked.new)  # the most likely token, without a temperature
    waiting = {}
    for name, text in texts.items():
        messages = [{"role": "user", "content": f"{text}\n\nSummarize this text in one sentence."}]
        waiting[engine.submit(messages, sampling)] = name

    began, most, full = time.perf_counter(), 0, 0
    while waiting:
        for event in engine.step():
            if done := event.finished:
                print(f"{time.perf_counter() - began:5.1f} s  {waiting.pop(event.request)}: {done.text.strip() or done.error}")
                full += done.report.full_bytes
        most = max(most, engine.held_bytes)
    print(f"\n{len(texts)} texts, at most {most / 2**20:.1f} MiB held; their whole caches together: {full / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
