"""Hugging Face's text-generation pipeline with a compressed cache: inside the block, all that it reads is compressed.

    python examples/pipeline.py
    python examples/pipeline.py --model Qwen/Qwen3-0.6B --file report.txt "Summarize this report in three sentences."

The pipeline is not changed, and after the block it is as it was. Whatever ends in model.generate() works like this.
"""

import argparse
from pathlib import Path

from transformers import pipeline

import winnowkv as wk
from winnowkv.evaluate.needle.prompts import read_haystack, read_needles

FACT = read_needles()[3]  # the month of a festival


def essay_with_a_fact() -> str:
    """The first of winnowkv's essays, 800 tokens, with one fact hidden in it."""
    paragraphs = read_haystack().split("\n\n")[:7]
    paragraphs[3] += f" {FACT.needle}"
    return "\n\n".join(paragraphs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default=FACT.question)
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, or the model that comes with winnowkv")
    parser.add_argument("--file", type=Path, help="the text to ask about")
    parser.add_argument("--budget", type=float, default=0.12, help="the part of the prompt's cache that is kept")
    asked = parser.parse_args(arguments)
    text = asked.file.read_text(encoding="utf-8") if asked.file else essay_with_a_fact()

    model, tokenizer = wk.load(asked.model)  # or any that you made with AutoModelForCausalLM.from_pretrained
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": f"{text}\n\nBased on this text, question: {asked.question}\nAnswer:"}]

    for budget in (1.0, asked.budget):
        with wk.compress(generator.model, budget=budget, tokenizer=generator.tokenizer) as run:
            (made,) = generator(chat, max_new_tokens=24, do_sample=False, return_full_text=False)
        print(f"\n{budget:.0%} kept: {made['generated_text'].strip()}\n{run.report}")


if __name__ == "__main__":
    main()
