"""``budget="auto"``: the smallest budget that is expected to give the asked share of the full cache's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from winnowkv.cache.selection import PromptSelection, evidence
from winnowkv.models.curve import Curve
from winnowkv.models.info import ModelInfo
from winnowkv.policies import LayerStates, Policy, PromptInfo
from winnowkv.policies.protected import rest
from winnowkv.types import HeadScores, Indices, Scores

AUTO_PRECISION = 0.03  # the budget is narrowed down to so much


class AutoSelection:
    """A prompt whose budget is what its own scores ask for: all layers are held until the last one was read.

    Parameters
    ----------
    policy, model: as for :meth:`Policy.bind`.
    prompt: length and layers; its budget does not count.
    curve: what the policy is expected to give at a kept share of its scores.
    target: the share of the full cache's tokens to reach.

    Attributes
    ----------
    bound, kept, scores, common, notes: as of :class:`PromptSelection`.
    """

    def __init__(self, policy: Policy, model: ModelInfo, prompt: PromptInfo, curve: Curve, target: float) -> None:
        self._least = max(policy.minimum_budget(prompt), policy.sinks + policy.observation_window(prompt))
        if prompt.keep:
            self._least += prompt.tokens - rest(policy, prompt).tokens
        self._policy, self._prompt = policy, prompt
        self.bound = policy.bind(model, replace(prompt, budget=min(self._least, prompt.tokens)))
        self.notes = self.bound.notes
        self.kept: Sequence[Indices | None] = []
        self.scores: list[Scores] = []
        self.common: Indices | None = None
        self._mass, self._needed, self._target = 1.0, curve.needed(target), target
        self._evidence: list[tuple[Scores | None, HeadScores | None]] = []

    def observe(self, states: LayerStates) -> dict[int, Indices]:
        """As :meth:`PromptSelection.observe`; nothing shrinks before the last layer."""
        self.kept = [*self.kept, None]
        least, most = self._least, self._prompt.tokens
        if not self.bound.evicts:
            return {}
        self._evidence.append(evidence(self.bound, states))
        if len(self.kept) < self._prompt.layers:
            return {}
        best = None
        while most - least > 1 and most > least * (1 + AUTO_PRECISION):
            entries = max(int((least * most) ** 0.5), least + 1)
            trial = self._with(entries)
            if trial.kept_mass() >= self._needed:
                best, most = trial, entries
            else:
                least = entries
        self._evidence.clear()
        if best is None:
            self.notes = (f"auto: no budget below the whole prompt is expected to give {self._target:.0%}: everything is kept",)
            return {}
        self.bound, self.kept, self.scores, self.common, self._mass = (
            best.bound, best.kept, best.scores, best.common, best.kept_mass(),
        )  # fmt: skip
        return {layer: kept for layer, kept in enumerate(best.kept) if kept is not None}

    def kept_mass(self) -> float:
        """As :meth:`PromptSelection.kept_mass`."""
        return self._mass

    def _with(self, entries: int) -> PromptSelection:
        bound = self._policy.bind(self.bound.model, replace(self._prompt, budget=entries))
        trial = PromptSelection(bound, keep_scores=True)
        for scores, votes in self._evidence:
            trial.take(scores, votes)
        return trial
