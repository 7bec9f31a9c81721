"""Random requests to random engines, each compared with the same request alone: no other token, no byte kept.

A round is one engine (a tiny random model, a policy, a budget, chunks, rows, memory) and a dozen requests that come at random
steps, some of them bad, some with several choices, some cancelled, some over a token whose embedding is not a number. Alone is
the same engine with nothing else in it; greedy answers are also those of ``model.generate`` in a compress block. Models are in
float64, so that a draw never depends on the last bit of a sum.

    python benchmarks/soak/engine.py [--count 1000] [--seed 0] [--json out.json]

Round ``i`` is that of seed ``SEED + i``: a mismatch prints the command that repeats its round. Exits with 1 on a mismatch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import winnowkv as wk
from winnowkv.errors import WinnowError

VOCABULARY, POSITIONS = 128, 640
BROKEN = VOCABULARY - 1  # the token whose embedding is not a number
LONGEST = 300  # tokens of a prompt
FEWEST, MOST = 4, 16  # requests of a round
POLICIES = (
    "winnow", "winnow:observe=4:samples=16:least=4", "winnow:observe=context:samples=16", "expected:observe=4:samples=16",
    "snapkv:observe=8", "pyramidkv:observe=4:sinks=2", "dynamickv:observe=4:every=2", "h2o", "tova", "cake:observe=4",
    "adakv:of=snapkv:observe=4", "adakv:of=expected:observe=4:samples=16", "criticalkv:of=snapkv:observe=4",
    "chunkkv:chunk=4:of=snapkv:observe=4", "compresskv:observe=4:heads=random:3:budgets=uniform",
    "windowkv:observe=4:window=4:top=2:group=2", "defensivekv:observe=6:sinks=2", "keydiff", "knorm", "lagkv:lag=8",
    "streaming", "random:sinks=2:observe=3", "full",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One request: its prompt, how it is continued, the step at which it comes, and when a choice of it (None: all) goes."""

    prompt: list[Any]
    sampling: wk.Sampling
    kind: str
    at: int = 0
    cancel_at: int | None = None
    cancel: int | None = None


@dataclass
class Found:
    """What a run has counted so far; ``mismatches`` are sentences, each with the command that repeats it."""

    requests: int = 0
    choices: int = 0
    rounds: int = 0
    mismatches: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    policies: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@cache
def tiny(family: str) -> PreTrainedModel:
    """A seeded model of a few layers: ``llama``, or ``gemma3`` with sliding windows between layers of full attention."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "initializer_range": 0.15, "bos_token_id": None,
        "eos_token_id": 3, "pad_token_id": 0, "attn_implementation": "sdpa",
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if family == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes))
        else:
            kinds = ["sliding_attention", "full_attention"] * 2
            more = {
                "num_hidden_layers": 4,
                "head_dim": 16,
                "query_pre_attn_scalar": 4,
                "sliding_window": 16,
                "layer_types": kinds,
            }
            model = Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **more}, tie_word_embeddings=False))
    model = model.eval().double()
    model.get_input_embeddings().weight.data[BROKEN] = float("nan")
    return model


@cache
def words() -> PreTrainedTokenizerFast:
    """A word for each token."""
    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


def draw_engine(draw: random.Random) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, and an engine's settings."""
    budget = draw.choice([draw.randint(8, 90), round(draw.uniform(0.01, 0.9), 2), 0.12])
    chunk = draw.choice([None, None, 64, 96])
    settings = {
        "policy": draw.choice(POLICIES), "budget": budget, "task": draw.choice([None, "localization", "aggregation"]),
        "max_rows": draw.choice([2, 5, 8, 8]), "kv_memory": draw.choice([None, None, draw.randint(2**17, 2**20)]),
        "prefill_chunk": chunk, "prefill_ceiling": draw.choice([None, 100, 0.6]) if chunk else None,
    }  # fmt: skip
    return tiny(draw.choice(["llama", "llama", "gemma3"])), settings


def draw_request(draw: random.Random, step: int) -> Asked:
    """One request, most of them good."""
    kind = draw.choices(["good", "broken", "bad"], [84, 8, 8])[0]
    prompt: list[Any] = [draw.randrange(4, BROKEN) for _ in range(draw.randint(1, LONGEST))]
    if kind == "broken":
        prompt[draw.randrange(len(prompt))] = BROKEN
    if kind == "bad":
        prompt = draw.choice([[], [*prompt, VOCABULARY + 4], [5] * (POSITIONS + 1), [1.5, 2.5]])
    hot = draw.random() < 0.6
    new = draw.randint(1, 24)
    sampling = wk.Sampling(
        max_new_tokens=new,
        min_new_tokens=draw.choice([0, 0, draw.randint(0, new)]),
        temperature=draw.choice([0.7, 1.5, 3.0]) if hot else 0.0,
        top_p=draw.choice([1.0, 0.8]) if hot else 1.0,
        top_k=draw.choice([0, 20]) if hot else 0,
        seed=draw.randrange(1000) if hot else None,
        stop=draw.choice([(), (), (f"w{draw.randrange(VOCABULARY)}", f"w{draw.randrange(VOCABULARY)} w")]),
        logprobs=draw.choice([None, None, 2]),
        ignore_eos=draw.random() < 0.3,
        n=draw.choice([1, 1, 1, 2, 3, 5]),
    )
    cancelled = draw.random() < 0.2
    which = draw.choice([None, draw.randrange(sampling.n)])
    return Asked(prompt, sampling, kind, step, step + draw.randint(0, 12) if cancelled else None, which if cancelled else None)


def together(engine: wk.Engine, asked: Sequence[Asked]) -> list[wk.Completion | WinnowError]:
    """What each request ends with if they come and go at their steps; the error of one that is not accepted."""
    running: dict[int, wk.Request | WinnowError] = {}
    step = 0
    while len(running) < len(asked) or engine.waiting or engine.active:
        for number, one in enumerate(asked):
            if number not in running and one.at <= step:
                try:
                    running[number] = engine.submit(one.prompt, one.sampling)
                except WinnowError as error:
                    running[number] = error
            request = running.get(number)
            if isinstance(request, wk.Request) and one.cancel_at == step:
                engine.cancel(request, one.cancel)
        engine.step()
        if engine.kv_memory is not None and engine.held_bytes > engine.kv_memory:
            raise AssertionError(f"{engine.held_bytes} bytes are held, kv_memory is {engine.kv_memory}")
        step += 1
    ended = [request if isinstance(request, WinnowError) else request.completion for _, request in sorted(running.items())]
    return [one for one in ended if one is not None]


def in_block(model: PreTrainedModel, settings: dict[str, Any], one: Asked) -> list[int]:
    """The tokens that ``model.generate`` gives in a compress block, without end token."""
    limit = one.sampling.max_new_tokens
    ids = torch.tensor([one.prompt])
    with wk.compress(model, settings["policy"], settings["budget"], task=settings["task"], tokenizer=words()):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
    return out[0, len(one.prompt) :].tolist()


def differences(got: wk.Completion, truth: wk.Completion, cancelled: bool) -> str | None:
    """What a choice has other than alone; None if it is the same. A cancelled one may have ended anywhere on the way."""
    if cancelled and got.finish_reason == "cancelled":
        if got.tokens != truth.tokens[: len(got.tokens)] or not truth.text.startswith(got.text):
            return f"cancelled with tokens {got.tokens} and text {got.text!r}, alone {truth.tokens} and {truth.text!r}"
        return None
    for name in ("finish_reason", "tokens", "text"):
        mine, theirs = getattr(got, name), getattr(truth, name)
        if mine != theirs:
            return f"{name} {mine!r}, alone {theirs!r}"
    if (str(got.error), type(got.error)) != (str(truth.error), type(truth.error)):
        return f"error {got.error!r}, alone {truth.error!r}"
    if [entry.token for entry in got.logprobs or []] != [entry.token for entry in truth.logprobs or []]:
        return "log probabilities of other tokens"
    return None


def check(
    got: wk.Completion | WinnowError,
    one: Asked,
    alone: wk.Engine,
    model: PreTrainedModel,
    settings: dict[str, Any],
    found: Found,
) -> list[str]:
    """Compare one request with the same request alone; returns what differs."""
    (whole,) = alone.generate([one.prompt], one.sampling)
    if isinstance(got, WinnowError):  # not accepted
        found.reasons["refused"] += 1
        return [] if str(got) == str(whole.error) else [f"refused with {got}, alone {whole.error or whole.finish_reason}"]
    wrong = []
    if len(got.choices) != one.sampling.n:
        wrong.append(f"{len(got.choices)} choices of {one.sampling.n}")
    for choice in got.choices:
        found.choices += 1
        found.reasons[choice.finish_reason] += 1
        truth = whole.choices[choice.index]
        if one.sampling.n > 1 and truth.error is None:
            seed = None if one.sampling.seed is None else one.sampling.seed + choice.index
            (truth,) = alone.generate([one.prompt], replace(one.sampling, n=1, seed=seed))
        mine = one.cancel_at is not None and one.cancel in (None, choice.index)
        if (said := differences(choice, truth, mine)) is not None:
            wrong.append(f"choice {choice.index}: {said}")
    plain = replace(one.sampling, logprobs=None, n=1) == wk.Sampling(max_new_tokens=one.sampling.max_new_tokens)
    if plain and whole.error is None and settings["prefill_ceiling"] is None and whole.tokens != in_block(model, settings, one):
        wrong.append(f"tokens {whole.tokens}, in a block {in_block(model, settings, one)}")
    return wrong


def play(seed: int, count: int, found: Found) -> None:
    """One round of at most ``count`` requests."""
    draw = random.Random(seed)
    model, settings = draw_engine(draw)
    asked, step = [], 0
    for _ in range(min(draw.randint(FEWEST, MOST), count)):
        asked.append(draw_request(draw, step))
        step += draw.choice([0, 0, 1, 3])
    again = f"(--seed {seed} --count {len(asked)}: {settings})"
    try:
        engine, alone = (wk.Engine(model, words(), **settings) for _ in range(2))
        ended = together(engine, asked)
        for number, (got, one) in enumerate(zip(ended, asked, strict=True)):
            for said in check(got, one, alone, model, settings, found):
                found.mismatches.append(f"request {number} of {len(one.prompt)} tokens, {one.sampling}: {said} {again}")
        if (engine.waiting, engine.active, engine.held_bytes, alone.held_bytes) != (0, 0, 0, 0):
            found.mismatches.append(f"{engine.held_bytes} bytes are still held {again}")
    except Exception as error:
        found.mismatches.append(f"{type(error).__name__}: {error} {again}")
    found.requests += len(asked)
    found.rounds += 1
    found.policies[settings["policy"].split(":")[0]] += len(asked)
    found.kinds.update(one.kind for one in asked)
    found.kinds["cancelled"] += sum(one.cancel_at is not None for one in asked)
    found.kinds["several choices"] += sum(one.sampling.n > 1 for one in asked)
    found.kinds["drawn"] += sum(one.sampling.temperature > 0 for one in asked)
    found.kinds["in chunks"] += len(asked) * (settings["prefill_chunk"] is not None)
    found.kinds["under a memory limit"] += len(asked) * (settings["kv_memory"] is not None)


def soak(count: int, seed: int = 0, progress: bool = False) -> Found:
    """At least ``count`` requests, in rounds of seeds ``seed``, ``seed + 1``, ..."""
    found, begin = Found(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while found.requests < count:
            play(seed + found.rounds, count - found.requests, found)
            if progress:
                print(f"\r{found.requests} of {count} requests, {len(found.mismatches)} mismatches", end="", file=sys.stderr)
    if progress:
        print(file=sys.stderr)
    found.seconds = time.perf_counter() - begin
    return found


def show(found: Found) -> None:
    """Print a table of what was asked and how it ended."""
    rows = [("requests", found.requests), ("choices", found.choices), ("engines", found.rounds)]
    rows += [(f"asked: {name}", count) for name, count in found.kinds.most_common()]
    rows += [(f"ended: {name}", count) for name, count in found.reasons.most_common()]
    rows += [(f"policy {name}", count) for name, count in sorted(found.policies.items())]
    for name, number in [*rows, ("mismatches", len(found.mismatches))]:
        print(f"{name:<32}{number:>8}")
    print(f"{'seconds':<32}{found.seconds:>8.0f}")
    for said in found.mismatches:
        print(f"- {said}")


def main() -> None:
    """Run, print, write."""
    asking = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asking.add_argument("--count", type=int, default=1000, help="requests (default: 1000)")
    asking.add_argument("--seed", type=int, default=0, help="of the first round (default: 0)")
    asking.add_argument("--json", help="write the counts to this file, too")
    asked = asking.parse_args()
    found = soak(asked.count, asked.seed, progress=sys.stderr.isatty())
    show(found)
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as out:
            json.dump({"command": "soak/engine", "seed": asked.seed, **vars(found)}, out, indent=2)
    sys.exit(1 if found.mismatches else 0)


if __name__ == "__main__":
    main()
