"""The variants that winnow_parts.py measures: ``winnow`` with one part exchanged, an oracle, and the published policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

import winnowkv as wk
from winnowkv.models.calibration import CalibrationProfile
from winnowkv.models.info import ModelInfo
from winnowkv.policies import LayerStates, Policy, PromptInfo
from winnowkv.policies.expected import Expected, ExpectedScorer, sample_columns
from winnowkv.policies.parts import Parts
from winnowkv.policies.winnow import Winnow
from winnowkv.prompt.task import Task, TaskProfile
from winnowkv.scoring.attention import causal_attention, expected_attention, group_reduce
from winnowkv.types import Keys, Queries, Scores

Attention = Callable[[Queries, Keys, float, int], tuple[Scores, Tensor]]


def mean_attention(queries: Queries, keys: Keys, scale: float, context: int) -> tuple[Scores, Tensor]:
    """The mean over the queries in place of the root mean square."""
    grouped = queries.float().unflatten(1, (keys.shape[1], -1)) * scale
    attention = (grouped @ keys.float()[:, :, None].mT).softmax(-1)
    return attention[..., :context].mean((2, 3)), expected_attention(queries, keys, scale, context)[1]


def normal_attention(queries: Queries, keys: Keys, scale: float, context: int) -> tuple[Scores, Tensor]:
    """One normal distribution in place of the queries: the softmax of the expected ``exp(q k)``, arXiv 2510.00636.

    The paper's norm of the values is left out, because no other variant uses values.
    """
    grouped, keyed = queries.float().unflatten(1, (keys.shape[1], -1)) * scale, keys.float()[:, :, None]
    center = grouped.mean(3, keepdim=True)
    covariance = (grouped - center).mT @ (grouped - center) / grouped.shape[3]
    logits = (keyed @ center.mT).squeeze(-1) + 0.5 * ((keyed @ covariance) * keyed).sum(-1)
    return logits.softmax(-1)[..., :context].mean(2), expected_attention(queries, keys, scale, context)[1]


def late_attention(queries: Queries, keys: Keys, scale: float, context: int) -> tuple[Scores, Tensor]:
    """Only the last quarter of the samples: the text's last queries."""
    return expected_attention(queries[:, :, -(queries.shape[2] // 4) :], keys, scale, context)


def even_attention(queries: Queries, keys: Keys, scale: float, context: int) -> tuple[Scores, Tensor]:
    """The samples without their last quarter: those that are spread evenly over the text."""
    return expected_attention(queries[:, :, : -(queries.shape[2] // 4)], keys, scale, context)


@dataclass(frozen=True, kw_only=True)
class Part(Winnow):
    """``winnow`` with one part changed that has no option.

    ``attention`` scores the moved queries; ``moved`` False leaves them at their positions; ``guessed`` looks for heads
    although a profile names them.
    """

    attention: Attention = expected_attention
    moved: bool = True
    guessed: bool = False

    def read_profile(self, model: ModelInfo) -> CalibrationProfile | None:
        """As ``winnow``, or none if heads are guessed."""
        found = super().read_profile(model)
        return None if self.guessed else found

    def parts(self, model: ModelInfo, prompt: PromptInfo) -> Parts:
        """As ``winnow``, the changed part exchanged."""
        made = super().parts(model, prompt)
        scorer = extended(AttentionScorer, made.scorer, attention=self.attention)
        if not self.moved:
            scorer = replace(scorer, rotation=None)
        return replace(made, scorer=scorer)


@dataclass(frozen=True, kw_only=True)
class AttentionScorer(ExpectedScorer):
    """``expected``'s scorer with another attention of the moved queries."""

    attention: Attention

    def score(self, states: LayerStates) -> Scores:
        """This attention, scaled as in ``expected``, ``[1, Hkv, C]``."""
        queries = states.queries
        columns, by = sample_columns(self.tokens, self.context, self.sinks, self.samples, self.ahead, queries.device)
        moved = self.move(queries.index_select(2, columns), by)
        return scaled(*self.attention(moved, states.keys, states.scale, self.context))


def extended(kind: type, part: Any, **more: Any) -> Any:
    """A part of a subclass ``kind`` with the fields of ``part`` and ``more``."""
    return kind(**{each.name: getattr(part, each.name) for each in fields(part)}, **more)


def scaled(scores: Scores, preference: Tensor) -> Scores:
    """Scores whose sum is the layer's preference, as allocators of ``expected`` want them."""
    return scores * (preference / scores.sum().clamp(min=1e-30))


def attention_preference(attention: Tensor, tau1: float, tau2: float) -> Tensor:
    """How much cache a layer asks for: entropy ``^(1/tau1)`` times variance ``^(1/tau2)``, a scalar; ``attention [..., W, C]``.

    The entropy of every query's attention and the variance of every token's over the ``W`` queries, each summed over heads
    and tokens. Source: CAKE (arXiv 2503.12491, section 4).
    """
    entropy = (attention * (attention + 1e-10).log()).sum().neg().clamp(min=0)
    variance = attention.var(-2).sum()
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


class AnswerAttention(wk.CompactCache):
    """A full cache that records, layer by layer, how the answer's own queries attend to the prompt."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, "full", 1)
        self.recorded: list[tuple[Scores, Tensor]] = []

    def observe(self, layer_idx: int, queries: Tensor, scale: float) -> None:
        """After the prompt: record root mean square over the queries and the layer's preference, as ``expected`` has them."""
        if self.report.prompt_tokens:
            keys = self.layers[layer_idx].entries_in_use()[0]
            attention = causal_attention(queries, keys, scale)[..., : self.report.prompt_tokens[0]]
            scores = group_reduce(attention.square().mean(-2).sqrt(), keys.shape[1])
            self.recorded.append((scores, attention_preference(attention, 1, 1)))
        super().observe(layer_idx, queries, scale)


@dataclass(frozen=True, kw_only=True)
class Oracle(Expected):
    """``expected`` with the attention of the answer's own queries: an upper bound for better estimates of them."""

    recorded: Sequence[tuple[Scores, Tensor]] = field(default=(), compare=False, repr=False)

    def parts(self, model: ModelInfo, prompt: PromptInfo) -> Parts:
        """As ``expected``, scored by the recorded attention."""
        made = super().parts(model, prompt)
        scorer = extended(RecordedScorer, made.scorer, recorded=self.recorded)
        return replace(made, scorer=scorer)


@dataclass(frozen=True, kw_only=True)
class RecordedScorer(ExpectedScorer):
    """``expected``'s scorer with recorded scores and preferences of each layer."""

    recorded: Sequence[tuple[Scores, Tensor]]

    def score(self, states: LayerStates) -> Scores:
        """The recorded attention, scaled as in ``expected``, ``[1, Hkv, C]``."""
        scores, preference = self.recorded[states.layer]
        return scaled(scores[..., : self.context], preference)


@dataclass(frozen=True)
class Variant:
    """A row of the tables.

    ``task`` None: localization for needles, the classifier's answer for texts. ``structure`` False: the policy does not
    get the places of question and sentences. ``tables``: those in which the row is measured.
    """

    label: str
    policy: str | Policy
    task: Task | None = None
    structure: bool = True
    tables: tuple[str, ...] = ("needles", "texts")

    def profile(self, found: TaskProfile) -> TaskProfile:
        """The task profile that this variant gets."""
        given = found if self.structure else replace(found, structure=None)
        return given if self.task is None else replace(given, task=self.task, probability=None)


PUBLISHED = ("snapkv", "cake", "compresskv", "headkv", "windowkv", "dynamickv", "pyramidkv", "streaming")
# winnow keeps no sentences of a text whose task is aggregation: variants about sentences get localization there, and are
# to be compared with "sentences always".
VARIANTS = (
    Variant("winnow", "winnow"),
    Variant("no sentences", "winnow", "aggregation"),
    Variant("sentences always", "winnow", "localization", tables=("texts",)),
    Variant("sentences only", "winnow:share=1.0", "localization"),
    Variant("8 heads", "winnow:heads=8", "localization"),
    Variant("32 heads", "winnow:heads=32", "localization"),
    Variant("guessed heads", Part(guessed=True), "localization"),
    Variant("not progressive", "winnow:progressive=false", "localization"),
    Variant("no structure", "winnow", structure=False),
    Variant("queries not moved", Part(moved=False)),
    Variant("mean not rms", Part(attention=mean_attention)),
    Variant("normal distribution", Part(attention=normal_attention)),
    Variant("last queries only", Part(attention=late_attention, samples=1024)),  # a quarter of them: 256, as shipped
    Variant("even queries only", Part(attention=even_attention, samples=340)),  # three quarters: 255
    Variant("equal layers", "winnow:equal=true"),
    Variant("64 samples", "winnow:samples=64"),
    Variant("128 samples", "winnow:samples=128"),
    Variant("512 samples", "winnow:samples=512"),
    Variant("expected", "expected"),
    Variant("expected equal layers", "expected:equal=true"),
    Variant("expected + refit", "expected:refit=true", tables=("texts",)),
    Variant("expected + refit equal layers", "expected:refit=true:equal=true", tables=("texts",)),
    # What the answer itself shows, from the quality level "balanced" on. Answers about needles are shorter than 32 tokens.
    Variant("lookahead", "winnow:lookahead=32", tables=("texts",)),
    Variant("lookahead + draft", "winnow:lookahead=32:draft=64", tables=("texts",)),
    Variant("lookahead + draft + refit", "winnow:lookahead=32:draft=64:refit=true", tables=("texts",)),
    Variant("two drafts + refit", "winnow:lookahead=32:draft=64:rounds=2:refit=true", tables=("texts",)),
    Variant("lookahead + refit", "winnow:lookahead=32:refit=true", tables=("texts",)),
    Variant("balanced", "winnow:lookahead=64", tables=("texts",)),
    Variant("balanced equal layers", "winnow:lookahead=64:equal=true", tables=("texts",)),
    Variant("best", "winnow:lookahead=64:draft=64:rounds=2:refit=true", tables=("texts",)),
    Variant("lookahead of 1", "winnow:lookahead=1"),
    Variant("lookahead of 4", "winnow:lookahead=4", tables=("needles",)),
    Variant("lookahead of 8", "winnow:lookahead=8", tables=("needles",)),
    Variant("lookahead of 4 + draft", "winnow:lookahead=4:draft=16", tables=("needles",)),
    Variant("draft alone", "winnow:draft=16", tables=("needles",)),
    Variant("refit alone", "winnow:refit=true"),
    Variant("refit alone equal layers", "winnow:refit=true:equal=true"),
    *(Variant(name, name) for name in PUBLISHED),
    Variant("oracle", Oracle(), tables=("texts",)),
    Variant("oracle equal layers", Oracle(equal=True), tables=("texts",)),
)
