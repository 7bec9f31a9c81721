"""A chat that remembers, in a cache that does not grow: what it was told at first stays, the turns after it are bounded.

    python examples/chat_with_memory.py                       # plays a few turns
    python examples/chat_with_memory.py --talk                # you talk; an empty line ends it
    python examples/chat_with_memory.py --talk --model Qwen/Qwen3-0.6B --file about_me.txt

The first text is kept whole (budget=1.0). Of all questions and answers --turn-budget entries stay for each head: the newest
32, and those that the newest words look at. doc.compact() takes away more when a conversation rests.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import winnowkv as wk

ABOUT = (
    "Ada lives in the town of Amberfield. Her dog is called Bramble. She works as a baker, and gets up at four in the morning. "
    "She does not eat fish. On Sundays she rides her red bicycle along the canal."
)
TURNS = [
    "What color is Ada's bicycle?",
    "Write a short story about a baker.",
    "Write a short story about a dog.",
    "Where does Ada live?",
]


def typed() -> Iterator[str]:
    """Lines from the keyboard, until an empty one."""
    while line := input("\n> ").strip():
        yield line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--talk", action="store_true", help="read questions from the keyboard")
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, or the model that comes with winnowkv")
    parser.add_argument("--file", type=Path, help="what the chat shall know from the start")
    parser.add_argument("--turn-budget", type=int, default=64, help="entries of the turns that are kept, 64 at least")
    parser.add_argument("--new", type=int, default=64, help="most tokens of an answer")
    asked = parser.parse_args(arguments)

    model, tokenizer = wk.load(asked.model)
    about = asked.file.read_text(encoding="utf-8") if asked.file else ABOUT
    doc = wk.read(model, tokenizer, about, budget=1.0, decode_budget=asked.turn_budget)
    for question in typed() if asked.talk else TURNS:
        answer = doc.chat(question, max_new_tokens=asked.new)
        print(answer if asked.talk else f"\n> {question}\n{answer}")
        said = len(doc.ids) - doc.text_tokens
        print(f"  [{said} tokens of turns, {doc.turn_entries} of their entries held, {doc.held_bytes / 2**20:.1f} MiB]")

    doc.compact(64)
    print(f"\nAt rest: {doc.turn_entries} entries of turns, {doc.held_bytes / 2**20:.1f} MiB. doc.save(path) would keep it.")


if __name__ == "__main__":
    main()
