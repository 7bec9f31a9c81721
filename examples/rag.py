"""Questions about a long text: find its passages, read only these, keep a part of what was read, and name the sources.

    python examples/rag.py
    python examples/rag.py --model Qwen/Qwen3-0.6B --file report.txt "Who wrote it?" "When was it written?"

The index is TF-IDF over passages, in this process: it needs no second model, and a question about a fact shares its rare
words with the passage that states it. Compressed, the passages of several times as many questions fit in the same memory.
"""

import argparse
import re
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

import winnowkv as wk
from winnowkv.evaluate.needle.prompts import read_haystack, read_needles

QUESTIONS = ["What was the winning number of the village raffle?", "What is the capital of the kingdom of Zubravia?"]


def essays_with_facts() -> str:
    """Sixteen essays that come with winnowkv, 10,000 tokens, with eight facts hidden in them."""
    paragraphs = read_haystack().split("\n\n")
    for place, fact in enumerate(read_needles()):
        paragraphs[14 * place + 4] += f" {fact.needle}"
    return "\n\n".join(paragraphs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, or the model that comes with winnowkv")
    parser.add_argument("--file", type=Path, help="a text with blank lines between its paragraphs")
    parser.add_argument("--budget", type=float, default=0.12, help="the part of the passages' cache that is kept")
    asked = parser.parse_args(arguments)
    text = asked.file.read_text(encoding="utf-8") if asked.file else essays_with_facts()

    passages = re.split(r"(?<=.{60})\n\n+", text.strip())  # a heading, a short line, belongs to the paragraph after it
    words = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    index = NearestNeighbors(n_neighbors=min(5, len(passages)), metric="cosine").fit(words.fit_transform(passages))
    model, tokenizer = wk.load(asked.model)
    print(f"{len(passages)} passages, {len(tokenizer(text).input_ids)} tokens")
    for question in asked.questions:
        hits = index.kneighbors(words.transform([question]), return_distance=False)[0]
        found = "\n\n".join(passages[hit] for hit in sorted(hits))  # in the order of the text
        chat = [{"role": "user", "content": f"{found}\n\nBased on this text, question: {question}\nAnswer:"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with wk.compress(model, budget=asked.budget, tokenizer=tokenizer) as run:
            tokens = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
        read, mib = inputs["input_ids"].shape[1], [size / 2**20 for size in (run.report.kept_bytes, run.report.full_bytes)]
        print(f"\n{question}\n  {tokenizer.decode(tokens[0, read:], skip_special_tokens=True)}")
        print(f"  {read} tokens read, {mib[0]:.1f} of {mib[1]:.1f} MiB kept")
        print(*(f"  passage {hit + 1}: {passages[hit][:40]!r} ... {passages[hit][-60:]!r}" for hit in hits[:2]), sep="\n")


if __name__ == "__main__":
    main()
