"""A tiny random model with a tokenizer of words, and rows that `winnow eval` answers in seconds."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.models import VOCABULARY, tiny_model
from winnowkv.evaluate.tasks.run import Evaluation

ROWS = 8
# The fields of a line that depend on its row and setting; the rest are times, memory and versions, which differ between runs.
SAME = (
    "task", "row", "protocol", "policy", "budget", "prediction", "answers", "score", "metric", "failed", "prompt_tail",
    "prompt_tokens", "truncated_tokens", "kept_entries", "kept_bytes", "full_bytes", "held_bytes", "seed",
)  # fmt: skip


def write_model(folder: Path) -> Path:
    """The tiny Llama and its tokenizer, as a folder of transformers."""
    tiny_model("llama").save_pretrained(folder)
    words = {"[UNK]": 0, **{f"w{n}": n for n in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def write_rows(folder: Path, rows: int = ROWS) -> Path:
    """Rows of LongEval, of 62 tokens and more, with answers that a random model may hit."""
    prompts = [
        " ".join(f"w{(7 * n + 11 * row) % 120 + 1}" for n in range(60 + row)) + f"\nw{row + 1} w2" for row in range(rows)
    ]
    text = "".join(json.dumps({"prompt": prompt, "expected_number": row}) + "\n" for row, prompt in enumerate(prompts))
    (folder / "longeval").mkdir(parents=True)
    (folder / "longeval" / "lines_200.jsonl").write_text(text)
    return folder


def tiny_evaluation(folder: Path) -> Evaluation:
    """Five settings of the rows on the model, both written below ``folder``."""
    return Evaluation(
        tasks=("longeval",), policies=("full", "snapkv:observe=8", "streaming"), budgets=(0.5, 20),
        model=str(write_model(folder / "model")), data=str(write_rows(folder / "data")),
    )  # fmt: skip


def said(lines: Iterable[dict]) -> list[str]:
    """The contents of lines without times, in an order that does not depend on which came first."""
    return sorted(json.dumps({name: line.get(name) for name in SAME}, sort_keys=True) for line in lines)
