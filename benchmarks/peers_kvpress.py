"""The kvpress side of peers_needle.py. Runs in kvpress's own environment and imports nothing of winnowkv.

    .venv-peers/bin/python benchmarks/peers_kvpress.py JOB.json

A job holds prompts as token ids, and for each prompt the presses to measure, with the ratio that keeps as
many entries as our budget. Answers are written to standard output as JSON lines of token ids. A press
is a Python expression, ``AdaKVPress(SnapKVPress(window_size=32))``.

One prefill serves all presses of a prompt: a press works in a forward hook after every attention
layer, where it changes the cache but not the layer's output. So each layer's hook input is given to
every press in turn, each with a cache of its own. A press that does more than that (KVzip, Finch)
reads the prompt itself inside its context manager, as kvpress documents it; with ``--live`` all do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

RANDOM = torch.cuda if torch.cuda.is_available() else torch  # has the generator of presses that draw
MASKED = "masked_key_indices"  # attribute in which kvpress puts the entries that a per-head press only masks


class Run:
    """One press over one prompt: its cache, and what it masks in each layer."""

    def __init__(self, model: Any, asked: dict[str, Any], question: int) -> None:
        self.asked, self.error = asked, None
        self.cache, self.masked = DynamicCache(), {}
        self.seconds = 0.0
        torch.manual_seed(0)
        self.random = RANDOM.get_rng_state()
        self.press = None
        with errors_of(self):
            self.press = eval(asked["press"], vars(kvpress).copy())  # the text comes from our own command line
            if self.press is not None:
                self.press.compression_ratio = asked["ratio"]
            if isinstance(self.press, kvpress.FinchPress):
                # It finds the question by a delimiter token. Set its length instead, so that the prompt stays the same.
                self.press.window_size, self.press.delimiter_token_id = question, -1

    @property
    def alone(self) -> bool:
        """Whether the press does more than hook into attention layers, so that it needs a prefill of its own."""
        return self.press is not None and type(self.press).__call__ is not kvpress.BasePress.__call__

    def take(self, module: Any, inputs: Any, kwargs: dict[str, Any], output: Any, layer: Any) -> None:
        """Apply the press to one layer; ``layer`` is the shared cache's, which holds everything."""
        begin = time.perf_counter()
        self.cache.update(layer.keys, layer.values, module.layer_idx)
        setattr(module, MASKED, None)
        if self.press is not None:
            RANDOM.set_rng_state(self.random)  # as in a run of this press alone
            self.press.forward_hook(module, inputs, {**kwargs, "past_key_values": self.cache}, output)
            self.random = RANDOM.get_rng_state()
        self.masked[module.layer_idx] = getattr(module, MASKED)
        self.seconds += time.perf_counter() - begin

    def report(self) -> dict[str, Any]:
        """Entries and bytes after prefill. Entries are a mean over KV heads; held bytes are the storage of keys and values."""
        entries, kept, held = [], 0, 0
        for index, layer in enumerate(self.cache.layers):
            masked = self.masked.get(index)
            heads, length = layer.keys.shape[1:3]
            left = heads * length - (0 if masked is None else len(masked[1]))
            entries.append(left / heads if left % heads else left // heads)
            kept += left * (layer.keys[0, 0, 0].nbytes + layer.values[0, 0, 0].nbytes)
            held += layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        return {"kept_entries_per_layer": entries, "kept_bytes": kept, "held_bytes": held}


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


@contextlib.contextmanager
def hooks(model: Any, runs: list[Run], shared: DynamicCache) -> Any:
    """While open, every run takes every layer; a run that fails takes no further layers."""

    def after(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        for run in runs:
            if run.error is None:
                with errors_of(run):
                    run.take(module, inputs, kwargs, output, shared.layers[module.layer_idx])
        setattr(module, MASKED, None)

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in attentions(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def errors_of(run: Run) -> Any:
    """Record an exception of a press as the run's error: the first line of its message."""
    try:
        yield
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        run.error = f"{type(error).__name__}: {message[0]}".rstrip(": ")


def read(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


def read_shared(model: Any, ids: torch.Tensor, runs: list[Run]) -> torch.Tensor:
    """One prefill for all runs."""
    for run in runs:
        if run.press is not None and run.error is None:
            with errors_of(run), run.press(model):
                pass  # entering prepares model and press; leaving removes kvpress's own hooks
    cache = DynamicCache()
    with hooks(model, runs, cache):
        return read(model, ids, cache)


def read_live(model: Any, ids: torch.Tensor, run: Run) -> torch.Tensor:
    """A prefill for this run alone, in kvpress's context manager."""
    torch.manual_seed(0)
    with run.press(model) if run.press else contextlib.nullcontext():
        logits = read(model, ids, run.cache)
    run.masked = {module.layer_idx: getattr(module, MASKED, None) for module in attentions(model)}
    return logits


def answer(model: Any, run: Run, logits: torch.Tensor, tokens: int, limit: int, stop: set[int]) -> dict[str, Any]:
    """Greedy decoding; median milliseconds from token to token, the first step left out, as on our side."""
    for module in attentions(model):
        setattr(module, MASKED, run.masked.get(module.layer_idx))
    # As in kvpress's pipeline: positions continue after the whole prompt, or after the kept entries if keys were rotated.
    at = run.cache.get_seq_length() if getattr(run.press, "rerotate_keys", False) else tokens
    made, clock = [], [time.perf_counter()]
    for step in range(limit):
        token = int(logits.argmax(-1))
        if token in stop:
            break
        made.append(token)
        clock.append(time.perf_counter())
        if step + 1 < limit:
            ids = torch.tensor([[token]], device=model.device)
            where = torch.tensor([[at + step]], device=model.device)
            logits = model(ids, past_key_values=run.cache, position_ids=where, use_cache=True).logits[0, -1]
    if len(made) < limit:
        clock.append(time.perf_counter())
    gaps = [1000 * (b - a) for a, b in pairwise(clock[1:])]
    steady = gaps[1:] or gaps
    return {"tokens": made, "decode_ms_per_token": round(median(steady), 2) if steady else None}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--live", action="store_true")
    args = parser.parse_args()
    job = json.loads(args.job.read_text(encoding="utf-8"))
    out, sys.stdout = sys.stdout, sys.stderr  # other output must not get between our lines
    torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(job["device"]).eval()
    native, stop, limit = model.config._attn_implementation, set(job["stop"]), job["max_new_tokens"]

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    write({
        "versions": {"kvpress": version("kvpress"), "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "logits": read(model, torch.tensor([job["check"]], device=model.device), DynamicCache()).float().tolist(),
    })  # fmt: skip
    for number, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt["ids"]], device=model.device)
        for implementation in (native, "eager"):
            # Attention weights exist only in eager attention, which is slow: it is used for presses that need them.
            weights = implementation == "eager"
            runs = [Run(model, asked, prompt["question"]) for asked in prompt["asked"]
                    if ("ObservedAttention" in asked["press"]) == weights]  # fmt: skip
            if not runs:
                continue
            model.set_attn_implementation(implementation)
            sharing = [] if args.live else [run for run in runs if not run.alone]
            logits = read_shared(model, ids, sharing) if sharing else None
            while runs:
                run = runs.pop(0)
                shared = run in sharing
                sharing = [other for other in sharing if other is not run]  # so that its cache is freed with it
                line = {"prompt": number, "press": run.asked["press"], "budget": run.asked["budget"]}
                if run.error is None:
                    with errors_of(run):
                        last = logits if shared else read_live(model, ids, run)
                        line |= {**run.report(), "compress_s": round(run.seconds, 4) if shared else None}
                        line |= answer(model, run, last, ids.shape[1], limit, stop)
                write({**line, "error": run.error} if run.error else line)
        model.set_attn_implementation(native)


if __name__ == "__main__":
    main()
