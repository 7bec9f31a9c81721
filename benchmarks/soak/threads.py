"""A race of threads on one model: each gets what it would get alone, and the model comes back as it was.

Some threads read as ever, some in compress blocks of their own, some into caches of their own, some enter the block of another
thread, some give up in the middle of a forward pass, and one collects garbage all the time. Everything is compared with what
one thread computed before the race.

    python benchmarks/soak/threads.py [--minutes 12] [--threads 6] [--seed 0] [--json out.json]

Exits with 1 on any difference, error or hang.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import winnowkv as wk

POLICIES = (
    "winnow:observe=4:samples=16", "snapkv:observe=8", "streaming", "expected:observe=4:samples=16", "h2o",
    "adakv:of=snapkv:observe=4", "snapkv:observe=8:quantize=int8", "full",
)  # fmt: skip
BASES = ("sdpa", "eager")
PROMPTS, NEW, BUDGET = 6, 6, 24
HANG = 120  # seconds in which a thread must have finished what it began


class GaveUp(Exception):  # noqa: N818 - not an error of anybody's
    """A thread leaves a forward pass in the middle."""


def tiny(base: str) -> PreTrainedModel:
    """A seeded random model of two layers with this attention."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 128}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(num_hidden_layers=3, initializer_range=0.15, **sizes, **ends)
    model = LlamaForCausalLM(config).eval().double()  # float64: the order of sums changes no token
    model.set_attn_implementation(base)
    return model


class Race:
    """One model, its truths, and what the threads found.

    Parameters
    ----------
    base: the model's own attention. seed: of the threads' choices.
    """

    def __init__(self, base: str, seed: int) -> None:
        self.base, self.seed, self.model = base, seed, tiny(base)
        draw = torch.Generator().manual_seed(seed)
        self.prompts = [torch.randint(1, 128, (1, 20 + 13 * i), generator=draw) for i in range(PROMPTS)]
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.end = 0.0
        self.began: dict[str, float] = {}
        self._give_up = threading.local()
        self.model.model.layers[1].register_forward_pre_hook(self._maybe_give_up)
        self.truth: dict[tuple[str, int], list[int]] = {}
        for number in range(PROMPTS):
            self.truth["plain", number] = self.generate(number)
            for policy in POLICIES:
                with wk.compress(self.model, policy, BUDGET):
                    self.truth[policy, number] = self.generate(number)

    def generate(self, number: int, **options: Any) -> list[int]:
        """Greedy tokens after a prompt."""
        ids = self.prompts[number]
        output = self.model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
        tokens: list[int] = output[0, ids.shape[1] :].tolist()
        return tokens

    def _maybe_give_up(self, *_: Any) -> None:
        left = getattr(self._give_up, "left", None)
        if left is not None:
            self._give_up.left = left - 1
            if left == 0:
                raise GaveUp

    def compare(self, kind: str, number: int, tokens: list[int]) -> None:
        """Count a result, or note that it is another than alone."""
        self.counts[kind] += 1
        if tokens != self.truth[kind, number]:
            self.faults.append(f"{kind}, prompt {number}: {tokens}, alone {self.truth[kind, number]}")

    # What a thread may do; each takes its own source of choices.

    def plain(self, draw: random.Random) -> None:
        """Read as ever."""
        number = draw.randrange(PROMPTS)
        self.compare("plain", number, self.generate(number))

    def block(self, draw: random.Random) -> None:
        """Read some prompts in a block."""
        policy, numbers = draw.choice(POLICIES), [draw.randrange(PROMPTS) for _ in range(draw.randint(1, 3))]
        with wk.compress(self.model, policy, BUDGET) as run:
            for number in numbers:
                self.compare(policy, number, self.generate(number))
        told = [report.prompt_tokens for report in run.reports]
        if told != [[self.prompts[number].shape[1]] for number in numbers]:
            self.faults.append(f"{policy}: the block reports prompts {told} and read {numbers}")

    def own_cache(self, draw: random.Random) -> None:
        """Read into a cache of one's own, which is then left to the garbage collector, at times in a cycle."""
        policy, number = draw.choice(POLICIES), draw.randrange(PROMPTS)
        cache: Any = wk.CompactCache(self.model, policy, BUDGET)
        self.compare(policy, number, self.generate(number, past_key_values=cache))
        if draw.random() < 0.5:
            cache.itself = cache

    def joined(self, draw: random.Random) -> None:
        """Let a helper thread read in one's block, and leave it before the helper is done."""
        policy, number = draw.choice(POLICIES), draw.randrange(PROMPTS)
        entered = threading.Event()
        errors: list[BaseException] = []

        def help_out(run: wk.Run) -> None:
            try:
                with run.in_thread():
                    entered.set()
                    self.compare(policy, number, self.generate(number))
            except BaseException as error:
                errors.append(error)
                entered.set()

        with wk.compress(self.model, policy, BUDGET) as run:
            helper = threading.Thread(target=help_out, args=(run,))
            helper.start()
            entered.wait(HANG)
        helper.join(HANG)
        if errors or helper.is_alive():
            raise errors[0] if errors else RuntimeError("a helper hangs")

    def give_up(self, draw: random.Random) -> None:
        """Leave a forward pass in the middle: of a prompt or of a later token."""
        number = draw.randrange(PROMPTS)
        self._give_up.left = draw.randrange(3)
        try:
            if draw.random() < 0.5:
                with wk.compress(self.model, draw.choice(POLICIES), BUDGET):
                    self.generate(number)
            else:
                self.generate(number, past_key_values=wk.CompactCache(self.model, draw.choice(POLICIES), BUDGET))
        except GaveUp:
            self.counts["gave up"] += 1
        finally:
            self._give_up.left = None

    def work(self, name: str, number: int) -> None:
        """Do one after the other until the race ends."""
        draw = random.Random(f"{self.seed}-{number}")
        jobs: list[Callable[[random.Random], None]] = [self.plain, self.block, self.own_cache, self.joined, self.give_up]
        while time.monotonic() < self.end and not self.faults:
            job = draw.choice(jobs)
            self.began[name] = time.monotonic()
            try:
                job(draw)
            except BaseException as error:
                self.faults.append(f"{job.__name__}: {type(error).__name__}: {error}")
        del self.began[name]

    def collect(self) -> None:
        """Collect garbage until the race ends."""
        while time.monotonic() < self.end and not self.faults:
            gc.collect()
            time.sleep(0.02)

    def run(self, seconds: float, threads: int) -> None:
        """Race for so long, then look whether the model is as it was."""
        self.end = time.monotonic() + seconds
        names = {f"thread {number}": number for number in range(threads)}
        workers = [threading.Thread(target=self.work, args=pair, daemon=True) for pair in names.items()]
        workers.append(threading.Thread(target=self.collect, daemon=True))
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.2)
            late = [name for name, began in list(self.began.items()) if time.monotonic() - began > HANG]
            if late:
                self.faults.append(f"{', '.join(late)}: nothing happened for {HANG} s")
                return
        gc.collect()
        if self.model.config._attn_implementation != self.base or "generate" in vars(self.model):
            self.faults.append(f"the model's attention is {self.model.config._attn_implementation} afterwards, not {self.base}")


def race(minutes: float, threads: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Races on models of each attention in turn; what was counted, and faults."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for number, base in enumerate(BASES):
        one = Race(base, seed + number)
        one.run(60 * minutes / len(BASES), threads)
        counts.update(one.counts)
        if one.faults:
            return counts, [f"{base}: {fault}" for fault in one.faults]
    return counts, []


def main() -> int:
    """Read the command line, race, print."""
    asking = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asking.add_argument("--minutes", type=float, default=12)
    asking.add_argument("--threads", type=int, default=6)
    asking.add_argument("--seed", type=int, default=0)
    asking.add_argument("--json", type=Path, help="write the counts to this file, too")
    asked = asking.parse_args()
    warnings.filterwarnings("ignore", "a prompt is read without compression")  # plain threads beside open blocks: intended
    counts, faults = race(asked.minutes, asked.threads, asked.seed)
    for kind, count in sorted(counts.items()):
        print(f" {kind:32} {count:8,}")
    print(f"{sum(counts.values()):,} results in {asked.minutes:g} minutes by {asked.threads} threads, {len(faults)} faults")
    for fault in faults[:10]:
        print(f"  {fault}")
    if asked.json:
        about = {"command": "soak/threads", "seed": asked.seed, "minutes": asked.minutes, "threads": asked.threads}
        asked.json.write_text(json.dumps({**about, "counts": counts, "faults": faults}, indent=1) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
