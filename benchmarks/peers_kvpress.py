"""The kvpress side of peers_needle.py. Runs in kvpress's own environment and imports nothing of winnowkv.

    .venv-peers/bin/python benchmarks/peers_kvpress.py JOB.json

A job holds prompts as token ids, and for each the presses to measure with the ratio that
keeps what ours keeps. Answers go to standard output, a JSON line each, as token ids. A press
is written as its user would write it, ``AdaKVPress(SnapKVPress(window_size=32))``.

One prefill serves all presses of a prompt: a press works in a forward hook behind every
attention layer and changes the cache, never what the layer hands on, so each layer's hook
input is given to every press in turn, each with a cache of its own. A press that does more
than that (KVzip, Finch) reads the prompt itself, inside its context manager, as kvpress
documents it; with ``--live`` all do.
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

RANDOM = torch.cuda if torch.cuda.is_available() else torch  # whose generator presses that draw take
MASKED = "masked_key_indices"  # where kvpress leaves the entries that a per-head press only masks


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
            self.press = eval(asked["press"], vars(kvpress).copy())  # it comes from our own command line
            if self.press is not None:
                self.press.compression_ratio = asked["ratio"]
            if isinstance(self.press, kvpress.FinchPress):
                # It learns by a delimiter token where the question begins; tell it, so that the prompt stays the same.
                self.press.window_size, self.press.delimiter_token_id = question, -1

    @property
    def alone(self) -> bool:
        """Whether the press does more than to hook into the attention layers."""
        return self.press is not None and type(self.press).__call__ is not kvpress.BasePress.__call__

    def take(self, module: Any, inputs: Any, kwargs: dict[str, Any], output: Any, layer: Any) -> None:
        """Let the press have a layer: ``layer`` is that of the shared cache, still whole."""
        begin = time.perf_counter()
        self.cache.update(layer.keys, layer.values, module.layer_idx)
        setattr(module, MASKED, None)
        if self.press is not None:
            RANDOM.set_rng_state(self.random)  # as if it were alone
            self.press.forward_hook(module, inputs, {**kwargs, "past_key_values": self.cache}, output)
            self.random = RANDOM.get_rng_state()
        self.masked[module.layer_idx] = getattr(module, MASKED)
        self.seconds += time.perf_counter() - begin

    def report(self) -> dict[str, Any]:
        """Entries and bytes after prefill. Entries are a mean over KV heads; held is the storage that keys and values have."""
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
    """While open, every run takes every layer; a run that fails is left alone from there on."""

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
    """A press that breaks is a result too: one line of what it said."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        run.error = f"{type(error).__name__}: {said[0]}".rstrip(": ")


def read(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


def read_shared(model: Any, ids: torch.Tensor, runs: list[Run]) -> torch.Tensor:
    """One prefill for all runs."""
    for run in runs:
        if run.press is not None and run.error is None:
            with errors_of(run), run.press(model):
                pass  # kvpress prepares model and press on entering; its hooks are gone again
    cache = DynamicCache()
    with hooks(model, runs, cache):
        return read(model, ids, cache)


def read_live(model: Any, ids: torch.Tensor, run: Run) -> torch.Tensor:
    """A prefill of the run's own, by kvpress's context manager."""
    torch.manual_seed(0)
    with run.press(model) if run.press else contextlib.nullcontext():
        logits = read(model, ids, run.cache)
    run.masked = {module.layer_idx: getattr(module, MASKED, None) for module in attentions(model)}
    return logits


def answer(model: Any, run: Run, logits: torch.Tensor, tokens: int, limit: int, stop: set[int]) -> dict[str, Any]:
    """Greedy decoding; median milliseconds from token to token, the first step left out, as on our side."""
    for module in attentions(model):
        setattr(module, MASKED, run.masked.get(module.layer_idx))
    # As kvpress's pipeline has it: positions go on behind the whole prompt, or behind what is kept where keys were rotated.
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
    out, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not get between our lines
    torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(job["device"]).eval()
    native, stop, limit = model.config._attn_implementation, set(job["stop"]), job["max_new_tokens"]

    def tell(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    tell({
        "versions": {"kvpress": version("kvpress"), "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "logits": read(model, torch.tensor([job["check"]], device=model.device), DynamicCache()).float().tolist(),
    })  # fmt: skip
    for number, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt["ids"]], device=model.device)
        for implementation in (native, "eager"):
            # Attention weights exist in eager attention only, which is slow: it is used where a press asks for them.
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
                sharing = [other for other in sharing if other is not run]  # so that its cache dies with it
                line = {"prompt": number, "press": run.asked["press"], "budget": run.asked["budget"]}
                if run.error is None:
                    with errors_of(run):
                        last = logits if shared else read_live(model, ids, run)
                        line |= {**run.report(), "compress_s": round(run.seconds, 4) if shared else None}
                        line |= answer(model, run, last, ids.shape[1], limit, stop)
                tell({**line, "error": run.error} if run.error else line)
        model.set_attn_implementation(native)


if __name__ == "__main__":
    main()
