"""Expected: tokens that the text's own queries would attend to from where the answer will stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from winnowkv.errors import BudgetError
from winnowkv.models.info import ModelInfo
from winnowkv.models.rope import Rotation
from winnowkv.policies.base import TokenPolicy
from winnowkv.policies.cascade import CascadeAllocator
from winnowkv.policies.parts import Allocator, LayerStates, PromptInfo, Scorer, Selector
from winnowkv.scoring.allocate import apportion
from winnowkv.scoring.attention import expected_attention, totals
from winnowkv.types import Entries, Queries, Scores

# Fewer compressed layers than this are not compared, and get equal budgets. On Gemma-3-270M, which has three, sharing by
# preference costs 2 points of agreement (docs/winnow-measurements.md); with 30 layers it gains 2.
LAYERS_TO_COMPARE = 4


@dataclass(frozen=True, kw_only=True)
class Expected(TokenPolicy):
    """Tokens that the text's own queries would attend to if they stood after the prompt; no question needed.

    What the answer's queries will look like is taken from the text itself, as in Expected Attention (arXiv 2510.00636). Layers
    share the budget as in CAKE (arXiv 2503.12491), so that never more than the budget and one layer is held. If a model's
    rotation is not known (or it has none) the queries stay as they are.

    Formula
    -------
    ``score[i] = mean over the group(sqrt(mean over q of A[q, i]^2))``, in which the ``q`` are sampled queries of the text,
    turned to a position after the prompt each. A layer's share of the budget is proportional to entropy times variance of that
    attention.

    Parameters
    ----------
    samples: queries of the text: three quarters of them evenly over it, a quarter its last ones.
    ahead: positions after the prompt that they are turned to.
    equal: give all layers the same, as is done anyway with fewer than :data:`LAYERS_TO_COMPARE` layers.

    Departures
    ----------
    From Expected Attention: single queries, where the paper fits one normal distribution to all (measured worse,
    docs/winnow-measurements.md); a token scores their root mean square, not an expected value; layers share the budget by
    CAKE's preference.
    """

    name: ClassVar[str] = "expected"
    source: ClassVar[str] = "after Expected Attention, arXiv 2510.00636, and CAKE, arXiv 2503.12491"
    scope: ClassVar[str] = "tokens per KV head, budgets over layers by this prompt's attention"
    purpose: ClassVar[str] = "a text whose question is not known yet"

    sinks: int = 4
    observe: int = 32
    samples: int = 256
    ahead: int = 128
    equal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("samples", minimum=4)
        self.require("ahead", minimum=1)

    @property
    def keeps_equal(self) -> bool:  # type: ignore[override]
        """With ``equal``."""
        return self.equal

    def minimum_budget(self, prompt: PromptInfo) -> int:
        """Sinks and the last token."""
        return self.sinks + 1

    def check_budget(self, prompt: PromptInfo) -> None:
        """Raise BudgetError if the prompt's budget cannot hold the sinks and the last token."""
        if prompt.budget < (least := self.minimum_budget(prompt)):
            raise BudgetError(
                f"{self.name}: a budget of {prompt.budget} entries (prompt of {prompt.tokens} tokens) is below "
                f"{self.sinks} sinks and the last token: keep at least {least} entries, or fewer sinks (sinks=)"
            )

    def unscored(self, prompt: PromptInfo, window: int) -> int:
        """The last tokens that do not compete: the ``window``, without the sinks that a short prompt has in it."""
        return window if prompt.tokens <= self.sinks else min(window, prompt.tokens - self.sinks)

    def recent(self, prompt: PromptInfo) -> int:
        """How many of the last tokens stay: the whole window, or as many as fit into a small budget."""
        return min(self.observe, prompt.budget - self.sinks)

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """By moved queries."""
        return self.scorer_of(model, prompt.tokens, self.unscored(prompt, self.observe))

    def scorer_of(self, model: ModelInfo, tokens: int, window: int) -> ExpectedScorer:
        """The scorer of a prompt of so many tokens, whose last ``window`` do not compete."""
        moving = {"sinks": self.sinks, "samples": self.samples, "ahead": self.ahead}
        return ExpectedScorer(tokens, window, rotation=model.rotation, **moving)

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """By the layers' preferences, or equally."""
        return self.shared_by_layers(prompt, self.sinks + self.recent(prompt))

    def shared_by_layers(self, prompt: PromptInfo, always: int) -> Allocator:
        """How layers share the budget, each of which ``always`` keeps so many entries."""
        return Allocator(prompt) if self.equal else ExpectedAllocator(prompt, always=always)

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """Sinks, the best tokens, the recent ones."""
        window = self.unscored(prompt, self.observe)
        return Selector(prompt.tokens, window, self.sinks, recent=self.recent(prompt))


@dataclass(frozen=True, kw_only=True)
class ExpectedScorer(Scorer):
    """Attention of sampled queries of the text that are moved past its end.

    ``samples`` of them, from the end of the ``sinks`` on, go to the ``ahead`` positions after the prompt by ``rotation``.
    """

    sinks: int
    samples: int
    ahead: int
    rotation: Rotation | None
    nearby_queries: ClassVar[bool] = True
    shares_heads: ClassVar[bool] = True

    @property
    def context(self) -> int:
        """Tokens that compete."""
        return max(self.tokens - self.window, 0)

    def query_positions(self) -> Tensor:
        """Those of the samples."""
        positions: Tensor = sample_moves(self.tokens, self.context, self.sinks, self.samples, self.ahead)[0].unique()
        return positions

    def score(self, states: LayerStates) -> Scores:
        """Attention of the moved queries, ``[1, Hkv, C]``; scaled so that its sum is the layer's preference."""
        moved = self.answer_queries(states)
        scores, preference = expected_attention(
            moved, states.keys, states.scale, self.context, states.heads, heard=states.heard, weight=states.weight
        )
        # One factor for the whole layer changes no choice within it, and carries its preference to allocate().
        return scores * (preference / scores.sum().clamp(min=1e-30))

    def with_heard(self, scores: Scores, states: LayerStates) -> Scores:
        """They are in the scores already, and in the layer's preference."""
        return scores

    def answer_queries(self, states: LayerStates) -> Queries:
        """The moved ones."""
        columns, by = sample_columns(self.tokens, self.context, self.sinks, self.samples, self.ahead, states.queries.device)
        return self.move(states.queries.index_select(2, columns), by)

    def move(self, queries: Queries, by: Tensor) -> Queries:
        """Turned by the model's rotation, if it is known."""
        return queries if self.rotation is None else self.rotation.turn(queries, by)


@dataclass(frozen=True, kw_only=True)
class ExpectedAllocator(CascadeAllocator):
    """In proportion to the layers' preferences, above what every layer ``always`` keeps."""

    always: int

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[int]:
        """In proportion to the preferences; the sum is exact once all layers are there."""
        return self.split(scores, held, self.always)

    def split(self, scores: Sequence[Scores], held: Sequence[Entries], always: int) -> list[int]:
        """``always`` entries each, the rest of the budget by preference."""
        prompt = self.prompt
        always = min(always, prompt.budget)
        caps = [int(entries) - always for entries in held]
        total = min((prompt.budget - always) * prompt.layers, sum(caps))
        weights = totals(scores) if prompt.layers >= LAYERS_TO_COMPARE else [1.0] * len(scores)
        return [always + more for more in apportion(weights, total, caps)]


def sample_moves(tokens: int, context: int, sinks: int, samples: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Where each sampled query of the first ``context`` tokens stands, ascending but for repeats, and where it is moved to."""
    late = min(samples // 4, context)
    early = min(samples - late, context)
    first = min(sinks, context - 1)
    here = torch.cat([torch.linspace(first, context - 1, early).long(), torch.arange(context - late, context)])
    there = torch.cat([torch.linspace(0, ahead - 1, early).long(), torch.arange(late)]) + tokens
    return here, there


@lru_cache(maxsize=16)  # every layer of a prompt asks for the same
@torch.inference_mode(False)  # or the next prompt, which may be read outside of it, could not use it
def sample_columns(
    tokens: int, context: int, sinks: int, samples: int, ahead: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The columns of the sampled queries among the wanted ones, and how far each is moved; on the device."""
    here, there = sample_moves(tokens, context, sinks, samples, ahead)
    columns = torch.searchsorted(here.unique(), here)
    return columns.to(device), (there - here).to(device)
