"""A policy of your own in one file, used as an object and by its name. As a package with an entry point: own_policy/.

    python examples/own_policy.py
    python examples/own_policy.py --model Qwen/Qwen3-0.6B --file report.txt

It keeps what SnapKV would, but by attention times the size of the value: what is looked at and holds nothing may go.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import winnowkv as wk
from winnowkv.evaluate.needle.prompts import read_haystack
from winnowkv.policies.snapkv import PooledScorer, SnapKV


@dataclass(frozen=True, kw_only=True)
class ValueScorer(PooledScorer):
    """SnapKV's score of each token times the norm of its value, of order ``norm``."""

    norm: float

    def score(self, states: wk.LayerStates):
        scores = super().score(states)  # [1, KV heads, tokens that compete]: not negative, higher stays
        return scores * states.values[:, :, : scores.shape[-1]].float().norm(p=self.norm, dim=-1)


@wk.register_policy  # so that it has a name in this process
@dataclass(frozen=True, kw_only=True)
class ValueSnapKV(SnapKV):
    name: ClassVar[str] = "valuesnap"
    source: ClassVar[str] = "examples/own_policy.py"
    norm: float = 2.0

    def scorer(self, model: wk.ModelInfo, prompt: wk.PromptInfo) -> ValueScorer:
        return ValueScorer(**vars(super().scorer(model, prompt)), norm=self.norm)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, or the model that comes with winnowkv")
    parser.add_argument("--file", type=Path, help="a text to summarize")
    asked = parser.parse_args(arguments)
    text = asked.file.read_text(encoding="utf-8") if asked.file else read_haystack()[:2000]
    model, tokenizer = wk.load(asked.model)
    messages = [{"role": "user", "content": f"{text}\n\nSummarize this text in one sentence."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for policy in ("snapkv", ValueSnapKV(norm=1.0), "adakv:of=valuesnap:norm=1"):
        with wk.compress(model, policy, 0.25, tokenizer=tokenizer) as run:
            tokens = model.generate(**inputs.to(model.device), max_new_tokens=16, do_sample=False)
        print(f"\n{run.report.policy}, {run.report.kept_fraction:.0%} of {run.report.full_bytes / 2**20:.1f} MiB kept")
        print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
