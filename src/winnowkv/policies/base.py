"""What an eviction policy is: options, bound once to a prompt, and parts that can be exchanged.

A :class:`Policy` is a frozen dataclass of options and nothing else. :meth:`Policy.bind` makes a :class:`BoundPolicy` of it for
one prompt of one model. That one has three parts (parts.py):

- a scorer says how important each context token of a layer is, and which queries it wants to see for that,
- an allocator says how many entries each layer holds while the prompt is read, and how many it ends with,
- a selector turns a layer's scores into the positions that stay.

A fourth is for policies in which all layers keep some tokens together. Everything a part needs is a field or an argument; no
part changes while a prompt is read. To write a policy, override :meth:`Policy.scorer` (examples/own_policy).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnowkv.budget import Budget
from winnowkv.errors import BudgetError, PolicyError
from winnowkv.files import shown
from winnowkv.models.info import ModelInfo
from winnowkv.policies.decode_eviction import DecodeEviction
from winnowkv.policies.parts import Allocator, ChunkEviction, Parts, PromptInfo, Scorer, Selector
from winnowkv.policies.protected import check_spans, protect, rest, without_protected
from winnowkv.prompt.task import TaskProfile
from winnowkv.types import BITS, Quantization, Spans

# Methods that decide how many entries each layer and head keeps.
DECIDES_NUMBERS = frozenset({"parts", "allocator", "selector", "wrap", "selector_over"})


@dataclass(frozen=True)
class BoundPolicy:
    """A policy for one prompt of one model: everything is decided that depends on them.

    ``evicts`` is False if the prompt is kept whole; ``notes`` are what the user should know, in sentences.
    """

    policy: Policy
    model: ModelInfo
    prompt: PromptInfo
    parts: Parts
    evicts: bool
    notes: tuple[str, ...]

    @property
    def keeps_equal(self) -> bool:
        """Whether all layers and heads keep the same number of entries of this prompt: all of them if nothing is evicted."""
        return not self.evicts or self.policy.keeps_equal

    def query_positions(self) -> Tensor:
        """Prompt positions of the queries that the parts want of each layer: the scorer's, then those that vote."""
        if not self.evicts:
            return torch.arange(0)
        wanted, shared = self.parts.scorer.query_positions(), self.parts.shared
        return wanted if shared is None else torch.cat([wanted, shared.query_positions()])

    def query_span(self) -> int:
        """How far before the prompt's end the first of these queries stands; 0 if none is wanted."""
        wanted = self.query_positions()
        return self.prompt.tokens - int(wanted.min()) if len(wanted) else 0


class Policy:
    """Root of all eviction policies. Derive from :class:`TokenPolicy`, or from ``compose.Wrapper`` to change another policy.

    A policy's docstring says in sections Formula, Parameters and Departures how tokens are scored, what its options are, and
    what is not as in the paper or the authors' code. In a formula ``A[q, i]`` is the attention that query ``q`` pays to token
    ``i`` (softmax over all keys that it sees), ``k`` and ``v`` are keys and values of a KV head, the group its query heads.

    Class attributes
    ----------------
    name: how it is asked for. source: the paper. scope: what it keeps, in one line. purpose: for whom, when, in a phrase.
    evicts: False for what keeps everything.
    uses_task, uses_structure: whether it makes use of the prompt's task, of its question and sentence ends.
    needs_profile: whether it cannot work without a calibration profile. wants_profile: whether it guesses in place of one.
    needs_projection: whether its scorer reads the layers' output projections.
    needs_study: whether it scores by a study of the text alone, so that nothing but ``wk.read`` can serve it; weighs_values:
        whether the study then weighs attention by what values add to the hidden state.
    per_head: whether heads of a layer may keep different numbers of entries; a layer is then held at its longest head.
    keeps_spans: whether tokens stay or go together with those beside them, and not by their own scores.
    own_selector: whether it is about how tokens are selected, so that no wrapper may exchange that.
    keeps_equal: whether all layers and all heads keep the same number of entries, whatever the prompt. A class that overrides
        one of :data:`DECIDES_NUMBERS` has to say so anew: for it this is False until it does. That of a text that is studied
        is ``StudiedPolicy(of=policy).keeps_equal``, since the study may choose in its own way.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    scope: ClassVar[str]
    purpose: ClassVar[str] = ""
    evicts: ClassVar[bool] = True
    uses_task: ClassVar[bool] = False
    uses_structure: ClassVar[bool] = False
    needs_profile: ClassVar[bool] = False
    wants_profile: ClassVar[bool] = False
    needs_projection: ClassVar[bool] = False
    needs_study: ClassVar[bool] = False
    weighs_values: ClassVar[bool] = False
    per_head: ClassVar[bool] = False
    keeps_spans: ClassVar[bool] = False
    own_selector: ClassVar[bool] = False
    keeps_equal: ClassVar[bool] = True  # as the parts below
    equal: bool = False  # the option of some policies that asks for that
    # Of every policy, as options or taken over from another policy; explained in TokenPolicy.
    sinks: int
    observe: int
    quantize: Quantization | None
    lookahead: int
    draft: int
    rounds: int
    heard: float
    refit: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "keeps_equal" not in vars(cls) and not DECIDES_NUMBERS.isdisjoint(vars(cls)):
            cls.keeps_equal = False  # what a base class says of its parts does not hold for others

    def require(self, option: str, *, minimum: float, maximum: float = math.inf, odd: bool = False) -> None:
        """Raise PolicyError if an option lies outside its bounds, is not finite or is not odd."""
        value = getattr(self, option)
        if value is not None and not math.isfinite(value):
            raise PolicyError(f"{self.name}: {option}={value} must be a finite number")
        if value is not None and value < minimum:
            raise PolicyError(f"{self.name}: {option}={value} is too small, it must be at least {minimum}")
        if value is not None and value > maximum:
            raise PolicyError(f"{self.name}: {option}={value} is too large, it must be at most {maximum}")
        if value is not None and odd and value % 2 == 0:
            raise PolicyError(f"{self.name}: {option}={value} must be odd")

    @property
    def looks(self) -> bool:
        """Whether the whole prompt is held until it was read and, if asked for, tokens of the answer were heard."""
        return self.evicts and bool(self.lookahead or self.draft or self.refit)

    @property
    def spec(self) -> str:
        """The policy as it is written on the command line, options that differ from their defaults included."""
        options = fields(self)  # type: ignore[arg-type]  # every policy is a dataclass, only this root is not
        given = [(f.name, getattr(self, f.name)) for f in options if getattr(self, f.name) != f.default]
        return ":".join([self.name, *(f"{key}={value}" for key, value in given if isinstance(value, str | int | float))])

    def check(self, model: ModelInfo, task: TaskProfile | None) -> None:
        """Raise PolicyError or ProfileError for what no prompt of this model and task could be compressed with.

        ``task`` is None as long as the prompt's task is not known.
        """

    def observation_window(self, prompt: PromptInfo) -> int:
        """Tokens of the observation window for a prompt."""
        return self.observe

    def evicts_from(self, prompt: PromptInfo) -> bool:
        """Whether anything of this prompt is evicted: not if the budget covers it, or if it is all observation window."""
        return self.evicts and prompt.budget < prompt.tokens and prompt.tokens > self.observation_window(prompt)

    def minimum_budget(self, prompt: PromptInfo) -> int:
        """The smallest budget that leaves room for sinks and recent window."""
        return max(self.sinks + self.observation_window(prompt), 1)

    def prompt_info(
        self,
        budget: Budget,
        tokens: int,
        layers: int,
        task: TaskProfile | None = None,
        *,
        keep: Spans = (),
        hint: int = 0,
    ) -> PromptInfo:
        """A prompt with its budget in entries: the one place where a fraction is raised to what this policy must keep.

        ``tokens`` of the prompt, ``layers`` that are compressed. A budget in entries stays as it is: see :meth:`check_prompt`.
        ``keep`` spans are protected, and the last ``hint`` tokens, for which the budget has room beside it. Raises InputError
        for a span past the end.
        """
        text = tokens - hint
        check_spans(keep, text)
        keep = (*keep, (text, tokens)) if hint else keep
        prompt = PromptInfo(tokens, layers, budget.entries(text) + hint, task or TaskProfile(), keep)
        others = without_protected(self, prompt)
        if not isinstance(budget.asked, float) or not self.evicts_from(others):
            return prompt
        least = min(self.minimum_budget(others), others.tokens) + tokens - others.tokens
        return prompt if prompt.budget >= least else replace(prompt, budget=least, raised_from=prompt.budget)

    def check_budget(self, prompt: PromptInfo) -> None:
        """Raise BudgetError if the prompt's budget cannot hold what always stays."""
        if prompt.budget < (least := self.minimum_budget(prompt)):
            raise BudgetError(
                f"{self.name}: a budget of {prompt.budget} entries (prompt of {prompt.tokens} tokens) is below "
                f"sinks + window = {self.sinks} + {self.observation_window(prompt)}: keep at least {least} entries, "
                f"or make the window smaller (observe=)"
            )

    def check_prompt(self, prompt: PromptInfo) -> None:
        """Raise BudgetError if something of the prompt is to be evicted and its budget cannot hold what always stays."""
        if self.evicts_from(prompt):
            self.check_budget(prompt)

    def query_span(self, model: ModelInfo, prompt: PromptInfo) -> int:
        """How far before the prompt's end queries are wanted, whatever the budget."""
        least = min(self.minimum_budget(prompt), prompt.tokens)
        return self.bind(model, replace(prompt, budget=least)).query_span()

    def stored_as(self, quantize: Quantization | None) -> Policy:
        """The same policy, its kept entries stored in so many bits."""
        return replace(self, quantize=quantize)  # type: ignore[type-var]  # every policy is a dataclass

    def lean(self) -> Policy:
        """The same policy, but what stays is decided while the prompt is read: without lookahead, draft and refit."""
        return replace(self, lookahead=0, draft=0, refit=False)  # type: ignore[type-var]  # every policy is a dataclass

    def bind(self, model: ModelInfo, prompt: PromptInfo) -> BoundPolicy:
        """The policy for one prompt of one model. Not to be overridden: :meth:`parts` is.

        Raises BudgetError if the budget cannot hold what always stays, and what :meth:`check` raises.
        """
        self.check(model, prompt.task)
        others = rest(self, prompt)  # the prompt itself, unless spans of it are protected
        self.check_prompt(others)
        evicts = self.evicts_from(others)
        parts = self.parts(model, prompt) if others is prompt else protect(self, model, prompt, others)
        notes = []
        if evicts and parts.hint is not None:
            notes.append(parts.hint)
        if prompt.raised_from is not None:
            notes.append(
                f"{self.name}: the budget is a fraction that gives {prompt.raised_from} entries of this prompt, "
                f"fewer than always stay (sinks, window, what keep= protects): it was raised to {prompt.budget}"
            )
        elif self.evicts and not evicts and prompt.budget < prompt.tokens:
            notes.append(
                f"the prompt of {others.tokens} tokens is no longer than the observation window of "
                f"{self.observation_window(others)}: everything is kept"
            )
        return BoundPolicy(self, model, prompt, parts, evicts, tuple(notes))

    def parts(self, model: ModelInfo, prompt: PromptInfo) -> Parts:
        """The parts that do the work. Most policies override one of the three methods below instead."""
        return Parts(self.scorer(model, prompt), self.allocator(model, prompt), self.selector(model, prompt))

    def scorer(self, model: ModelInfo, prompt: PromptInfo) -> Scorer:
        """How important each token is; every policy that evicts has its own."""
        return Scorer(prompt.tokens, self.observation_window(prompt))

    def allocator(self, model: ModelInfo, prompt: PromptInfo) -> Allocator:
        """How many entries each layer gets; by default every layer the same."""
        return Allocator(prompt)

    def selector(self, model: ModelInfo, prompt: PromptInfo) -> Selector:
        """Which tokens stay; by default the best of each head."""
        return Selector(prompt.tokens, self.observation_window(prompt), self.sinks)

    def chunk_eviction(self, model: ModelInfo) -> ChunkEviction | None:
        """What goes between the chunks of a long prompt that is read under a ceiling; None takes ``ExpectedSpans``."""
        return None

    def decode_eviction(self) -> DecodeEviction:
        """What goes of the tokens after the prompt under a decode budget."""
        return DecodeEviction()


@dataclass(frozen=True, kw_only=True)
class TokenPolicy(Policy):
    """What most policies derive from: sinks, an observation window, and how kept entries are stored.

    Parameters
    ----------
    sinks: first tokens that always stay.
    observe: observation window ``W``, the last prompt tokens; they always stay.
    quantize: ``int8`` or ``int4`` stores the entries that stay in 8 or 4 bits once the prompt is read.
    lookahead: hold the whole prompt until so many tokens of the answer were generated from it; their queries then choose what
        stays, beside the policy's own. The tokens are those of the full cache.
    draft: after that generate so many tokens from what would stay, only to hear their queries, throw them away and choose
        again from the whole prompt, which is still held.
    rounds: how many drafts there are, one after the other.
    heard: weight of the queries of lookahead and draft, 0 to 1; the policy's own have the rest.
    refit: change the values that stay by least squares so that attention over them gives what attention over all gave, in
        every KV head in which queries that were held out say that it helps (:mod:`winnowkv.scoring.refit`).

    Raises
    ------
    PolicyError
        For an option outside its bounds.
    """

    sinks: int = 0
    observe: int = 0
    quantize: Quantization | None = None
    lookahead: int = 0
    draft: int = 0
    rounds: int = 1
    heard: float = 0.7
    refit: bool = False

    def __post_init__(self) -> None:
        for option in ("sinks", "observe", "lookahead", "draft"):
            self.require(option, minimum=0)
        self.require("rounds", minimum=1)
        self.require("heard", minimum=0, maximum=1)
        if not self.evicts and (self.lookahead or self.draft or self.refit):
            raise PolicyError(f"{self.name} keeps everything, nothing is chosen: leave lookahead, draft and refit out")
        if self.quantize not in (None, *BITS):
            raise PolicyError(f"{self.name}: quantize={shown(self.quantize)} must be one of {', '.join(BITS)}")
