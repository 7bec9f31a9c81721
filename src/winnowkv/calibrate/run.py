"""The calibration of one model, in two passes over calibration prompts: retrieval heads, then layers' eviction errors.

Each prompt's result is written as a line when it is finished, so an interrupted run continues where it stopped.
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

from winnowkv.attention.projection import output_projections
from winnowkv.cache.reading import greedy, prefill
from winnowkv.calibrate.about import measured_now
from winnowkv.calibrate.errors import ErrorWatch, layer_shares
from winnowkv.calibrate.heads import HeadWatch, semantic_scores, traditional_scores
from winnowkv.calibrate.probe import ProbedCache, Watcher
from winnowkv.calibrate.prompts import CalibrationPrompt, Fact, build, schedule
from winnowkv.errors import InputError
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.models.calibration import CalibrationProfile
from winnowkv.models.info import ModelInfo, end_tokens, position_limit
from winnowkv.models.load import dtype_name
from winnowkv.policies import Policy, PromptInfo, policy as make_policy

Advance = Callable[[str], None]
MIN_RECALLED_SHARE = 0.6  # of a long answer's words; a short answer must be repeated as a whole
MAX_SHORT_ANSWER = 8  # words


@dataclass(frozen=True)
class Calibration:
    """What to measure.

    Attributes
    ----------
    prompts, lengths, depths, seed: how many prompts are generated, and at which lengths and depths.
    own: the user's facts, each asked once in addition.
    error_prompts: answered prompts on which the second pass measures layer errors.
    error_entries: entries per KV head to which one layer at a time is limited there.
    error_mean: average errors over decode steps; False sums them, as an older version of the repository did.
    minimum: fewest answered prompts for which a profile is written.
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
        """Raise InputError for impossible settings, before the first prompt is read."""
        self.check_prompts()
        limit = position_limit(model)
        for length in self.lengths:
            if limit is not None and length + self.max_new_tokens > limit:
                raise InputError(
                    f"length {length} with {self.max_new_tokens} new tokens passes the model's {limit} positions: "
                    f"ask for at most {limit - self.max_new_tokens}"
                )

    def check_prompts(self) -> None:
        """Raise InputError for prompts of which no profile can be made, whatever the model."""
        count = self.prompts + len(self.own)
        if not (self.lengths and self.depths and count > 0):
            raise InputError("calibration needs at least one prompt, length and depth")
        if count < self.minimum:
            raise InputError(
                f"{count} prompts are too few for reliable scores: a profile needs {self.minimum} that the model answers, "
                "so give a larger --count"
            )
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise InputError(f"depth {depth} is outside 0 (start of the text) to 1 (its end)")
        for length in self.lengths:
            if length <= self.error_entries:
                raise InputError(
                    f"length {length} fits in the small cache of {self.error_entries} entries: ask for longer prompts"
                )


def identity(line: dict[str, Any]) -> tuple[str, int]:
    """The identity of a result line: lines of one measurement have the same."""
    return line["phase"], line["case"]


def open_store(folder: Path, name: str, model: PreTrainedModel, chat: bool, asked: Calibration) -> ResultStore:
    """Open the folder of a calibration's lines. Raises InputError if it holds lines of another model or other settings."""
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
) -> CalibrationProfile:
    """Measure what the store does not hold yet and make the profile; ``advance`` is called after every prompt.

    Raises InputError if the model answers too few prompts for reliable scores.
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
    profile = CalibrationProfile(name, ModelInfo.of(model), semantic, traditional, (1 / len(semantic),) * len(semantic))
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
        **measured_now(asked, name, model, chat), "prompts": len(lines), "answered": len(answered),
        "answered_by": tally(lines), "errors_on": len(errors),
    }  # fmt: skip
    return CalibrationProfile(name, profile.model_info, semantic, traditional, tuple(layer_shares(errors)), about)


def answer(prompt: CalibrationPrompt, model: PreTrainedModel, watch: Watcher, limit: int, stop: frozenset[int]) -> list[int]:
    """Greedy tokens of the answer, without the stop token; ``watch`` sees every layer's attention."""
    cache = ProbedCache(model, watch)
    logits = prefill(model, torch.tensor([prompt.ids], device=model.device), cache)
    return list(greedy(model, cache, logits, limit, stop))


def measure_heads(
    prompt: CalibrationPrompt, model: PreTrainedModel, layers: int, tokenizer: Any, stop: frozenset[int], asked: Calibration
) -> dict[str, Any]:
    """One line of the first pass: whether the model answered, and every head's scores."""
    watch = HeadWatch(layers, prompt.span)
    tokens = answer(prompt, model, watch, asked.max_new_tokens, stop)
    output = tokenizer.decode(tokens, skip_special_tokens=True)
    masses, places = watch.evidence()
    span = prompt.ids[prompt.span[0] : prompt.span[1]]
    semantic, steps = semantic_scores(masses, tokens, set(span))
    # Mean over the counted steps, so that long answers do not weigh more. The repository sums.
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
    small = PromptInfo(len(prompt.ids), len(projections), asked.error_entries)
    watch = ErrorWatch(chooser.bind(ModelInfo.of(model), small), projections)
    answer(prompt, model, watch, asked.max_new_tokens, stop)
    sums = torch.tensor(watch.errors, dtype=torch.float64).sum(-1)
    steps = len(watch.errors[0])
    return {"kind": prompt.fact.kind, "steps": steps, "mean": (sums / max(steps, 1)).tolist(), "sum": sums.tolist()}


def output_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers whose cache can be compressed."""
    cache = ProbedCache(model, lambda *_: None)
    return [index for index, layer in enumerate(cache.layers) if layer in cache.compact_layers]


def answered_by(answer_text: str, output: str) -> bool:
    """Whether the output contains a short answer as a whole, or most words of a long one."""
    words = answer_text.casefold().split()
    if len(words) <= MAX_SHORT_ANSWER:
        return answer_text.casefold() in output.casefold()
    output_words = set(output.casefold().split())
    return sum(word in output_words for word in words) >= MIN_RECALLED_SHARE * len(words)


def mean_table(tables: Sequence[Sequence[Sequence[float]]]) -> tuple[tuple[float, ...], ...]:
    """Mean over prompts of head scores ``[L, Hq]``."""
    mean = torch.tensor(tables, dtype=torch.float64).mean(0)
    return tuple(tuple(round(score, 6) for score in row) for row in mean.tolist())


def spread(lines: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` lines, evenly spaced, so that every kind, length and depth is represented."""
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
    """The message that too few prompts were answered, with an example."""
    counts = ", ".join(f"{name}: {count}" for name, count in tally(lines).items())
    begin = f"the model answered {answered} of {len(lines)} prompts, {minimum} are needed for reliable scores"
    miss = next((line for line in lines if not line["success"]), None)
    if miss is None:
        return f"{begin} ({counts}): give a larger --count"
    return (
        f"{begin} ({counts}; for {miss['answer']!r} it answered {miss['output'][:80]!r}): it cannot retrieve at these "
        "lengths. Give shorter --lengths, a larger --count, or --prompts that it can answer"
    )


def rounded(table: torch.Tensor) -> list[list[float]]:
    """A table rounded to six digits: more than bfloat16 has, and lines stay short."""
    return [[round(value, 6) for value in row] for row in table.tolist()]
