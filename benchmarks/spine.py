"""What compression costs prefill, and what it leaves of decode time, against plain transformers.

One process, runs interleaved, medians and ratios of pairs. Plain prefill is the model as it
is loaded (SDPA, dynamic cache). Native decode is plain transformers on a context as long as
what the policies keep; every decode step of ours stands next to one of theirs.

    python benchmarks/spine.py [--length 3000] [--budget 0.12] [--rounds 7] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import winnowkv as wk
from winnowkv.engine import prefill
from winnowkv.evaluate.machine import machine, versions
from winnowkv.evaluate.prompts import read_haystack

POLICIES = ("full", "random", "streaming", "snapkv", "pyramidkv", "windowkv", "dynamickv")


def seconds(work) -> tuple[float, object]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--length", type=int, default=3000)
    parser.add_argument("--budget", default="0.12")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("winnow-out/spine.json"))
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = wk.load(args.model)
    ids = tokenizer(read_haystack(), return_tensors="pt").input_ids[:, : args.length].to(model.device)
    kept = wk.Budget.of(args.budget).entries(args.length)

    def plain(tokens):
        return model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def ours(policy):
        cache = wk.CompactCache(model, policy, args.budget, task="localization")
        prefill(model, ids, cache)
        return cache

    def step(cache):
        return lambda: model(ids[:, -1:], past_key_values=cache, use_cache=True)

    # Every policy's prefill stands beside a plain one of its own, first and second in turn: the machine drifts.
    pairs: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    spent: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    plain(ids)  # warm up
    for round_ in track(range(args.rounds), description="prefill", console=Console(stderr=True)):
        for policy in POLICIES:

            def timed_ours(policy=policy):
                took, cache = seconds(lambda: ours(policy))
                spent[policy].append(cache.report.compress_seconds)
                return took  # the cache dies here: while one lives, plain runs would go through our function

            if round_ % 2:
                mine = timed_ours()
                pairs[policy].append((mine, seconds(lambda: plain(ids))[0]))
            else:
                theirs = seconds(lambda: plain(ids))[0]
                pairs[policy].append((timed_ours(), theirs))
    table = Table(title=f"Prefill of {args.length} tokens, budget {args.budget}, {args.rounds} interleaved pairs a policy")
    for column in ("", "median s", "over plain (median of pairs)", "least", "most", "compression s"):
        table.add_column(column, justify="right")
    result = {"machine": machine(), "versions": versions(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    result["prefill"] = {}
    for name, times in pairs.items():
        ratios = [ours_s / plain_s for ours_s, plain_s in times]
        row = {
            "median_s": median(t[0] for t in times),
            "plain_median_s": median(t[1] for t in times),
            "ratio": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "compress_s": median(spent[name]),
        }
        result["prefill"][name] = row
        shown = (f"{row[key]:.3f}" for key in ("median_s", "ratio", "ratio_min", "ratio_max", "compress_s"))
        table.add_row(name, *shown)
    Console().print(table)

    # Decode: the native context is as long as what the policies keep. Plain transformers runs its own attention
    # only while no compact cache lives, so theirs goes through our function, which hands it on to the framework's;
    # the hand-over is a dictionary look-up a layer.
    native = plain(ids[:, :kept])
    whole = plain(ids)
    caches = {"native": native, "whole": whole, **{policy: ours(policy) for policy in POLICIES if policy != "full"}}
    caches["full"] = ours("full")
    steps: dict[str, list[float]] = {name: [] for name in caches}
    for _ in track(range(args.steps + 5), description="decode", console=Console(stderr=True)):
        for name, cache in caches.items():
            steps[name].append(1000 * seconds(step(cache))[0])
    table = Table(title=f"Decode, {args.steps} interleaved steps, native context {kept} tokens, whole context {args.length}")
    for column in ("", "median ms/token", "over native", "over transformers' whole context"):
        table.add_column(column, justify="right")
    result["decode"] = {}
    for name, times in steps.items():
        times = times[5:]
        against = {other: median(a / b for a, b in zip(times, steps[other][5:], strict=True)) for other in ("native", "whole")}
        result["decode"][name] = {"median_ms": median(times), "over_native": against["native"], "over_whole": against["whole"]}
        table.add_row(name, f"{median(times):.1f}", f"{against['native']:.3f}", f"{against['whole']:.3f}")
    Console().print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
