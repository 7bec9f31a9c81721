"""What does compression cost on your own prompts? Name the cheapest policy and budget that keeps the model's answers.

    python examples/own_data.py
    python examples/own_data.py --prompts mine.jsonl --model Qwen/Qwen3-0.6B --policies winnow,snapkv,int8 --keep 0.99

Rows are {"prompt": "..."}; no labels are needed. The full cache answers first, then every compressed cache is led along that
answer, and it is counted how often its own next token is the same. `winnow audit` does the same on the command line.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import winnowkv as wk
from winnowkv.evaluate.audit.audit import Audit, file_prompts, identity, run
from winnowkv.evaluate.audit.recommend import mebibytes, name_of, share_of, write_summary
from winnowkv.evaluate.needle.prompts import read_haystack
from winnowkv.evaluate.report.store import ResultStore


def write_prompts(file: Path, count: int = 4) -> Path:
    """Paragraphs of winnowkv's essays to be summarized, as the rows of a file."""
    long = [part for part in read_haystack().split("\n\n") if len(part) > 60]
    texts = ["\n\n".join(long[6 * at : 6 * at + 2]) for at in range(count)]
    rows = [json.dumps({"prompt": f"{text}\n\nSummarize this text in one sentence."}) for text in texts]
    file.write_text("\n".join(rows), encoding="utf-8")
    return file


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, help='JSONL with rows {"prompt": "..."}')
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, or the model that comes with winnowkv")
    parser.add_argument("--policies", default="winnow,snapkv", help="separated by commas")
    parser.add_argument("--budgets", default="0.25,0.5", help="separated by commas")
    parser.add_argument("--keep", type=float, default=0.8, help="the part of the tokens that must stay the same")
    parser.add_argument("--new", type=int, default=32, help="most tokens of an answer")
    asked = parser.parse_args(arguments)

    model, tokenizer = wk.load(asked.model)
    budgets = [float(budget) for budget in asked.budgets.split(",")]
    with TemporaryDirectory() as folder:
        prompts = file_prompts(asked.prompts or write_prompts(Path(folder) / "prompts.jsonl"))
        audit = Audit(prompts, asked.policies.split(","), budgets, chat=True, max_new_tokens=asked.new)
        config = audit.config(model, asked.model, model.dtype)
        store = ResultStore(Path(folder) / "audit", config, identity)
        run(audit, model, tokenizer, store, advance=lambda prompt: None)
        summary = write_summary(store, audit.expected(), asked.keep, config)
        store.close()

    for group in summary["groups"]:
        print(f"{name_of(group):15} {share_of(group)} of the tokens are the same, {mebibytes(group['kept_bytes'])} MiB kept")
    print(summary["recommendation"]["sentence"])


if __name__ == "__main__":
    main()
