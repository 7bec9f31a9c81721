"""One text, many questions: read and compressed once, saved, opened again, and asked as often as one likes.

    python examples/many_questions.py
    python examples/many_questions.py --file report.txt --model Qwen/Qwen3-0.6B "Who wrote it?" "When was it written?"

No question is known while the text is read. So the model reads it twice (study="lean"), and keeps what it looked at then.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import winnowkv as wk
from winnowkv.evaluate.needle.prompts import read_haystack, read_needles

FACTS = read_needles()[2:5]  # a winning number, a month, a capital


def essay_with_facts() -> str:
    """The first of winnowkv's essays, 850 tokens, with three facts hidden in it."""
    paragraphs = read_haystack().split("\n\n")[:7]
    for place, fact in zip((2, 4, 5), FACTS, strict=True):
        paragraphs[place] += f" {fact.needle}"
    return "\n\n".join(paragraphs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", default=[fact.question for fact in FACTS])
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, or the model that comes with winnowkv")
    parser.add_argument("--file", type=Path, help="the text to ask about")
    parser.add_argument("--budget", type=float, default=0.25, help="the part of the text's cache entries that is kept")
    asked = parser.parse_args(arguments)
    text = asked.file.read_text(encoding="utf-8") if asked.file else essay_with_facts()

    model, tokenizer = wk.load(asked.model)
    doc = wk.read(model, tokenizer, text, budget=asked.budget, study="lean")
    report = doc.report
    print(f"{doc.text_tokens} tokens read in {report.prefill_seconds:.1f} s, studied in {report.study_seconds:.1f} s")
    print(f"{doc.held_bytes / 2**20:.1f} of {report.full_bytes / 2**20:.1f} MiB held")

    with TemporaryDirectory() as folder:
        file = Path(folder) / "text.winnow"
        doc.save(file)
        print(f"saved: {file.stat().st_size / 2**20:.1f} MiB")
        doc = wk.open_document(file, model, tokenizer)  # in any other process, too

    for question in asked.questions:
        answer = doc.ask(question, max_new_tokens=24)  # the document stays as it was read
        print(f"\n{question}\n  {answer.text.strip()}")
        print(
            f"  first token after {answer.first_token_seconds:.2f} s: {answer.question_tokens} tokens were read, not the text"
        )


if __name__ == "__main__":
    main()
