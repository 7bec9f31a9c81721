"""Expected: tokens that the text's own queries would attend to from where the answer will stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from winnowkv.errors import BudgetError
from winnowkv.models.info import Fingerprint
from winnowkv.models.rope import Rotation
from winnowkv.policies.base import GIVEN, Policy, Prompt
from winnowkv.policies.cascade import Cascade
from winnowkv.scoring.allocate import apportion
from winnowkv.scoring.attention import expected_attention, totals
from winnowkv.scoring.select import top_tokens, with_recent, with_sinks
from winnowkv.types import Entries, Indices, Keys, Queries, Scores


@dataclass(frozen=True, kw_only=True)
class Expected(Cascade, Policy):
    """Top tokens per KV head by the attention of ``samples`` queries of the text, moved behind the prompt; no question needed.

    What the answer's queries will look like is taken from the text itself, as in Expected Attention (arXiv 2510.00636).
    Departures: single queries, three quarters of them evenly over the text and a quarter its last ones, are turned to one
    of the ``ahead`` positions behind the prompt each, where the paper fits one normal distribution to all (measured worse,
    docs/winnow-policy.md); a token scores their root mean square; layers share the budget as in CAKE (arXiv 2503.12491),
    by entropy and variance of the same attention, so that never more than the budget and one layer is held. Where a
    model's rotation is not known (or it has none) the queries stay as they are.
    """

    name: ClassVar[str] = "expected"
    source: ClassVar[str] = "after Expected Attention, arXiv 2510.00636, and CAKE, arXiv 2503.12491"
    scope: ClassVar[str] = "tokens per KV head, budgets over layers by this prompt's attention"

    sinks: int = 4
    observe: int = 32
    samples: int = 256
    ahead: int = 128
    rotation: Rotation | None = field(default=None, metadata=GIVEN)  # by for_model()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("samples", minimum=4)
        self.require("ahead", minimum=1)

    def for_model(self, model: Fingerprint) -> Policy:
        """The policy with the model's rotation."""
        return replace(self, rotation=model.rotation or self.rotation)

    def reads(self, tokens: int) -> int:
        """All: the samples lie anywhere."""
        return tokens

    def places(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Where each sampled query stands, and where it is moved to."""
        return sampled(tokens, max(tokens - self.window(tokens), 0), self.sinks, self.samples, self.ahead)

    def wanted(self, tokens: int) -> Tensor:
        """The sampled ones."""
        return self.places(tokens)[0].unique()

    def window(self, tokens: int) -> int:
        """The last tokens, that do not compete."""
        return self.observe

    def recent(self, prompt: Prompt) -> int:
        """Those of them that stay: all, or as many as fit into a small budget."""
        return min(self.observe, prompt.budget - self.sinks)

    def minimum_budget(self) -> int:
        """Sinks and the last token."""
        return self.sinks + 1

    def check(self, prompt: Prompt) -> None:
        """Raise BudgetError where the prompt's budget cannot hold the sinks and the last token."""
        if prompt.budget < (least := self.minimum_budget()):
            raise BudgetError(
                f"{self.name}: a budget of {prompt.budget} entries (prompt of {prompt.tokens} tokens) is below "
                f"{self.sinks} sinks and the last token: keep at least {least} entries, or fewer sinks (sinks=)"
            )

    def always(self, prompt: Prompt) -> int:
        """What every layer keeps before layers compete: sinks and recent tokens."""
        return self.sinks + self.recent(prompt)

    def score(self, layer: int, queries: Queries, keys: Keys, scale: float) -> Scores:
        """Attention of the moved queries, ``[1, Hkv, C]``; scaled so that its sum is the layer's preference."""
        tokens = keys.shape[2]
        context = tokens - self.window(tokens)
        columns, by = moves(tokens, context, self.sinks, self.samples, self.ahead, queries.device)
        moved = queries.index_select(2, columns)
        if self.rotation is not None:
            moved = self.rotation.turn(moved, by)
        scores, preference = expected_attention(moved, keys, scale, context)
        # One factor for the whole layer changes no choice within it, and carries its preference to allocate().
        return scores * (preference / scores.sum().clamp(min=1e-30))

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries], prompt: Prompt) -> list[int]:
        """In proportion to the preferences, above what every layer keeps; the sum is exact once all layers are there."""
        always = min(self.always(prompt), prompt.budget)
        caps = [int(entries) - always for entries in held]
        total = min((prompt.budget - always) * prompt.layers, sum(caps))
        return [always + more for more in apportion(totals(scores), total, caps)]

    def select(self, layer: int, scores: Scores, entries: Entries, prompt: Prompt) -> Indices:
        """Sinks, the best tokens, the recent ones."""
        recent = max(self.recent(prompt), int(entries) - scores.shape[-1])
        best = top_tokens(with_sinks(scores, self.sinks), int(entries) - recent)
        return with_recent(best, prompt.tokens, recent)


def sampled(tokens: int, context: int, sinks: int, samples: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Where each sampled query of the first ``context`` tokens stands, ascending but for repeats, and where it is moved to."""
    late = min(samples // 4, context)
    early = min(samples - late, context)
    first = min(sinks, context - 1)
    here = torch.cat([torch.linspace(first, context - 1, early).long(), torch.arange(context - late, context)])
    there = torch.cat([torch.linspace(0, ahead - 1, early).long(), torch.arange(late)]) + tokens
    return here, there


@lru_cache(maxsize=16)  # every layer of a prompt asks for the same
@torch.inference_mode(False)  # or the next prompt, which may be read outside of it, could not use it
def moves(tokens: int, context: int, sinks: int, samples: int, ahead: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The columns of the sampled queries among the wanted ones, and how far each is moved; on the device."""
    here, there = sampled(tokens, context, sinks, samples, ahead)
    columns = torch.searchsorted(here.unique(), here)
    return columns.to(device), (there - here).to(device)
