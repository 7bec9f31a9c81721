"""The calibration of one model, in two passes over prompts of our own: its retrieval heads, then its layers' eviction errors.

Every prompt's result is a line on disk as soon as it is there, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from winnowkv.attention.hooks import output_projections
from winnowkv.cache.reading import greedy, prefill
from winnowkv.calibrate.errors import ErrorWatch, layer_shares
from winnowkv.calibrate.heads import HeadWatch, semantic_scores, traditional_scores
from winnowkv.calibrate.probe import ProbedCache, Watcher
from winnowkv.calibrate.prompts import CalibrationPrompt, Fact, build, schedule
from winnowkv.errors import InputError
from winnowkv.evaluate.report.machine import versions
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.models.calibration import Profile
from winnowkv.models.info import Fingerprint, end_tokens, position_limit
from winnowkv.models.load import dtype_name
from winnowkv.policies import Policy, Prompt, policy as make_policy

Advance = Callable[[str], None]
RECALLED = 0.6  # share of a long answer's words that must come back; a short one must come back whole
LONG = 8  # words


@dataclass(frozen=True)
class Calibration:
    """What to measure.

    Attributes
    ----------
    prompts, lengths, depths, seed: how many prompts we generate, and where their facts hide.
    own: the user's facts, each asked once beside ours.
    error_prompts: answered prompts that the second pass measures layer errors on.
    error_entries: the small cache that one layer at a time is limited to there.
    error_mean: mean over decode steps; False sums them, as the repository's older version did.
    minimum: successes below which no profile is written.
    """

    prompts: int = 60
    lengths: Sequence[int] = (500, 1000, 2000)
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    seed: int = 0
    own: Sequence[Fact] = field(default_factory=tuple)
    error_prompts: int = 20
    error_entries: int = 32
    error_mean: bool = True
    minimum: int = 8
    max_new_tokens: int = 40

    def check(self, model: PreTrainedModel) -> None:
        """Raise InputError for what cannot work, before the first prompt is read."""
        limit = position_limit(model)
        if not (self.lengths and self.depths and self.prompts + len(self.own) > 0):
            raise InputError("calibration needs at least one prompt, length and depth")
        for length in self.lengths:
            if limit is not None and length + self.max_new_tokens > limit:
                raise InputError(
                    f"length {length} with {self.max_new_tokens} new tokens passes the model's {limit} positions: "
                    f"ask for at most {limit - self.max_new_tokens}"
                )
            if length <= self.error_entries:
                raise InputError(
                    f"length {length} fits in the small cache of {self.error_entries} entries: ask for longer prompts"
                )


def identity(line: dict[str, Any]) -> tuple[str, int]:
    """What tells two result lines apart."""
    return line["phase"], line["case"]


def open_store(folder: Path, name: str, model: PreTrainedModel, chat: bool, asked: Calibration) -> ResultStore:
    """The folder of a calibration's lines; lines of another model or other settings are refused."""
    settings = {**asdict(asked), "own": [asdict(fact) for fact in asked.own]}
    config = {"model": name, "dtype": dtype_name(model.dtype), "chat": chat, **settings}
    return ResultStore(folder, {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}, identity)


def calibrate(
    asked: Calibration,
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    filler: str,
    *,
    chat: bool,
    store: ResultStore,
    advance: Advance,
) -> Profile:
    """Run what the store does not hold yet and make the profile; ``advance`` is told of every prompt.

    Raises InputError where the model answers too few prompts for its scores to mean something.
    """
    asked.check(model)
    cases = list(enumerate(schedule(asked.prompts, asked.lengths, asked.depths, asked.seed, list(asked.own))))
    stop, layers = end_tokens(model, tokenizer), output_layers(model)
    for case, (fact, length, depth, offset) in cases:
        if not store.has(("heads", case)):
            prompt = build(tokenizer, filler, fact, length, depth, offset, chat=chat)
            store.add({"phase": "heads", "case": case, **measure_heads(prompt, model, len(layers), tokenizer, stop, asked)})
        advance(f"heads: {fact.kind}, {length} tokens")
    lines = [line for line in store.lines if line["phase"] == "heads"]
    answered = [line for line in lines if line["success"]]
    if len(answered) < asked.minimum:
        raise InputError(too_few(lines, len(answered), asked.minimum))
    semantic, traditional = (mean_table([line[kind] for line in answered]) for kind in ("semantic", "traditional"))
    profile = Profile(name, Fingerprint.of(model), semantic, traditional, (1 / len(semantic),) * len(semantic))
    chooser, found = make_policy("compresskv", profile=profile, budgets="uniform"), output_projections(model)
    projections = [found[index] for index in layers]
    chosen = {line["case"] for line in spread(answered, asked.error_prompts)}
    for case, (fact, length, depth, offset) in cases:
        if case in chosen:
            if not store.has(("errors", case)):
                prompt = build(tokenizer, filler, fact, length, depth, offset, chat=chat)
                store.add({"phase": "errors", "case": case, **measure_errors(prompt, model, chooser, projections, stop, asked)})
            advance(f"errors: {fact.kind}, {length} tokens")
    kept = "mean" if asked.error_mean else "sum"
    errors = [(line["kind"], line[kept]) for line in store.lines if line["phase"] == "errors" and line["steps"]]
    if not errors:
        raise InputError(
            "every answer was a single token: layer errors are measured on decode steps, give prompts with longer answers"
        )
    about = {
        "seed": asked.seed, "lengths": list(asked.lengths), "depths": list(asked.depths), "chat": chat,
        "prompts": len(lines), "own_prompts": len(asked.own), "answered": len(answered), "answered_by": tally(lines),
        "errors_on": len(errors), "error_entries": asked.error_entries, "dtype": dtype_name(model.dtype),
        "versions": versions(),
    }  # fmt: skip
    return Profile(name, profile.fingerprint, semantic, traditional, tuple(layer_shares(errors)), about)


def answer(prompt: CalibrationPrompt, model: PreTrainedModel, watch: Watcher, limit: int, stop: frozenset[int]) -> list[int]:
    """Greedy tokens of the answer, the stop token not among them, while ``watch`` looks on."""
    cache = ProbedCache(model, watch)
    logits = prefill(model, torch.tensor([prompt.ids], device=model.device), cache)
    return list(greedy(model, cache, logits, limit, stop))


def measure_heads(
    prompt: CalibrationPrompt, model: PreTrainedModel, layers: int, tokenizer: Any, stop: frozenset[int], asked: Calibration
) -> dict[str, Any]:
    """One line of the first pass: did the model answer, and how every head looked at the answer span."""
    watch = HeadWatch(layers, prompt.span)
    tokens = answer(prompt, model, watch, asked.max_new_tokens, stop)
    output = tokenizer.decode(tokens, skip_special_tokens=True)
    masses, places = watch.evidence()
    span = prompt.ids[prompt.span[0] : prompt.span[1]]
    semantic, steps = semantic_scores(masses, tokens, set(span))
    # Mean over the counted steps: a long answer must not outvote a short one. The repository sums.
    semantic = semantic / max(steps, 1)
    traditional = traditional_scores(places, tokens, prompt.ids, prompt.span) if tokens else torch.zeros_like(semantic)
    return {
        "kind": prompt.fact.kind, "length": prompt.length, "depth": prompt.depth, "answer": prompt.fact.answer,
        "output": output,
        "success": steps > 0 and answered_by(prompt.fact.answer, output), "steps": steps,
        "semantic": rounded(semantic), "traditional": rounded(traditional),
    }  # fmt: skip


def measure_errors(
    prompt: CalibrationPrompt, model: PreTrainedModel, chooser: Policy, projections: Sequence[nn.Module],
    stop: frozenset[int], asked: Calibration,
) -> dict[str, Any]:  # fmt: skip
    """One line of the second pass: every layer's error when it alone keeps ``error_entries``."""
    small = Prompt(len(prompt.ids), len(projections), asked.error_entries)
    watch = ErrorWatch(chooser, asked.error_entries, small, projections)
    answer(prompt, model, watch, asked.max_new_tokens, stop)
    sums = torch.tensor(watch.errors, dtype=torch.float64).sum(-1)
    steps = len(watch.errors[0])
    return {"kind": prompt.fact.kind, "steps": steps, "mean": (sums / max(steps, 1)).tolist(), "sum": sums.tolist()}


def output_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers whose cache can be compressed."""
    cache = ProbedCache(model, lambda *_: None)
    return [index for index, layer in enumerate(cache.layers) if layer in cache.compact_layers]


def answered_by(answer_text: str, output: str) -> bool:
    """A short answer must come back whole, of a long one most words."""
    words = answer_text.casefold().split()
    if len(words) <= LONG:
        return answer_text.casefold() in output.casefold()
    said = set(output.casefold().split())
    return sum(word in said for word in words) >= RECALLED * len(words)


def mean_table(tables: Sequence[Sequence[Sequence[float]]]) -> tuple[tuple[float, ...], ...]:
    """Mean over prompts of head scores ``[L, Hq]``."""
    mean = torch.tensor(tables, dtype=torch.float64).mean(0)
    return tuple(tuple(round(score, 6) for score in row) for row in mean.tolist())


def spread(lines: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` lines, evenly over all of them, so that every kind, length and depth is heard."""
    if len(lines) <= count:
        return list(lines)
    return [lines[at * len(lines) // count] for at in range(count)]


def tally(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """How many prompts of each kind and each length were answered, as ``"12 of 20"``."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for line in lines:
        groups[line["kind"]].append(line["success"])
        groups[f"{line['length']} tokens"].append(line["success"])
    return {name: f"{sum(flags)} of {len(flags)}" for name, flags in sorted(groups.items())}


def too_few(lines: Sequence[dict[str, Any]], answered: int, minimum: int) -> str:
    """Why no profile is written, with an example."""
    counts = ", ".join(f"{name}: {count}" for name, count in tally(lines).items())
    miss = next(line for line in lines if not line["success"])
    return (
        f"the model answered {answered} of {len(lines)} prompts, {minimum} are needed for scores that mean something "
        f"({counts}; asked for {miss['answer']!r} it said {miss['output'][:80]!r}): it cannot retrieve at these lengths. "
        f"Ask for shorter --lengths, more --count, or give --prompts that it can answer"
    )


def rounded(table: torch.Tensor) -> list[list[float]]:
    """Six digits are more than bfloat16 gives, and keep the lines short."""
    return [[round(value, 6) for value in row] for row in table.tolist()]
