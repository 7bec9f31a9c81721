"""Winnow: whole sentences that the model's retrieval heads look at, and tokens that the answer is expected to need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from winnowkv.models.calibration import CalibrationProfile, find_profile, known_profile
from winnowkv.models.info import ModelInfo
from winnowkv.policies.expected import Expected, ExpectedAllocator
from winnowkv.policies.parts import Parts, PromptInfo, Selector
from winnowkv.policies.sentences import SentenceVotes
from winnowkv.prompt.structure import Structure
from winnowkv.prompt.task import Task, TaskProfile
from winnowkv.scoring.allocate import uniform
from winnowkv.types import Entries, Scores

GUESSED_HEADS = 16  # heads that stand in for retrieval heads if there is no profile
SPAN_WIDTH = 16  # tokens of a span if the sentences are not known
LAYER_GROWTH = 2.0  # layers that wait for the heads shrink to make room for so many times themselves
GUESSING = (
    "no calibration profile of this model: winnow guesses its retrieval heads, and holds the whole prompt's cache "
    "until the last layer was read; winnow profile fetch gets a profile, winnow calibrate makes one"
)


@dataclass(frozen=True, kw_only=True)
class Winnow(Expected):
    """Sentences for all layers by the model's retrieval heads, seen from the question; the rest of the budget as ``expected``.

    The heads are CompressKV's (arXiv 2508.02401) of all layers, weighted by their score. The spans are WindowKV's (arXiv
    2503.17922), cut at the ends of sentences and lines. Until the last of the heads has voted every layer keeps candidates,
    fewer the more layers there are (as DynamicKV, arXiv 2412.14838). Without a profile the heads that attend most to one span
    of this prompt stand in, and all is held until the last layer has voted; without the prompt's structure
    (:func:`winnowkv.read_structure`) spans are 16 tokens and the question is the last ``observe``. With ``lookahead`` or
    ``draft`` the sentences' share is what ``heard`` leaves of it: who was heard says where to look.

    Formula
    -------
    ``score of a sentence = mean of the top best of s[i]``, ``s[i] = sum over heads(w[h] * sum over q of A[h, q, i])``: ``w[h]``
    is a retrieval head's score in the profile, the ``q`` are the question's. Other tokens as ``expected``: ``mean over the
    group(sqrt(mean over q of A[q, i]^2))`` of queries of the text moved past the prompt.

    Parameters
    ----------
    observe: tokens at the prompt's end that are the question if its place is not known; ``context``: no question is known yet,
        so that all goes as ``expected``.
    equal: all layers share the budget equally, those before the last of the heads once it has voted.
    share: what sentences get of the budget; 0: none.
    least: entries that they get at least.
    heads: how many heads vote; None: those that score half of the best.
    top: tokens by which a sentence is scored.
    longest: most tokens of a sentence; longer ones are cut.
    profile: a calibration profile, its file or a folder of profiles; None: one that ships with the package, if there is one.
    task: ``localization`` or ``aggregation``, for which no sentences are kept; None: the prompt's.
    peak: the most that is held while the prompt is read, as a share of the full cache, if the first head sits early enough.
    progressive: whether less than everything is held until the last head has voted.
    fallback: the task if none is given, or a classifier is less than ``sure``.
    sure: the probability that a classifier must have.

    Departures
    ----------
    None: ours. What it takes from CompressKV, WindowKV, DynamicKV, Expected Attention and CAKE is named above; what each part
    is worth is in docs/winnow-measurements.md.
    """

    name: ClassVar[str] = "winnow"
    source: ClassVar[str] = "ours, docs/winnow-policy.md"
    scope: ClassVar[str] = "sentences, same for all heads and layers, and tokens per KV head, layers by this prompt's attention"
    purpose: ClassVar[str] = "a question about a long text, or its summary"
    uses_task: ClassVar[bool] = True
    uses_structure: ClassVar[bool] = True

    observe: int | Literal["context"] = 32  # type: ignore[assignment]
    share: float = 0.25
    least: int = 40
    heads: int | None = None
    top: int = 8
    longest: int = 32
    profile: str | CalibrationProfile | None = None
    task: Task | None = None
    peak: float = 0.35
    progressive: bool = True
    fallback: Task = "localization"  # if no task is given, or a classifier is less than ``sure``
    sure: float = 0.75

    def __post_init__(self) -> None:
        if self.observe != "context":
            super().__post_init__()
            self.require("observe", minimum=1)
        for option in ("heads", "top", "longest"):
            self.require(option, minimum=1)
        for option in ("share", "peak", "sure"):
            self.require(option, minimum=0, maximum=1)
        self.require("least", minimum=0)

    @property
    def keeps_equal(self) -> bool:  # type: ignore[override]
        """With ``equal``."""
        return self.equal

    @property
    def wants_profile(self) -> bool:  # type: ignore[override]
        """If sentences have a share, and a question chooses them."""
        return self.observe != "context" and self.share > 0

    @property
    def blind(self) -> Expected:
        """What is left of the policy if no question is known."""
        return Expected(sinks=self.sinks, samples=self.samples, ahead=self.ahead, quantize=self.quantize, equal=self.equal)

    @property
    def beside_heard(self) -> Winnow:
        """The policy with what its sentences get beside heard queries: these have their share of the evidence.

        Nothing waits for heads then, since the whole prompt is held anyway.
        """
        if not self.looks:
            return self
        left = 1 - self.heard if self.lookahead or self.draft else 1
        return replace(self, share=self.share * left, least=int(self.least * left), progressive=False)

    def check(self, model: ModelInfo, task: TaskProfile | None) -> None:
        """Raise ProfileError for a profile that was asked for and does not serve the model, or is broken."""
        self.read_profile(model)

    def read_profile(self, model: ModelInfo) -> CalibrationProfile | None:
        """The model's profile, None if there is none and none was asked for."""
        if self.observe == "context":
            return None
        return known_profile(model) if self.profile is None else find_profile(self.profile, model)

    def observation_window(self, prompt: PromptInfo) -> int:
        """The least that a prompt must be longer than."""
        return self.blind.observe if self.observe == "context" else self.observe

    def keeps_sentences(self, prompt: PromptInfo) -> bool:
        """Whether the prompt's task asks for places of the text, and sentences get a share at all."""
        task = prompt.task
        unsure = task.probability is not None and task.probability < self.sure
        decided = self.task or (None if unsure else task.task) or self.fallback
        return decided != "aggregation" and self.share > 0

    def structure(self, prompt: PromptInfo) -> Structure:
        """The prompt's structure; a question of ``observe`` tokens and no sentences if it is not known or does not fit."""
        found = prompt.task.structure
        if found is None or found.tokens != prompt.tokens or found.question > prompt.tokens // 2:
            return Structure(prompt.tokens, self.observation_window(prompt), 0, ())
        return found

    def parts(self, model: ModelInfo, prompt: PromptInfo) -> Parts:
        """Expected's parts, whose window is the question, and the sentences that all layers keep."""
        if self.observe == "context":
            return self.blind.parts(model, prompt)
        structure = self.structure(prompt)
        window = self.unscored(prompt, structure.question)
        recent = min(window, max(self.observe, prompt.budget // 2), prompt.budget - self.sinks)
        scorer = self.scorer_of(model, prompt.tokens, window)
        selector = Selector(prompt.tokens, window, self.sinks, recent=recent)
        if not self.keeps_sentences(prompt):
            return Parts(scorer, self.shared_by_layers(prompt, self.sinks + recent), selector)
        profile = self.read_profile(model)
        heads = None if profile is None else tuple(
            profile.strong_heads() if self.heads is None else profile.top_heads(self.heads)
        )  # fmt: skip
        allocator = SentenceAllocator(prompt, always=self.sinks + recent, options=self.beside_heard, heads=heads)
        longest = self.longest if structure is prompt.task.structure else min(SPAN_WIDTH, self.longest)
        shared = SentenceVotes(
            structure, longest, self.sinks, self.top, profile, heads, self.heads or GUESSED_HEADS, allocator.sentence_room
        )
        return Parts(scorer, allocator, selector, shared, GUESSING if profile is None else None)


@dataclass(frozen=True, kw_only=True)
class SentenceAllocator(ExpectedAllocator):
    """As :class:`ExpectedAllocator`, above the sentences that all layers keep; layers wait for the ``heads`` that choose them.

    ``always``: entries that every layer keeps besides sentences. ``heads``: those that vote as ``(layer, head)``, None if
    they are guessed, for which all layers have to be compared.
    """

    options: Winnow
    heads: tuple[tuple[int, int], ...] | None

    def room(self, entries: int) -> int:
        """What sentences get of a layer's ``entries``."""
        asked = self.options
        return max(min(max(int(asked.share * entries), asked.least), entries - self.always), 0)

    @property
    def awaited(self) -> range:
        """The layers from the first to the last head that votes."""
        if not self.room(self.prompt.budget):
            return range(0)
        layers = [at for at, _ in self.heads or ()] or [self.prompt.layers - 1]
        return range(min(layers), max(layers))

    def sentence_room(self, layers: int) -> int:
        """How many tokens of sentences every layer keeps once so many layers have voted: more while heads are awaited."""
        return self.room(self.prompt.budget if layers > self.awaited.stop else self.limit(layers - 1))

    def limit(self, layer: int) -> int:
        """What each layer may hold once ``layer`` was read and the last of the heads was not."""
        prompt, waited = self.prompt, self.awaited
        if not self.options.progressive or layer < waited.start:
            return prompt.tokens
        # Room for the next layers, too, so that not all of them are copied after each.
        layers = 1
        while layers <= layer:
            layers = math.ceil(layers * LAYER_GROWTH)
        layers = min(layers, max(waited.stop, layer + 1))
        # Twice the budget each for the layers after the last head, so that nothing shrinks for them before the end.
        later = 2 * prompt.budget * (prompt.layers - 1 - waited.stop)
        room = (self.bound() - later) // layers
        return max(min(room, prompt.tokens), prompt.budget)

    def bound(self) -> int:
        """What the peak leaves beside the layer that is being read, at least an eighth more than the budget."""
        prompt = self.prompt
        return max(prompt.total * 9 // 8, int((self.options.peak * prompt.layers - 1) * prompt.tokens))

    def peak_entries(self) -> int:
        """The layers read at their limits, and the layer that is being read."""
        waiting = [self.limit(at) * (at + 1) + self.prompt.tokens for at in range(self.awaited.stop)]
        return max([super().peak_entries(), *waiting])

    def shrink(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[int]:
        """All layers come down together while heads are awaited, then they share the budget."""
        if len(scores) > self.awaited.stop:  # equal layers do not wait for each other
            return self.allocate(scores, held) if self.options.equal else super().shrink(scores, held)
        return [min(int(entries), self.limit(len(scores) - 1)) for entries in held]

    def allocate(self, scores: Sequence[Scores], held: Sequence[Entries]) -> list[int]:
        """In proportion to the preferences, above sinks, sentences and question; or equally."""
        if self.options.equal:
            return uniform(len(held), self.prompt.budget)
        return self.split(scores, held, self.always + self.room(self.prompt.budget))
